"""Writes docs/families.md from a run on the newest ComfyUI checkout: python -m tests.comfyui.families_table"""

from __future__ import annotations

import tempfile
from pathlib import Path

from .checkouts import FLOOR, Checkout, checkouts
from .inside_programs import REPOSITORY, install_pack, run_program

TABLE = REPOSITORY / "docs" / "families.md"
REUSED = {"output": "the whole prediction", "branch": "attention and MLP outputs"}
TEXT = """# Model families under Apply Cache

Each row is ComfyUI's own model class in a tiny, randomly filled configuration, sampled for {steps} steps with euler,
simple and cfg 2, on ComfyUI {version}. Every third step is computed. The difference is relative, between that run and
Euler steps written by hand that hold d = (x - denoised) / sigma between computed steps; rounding alone makes it about
1e-7. It shows that the cache does what it says on the family, not how good the images of a trained model are.

{rows}

Largest difference: {largest:.0e}. Written by `python -m tests.comfyui.families_table`.
"""
COLUMNS = (
    "Family",
    "Model class",
    "Network",
    "Sampling type",
    "Parameters of the tiny model",
    "Apply Cache reuses",
    "Computed / reused",
    "Difference",
)


def row(name: str, found: dict) -> str:
    cells = (
        name,
        found["model"],
        found["network"],
        found["sampling"],
        f"{found['parameters']:,}",
        REUSED[found["tier"]],
        f"{found['computed']} / {found['reused']}",
        f"{found['error']:.0e}",
    )
    return line(cells)


def line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def table(results: dict[str, dict], version: str) -> str:
    failed = [name for name, found in results.items() if "failed" in found]
    if failed:
        raise SystemExit(f"no table: {', '.join(failed)} failed")
    present = {name: found for name, found in results.items() if "error" in found}
    some = next(iter(present.values()))
    lines = [line(COLUMNS), line("---" for _ in COLUMNS), *(row(name, found) for name, found in present.items())]
    return TEXT.format(
        steps=some["computed"] + some["reused"],
        version=version,
        rows="\n".join(lines),
        largest=max(found["error"] for found in present.values()),
    )


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
