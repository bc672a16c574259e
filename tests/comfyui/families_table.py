"""Writes docs/families.md from a run on the newest ComfyUI checkout: python -m tests.comfyui.families_table"""

from __future__ import annotations

import tempfile
from pathlib import Path

from .checkouts import FLOOR, Checkout, checkouts
from .inside_programs import REPOSITORY, install_pack, run_program

TABLE = REPOSITORY / "docs" / "families.md"
REUSE = ("whole prediction", "blocks")
TEXT = """# Model families under Apply Cache

Each row is ComfyUI's own model class in a tiny, randomly filled configuration, sampled for {steps} steps with euler,
simple and cfg 2, on ComfyUI {version}. Every third step is computed: {computed} are computed and {reused} reused.

The differences are relative, between such a run and Euler steps written by hand without the nodes, and the larger of
two: both conditions in one batch, and one after the other on reused steps. For "whole prediction" the steps by hand
hold d = (x - denoised) / sigma, which with euler is what holding the denoised sample comes to; for "blocks" each block
of the lists named adds again what it added on the last computed step, while the rest computes. Rounding alone makes the
difference about 1e-7. On every row and with either choice a cache that never reuses gave the plain model's result bit
for bit, and the run left nothing on the model. The table shows that the cache does what it says on the family, not how
good the images of a trained model are.

{rows}

{notes}

Largest difference: {whole:.0e} for the whole prediction, {blocks:.0e} for blocks. A ControlNet is a stand-in that adds
another tensor after each block on every step; a block patch changes the stream after every block.

Written by `python -m tests.comfyui.families_table`.
"""
COLUMNS = (
    "Family",
    "Model class",
    "Network",
    "Sampling type",
    "Parameters of the tiny model",
    "Whole prediction: difference",
    "Lists of blocks",
    "Blocks: difference",
)


def row(name: str, found: dict) -> str:
    whole, blocks = (found["kinds"][reuse] for reuse in REUSE)
    cells = (
        name,
        found["model"],
        found["network"],
        found["sampling"],
        f"{found['parameters']:,}",
        f"{error(whole):.0e}",
        ", ".join(f"{length} {path}" for path, length in found["lists"].items()) or "-",
        f"{error(blocks):.0e}" if reuses_blocks(found) else "-",
    )
    return line(cells)


def error(reuse: dict) -> float:
    return max(reuse["error"], reuse["apart"])


def reuses_blocks(found: dict) -> bool:
    return found["kinds"]["blocks"]["reuse"].startswith("blocks")


def notes(present: dict[str, dict]) -> str:
    """What a run reports where blocks were chosen and are not reused."""
    reported = {name: found["kinds"]["blocks"]["reuse"] for name, found in present.items() if not reuses_blocks(found)}
    lines = [
        f'- {", ".join(name for name, other in reported.items() if other == text)}: "{text}"'
        for text in dict.fromkeys(reported.values())
    ]
    return "\n".join(
        ["Where blocks were chosen and the table has -, the run reports what it reuses instead and why:", "", *lines]
    )


def line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def table(results: dict[str, dict], version: str) -> str:
    failed = [name for name, found in results.items() if "absent" not in found and not sound(found)]
    if failed:
        raise SystemExit(f"no table: {', '.join(failed)} failed")
    present = {name: found for name, found in results.items() if "kinds" in found}
    some = next(iter(present.values()))["kinds"]["whole prediction"]
    lines = [line(COLUMNS), line("---" for _ in COLUMNS), *(row(name, found) for name, found in present.items())]
    return TEXT.format(
        steps=some["computed"] + some["reused"],
        computed=some["computed"],
        reused=some["reused"],
        version=version,
        rows="\n".join(lines),
        notes=notes(present),
        whole=max(error(found["kinds"]["whole prediction"]) for found in present.values()),
        blocks=max(error(found["kinds"]["blocks"]) for found in present.values() if reuses_blocks(found)),
    )


def sound(found: dict) -> bool:
    """Whether the checks ended, and what the text says of every row holds."""
    if "failed" in found:
        return False
    same = all(reuse["never reused"] and reuse["clean"] for reuse in found["kinds"].values())
    return same and found["interval 1"] and found["no error"]


def listed(text: str) -> list[str]:
    """The families of a table's rows."""
    rows = [part.split("|")[1].strip() for part in text.splitlines() if part.startswith("|")]
    return rows[2:]


def run(checkout: Checkout) -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as base:
        install_pack(Path(base))
        return run_program(checkout, "families", Path(base))


def main() -> None:
    newest = checkouts()[0]
    if newest.version < FLOOR:
        raise SystemExit(f"ComfyUI {newest.name} is older than the oldest that the nodes support")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(run(newest), newest.name), encoding="utf-8")
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
