"""Writes docs/workflows.md from the newest ComfyUI checkouts: python -m tests.comfyui.workflows_table [FOLDER]

FOLDER may hold what inside/topology_checks.py has printed, as VERSION.*.out; it is run where nothing is there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.official import recorded
from tests.official.table import section

from .checkouts import FLOOR, Checkout, checkouts
from .inside_programs import REPOSITORY, install_pack, run_program
from .server import Server

TABLE = REPOSITORY / "docs" / "workflows.md"
CELLS = ("Apply Cache", "Calibrate from Runs", "TAP Calibrate", "Quantize", "Variance Compensate", "Run Report")
COLUMNS = ("Workflow", "Sampling nodes", "Model", *CELLS)
TEXT = """# Workflows

## Every way to sample

Each row is a way in which official templates sample. ComfyUI's own node classes are called, version {version}, on tiny,
randomly filled models of its own classes, with the sampler euler. Each cell is the largest relative difference between
what our node did there and the same done by hand; rounding alone makes it about 1e-7.

- **Apply Cache**, every third step: the same workflow with Euler steps written by hand that call the model on these
  steps, and elsewhere take the line through its last two predictions. "3 of 9" are calls of the network.
- **Calibrate from Runs**: counts, bounds, means and X^T X of the layers, against what hooks saw of the samples that it
  looked into. "2 of 18" are samples, a sample being one image under one condition in one model call; the images stay
  the same, bit for bit. A workflow that samples twice was recorded into two files.
- **TAP Calibrate**, wired as the sampler node is: the same statistics of all that hooks on the layers saw while the
  sampler node itself ran. A workflow that samples twice takes two calibrations.
- **Quantize**, W8A8: every call of every quantized layer against int8 arithmetic on codes and inputs that were rotated
  and rounded by hand; and no weight lies further than half a step from its code.
- **Variance Compensate** behind Apply Cache: Euler steps by hand from samples that were given the deviation of a second
  run's, channel by channel. A workflow that samples twice takes two.
- **Run Report** behind Apply Cache: the steps, which of them were computed, the number of runs, the sizes, against the
  calls of the network and the noise levels that ComfyUI handed the sampler; times that add up to less than a watch
  around the workflow shows; the same images, bit for bit.

With each node the workflow gave the plain image again, bit for bit, when the node was gone.

{rows}

{notes}
{older}

{templates}
Written by `python -m tests.comfyui.workflows_table`.
"""
NOTES = """- DualModelGuider takes two models: Apply Cache on the first covers both; TAP Calibrate and Variance
  Compensate take the first; Calibrate from Runs and Quantize are put on each.
- Two stages, two experts and split sigmas are two runs: the cache of each begins with a computed step, so 14 steps in
  two halves compute 6 and in one run 5."""


def table(by_version: Mapping[str, dict[str, dict]], object_info: dict[str, Any]) -> str:
    """The rows of the first version, and a line on each of the others."""
    failed = [
        f"{name} on {version}"
        for version, results in by_version.items()
        for name, found in results.items()
        if "absent" not in found and not sound(found)
    ]
    if failed:
        raise SystemExit(f"no table: {', '.join(failed)} failed")
    (version, results), *others = by_version.items()
    lines = [line(COLUMNS), line("---" for _ in COLUMNS)]
    lines += [line((name, *cells(found))) for name, found in results.items() if "absent" not in found]
    return TEXT.format(
        version=version, rows="\n".join(lines), notes=NOTES,
        older="\n".join(older(*other) for other in others), templates=section(object_info, version),
    )  # fmt: skip


def older(version: str, results: dict[str, dict]) -> str:
    """How a version compares with the newest, wrapped as an entry of the list."""
    made = {name: found for name, found in results.items() if "absent" not in found}
    cells = [(found.get("absent"), found.get("error", 0.0)) for row in made.values() for found in map(row.get, CELLS)]
    lacking = [found["absent"] for found in results.values() if "absent" in found]
    lacking = [reason.removeprefix("this ComfyUI has ") for reason in (*lacking, *(r for r, _ in cells if r))]
    text = (
        f"- ComfyUI {version}: {len(made)} of {len(results)} rows, all as above; "
        f"the largest difference is {max(error for _, error in cells):.0e}."
    )
    if lacking:
        text += f" It has {', '.join(dict.fromkeys(lacking))}."
    return textwrap.fill(text, 120, subsequent_indent="  ")


def line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def cells(found: dict) -> tuple[str, ...]:
    cache, runs, tap, small, even, report = (found[name] for name in CELLS)
    samples = " + ".join(f"{chosen} of {every}" for chosen, every in runs["samples"])
    return (
        found["nodes"],
        found["family"],
        f"{sum(cache['calls'])} of {sum(cache['of'])}: {cache['error']:.0e}",
        f"{samples}: {runs['error']:.0e}",
        f"{' + '.join(map(str, tap['layers']))} layers: {tap['error']:.0e}",
        f"{small['layers']} layers: {small['error']:.0e}",
        f"{even['runs']} x: {even['error']:.0e}" if even["runs"] > 1 else f"{even['error']:.0e}",
        f"{report['steps'][0]} steps in {report['runs'][0]}: equal",
    )


def sound(found: dict) -> bool:
    """Whether every cell that this ComfyUI can have is what the text says of it."""
    return not any(problems(name, found[name]) for name in CELLS if "absent" not in found[name])


def problems(column: str, cell: dict) -> list[str]:
    """What of a cell is not as the text says, in words."""
    if "failed" in cell:
        return [cell["failed"]]
    wrong = {
        "the plain image did not come again": not cell["clean"],
        "the images are others": not cell.get("same images", True),
        "it differs from the same by hand": not cell.get("error", 0.0) < 1e-5,
        "it changes nothing": cell.get("effect", 1.0) < 1e-5,
        **SPECIAL.get(column, lambda cell: {})(cell),
    }
    return [f"{text}: {cell}" for text, holds in wrong.items() if holds]


SPECIAL: dict[str, Callable[[dict], dict[str, bool]]] = {
    "Apply Cache": lambda cell: {
        "Euler by hand is not ComfyUI's": not cell["plain"] < 1e-5,
        "another number of calls": cell["calls"] != cell["calls by hand"],
        "less than half is reused": not sum(cell["calls"]) * 2 < sum(cell["of"]),
    },
    "Calibrate from Runs": lambda cell: {
        "more than a tenth is looked into": not all(0 < n <= -(-of // 10) for n, of in cell["samples"]),
    },
    "Quantize": lambda cell: {
        "a weight is off its code": not cell["rounding"] < 0.5 + 1e-3,
        "a model's layers did not run": not min(cell["layer calls"]) > 0,
    },
    "Run Report": lambda cell: {
        "it counts otherwise": not all(cell[name][0] == cell[name][1] for name in ("steps", "calls", "runs", "size")),
        "other steps are computed": not cell["computed"],
        "the time is not the run's": not cell["seconds"],
        "it did not see the end": not cell["finished"],
    },
}


def schemas(checkout: Checkout) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as base, Server(checkout, Path(base)) as server:
        return server.object_info()


def checks(checkout: Checkout) -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as base:
        install_pack(Path(base))
        return run_program(checkout, "topology_checks", Path(base))


def printed(folder: Path, checkout: Checkout) -> dict[str, dict]:
    """What runs of the program that are over have printed."""
    lines = [line for file in sorted(folder.glob(f"{checkout.name}.*.out")) for line in file.read_text().splitlines()]
    return {
        name: found
        for line in lines
        if line.startswith("RESULTS ")
        for name, found in json.loads(line.removeprefix("RESULTS ")).items()
    }


def main() -> None:
    newest, *others = checkouts()[:3]
    if newest.version < FLOOR:
        raise SystemExit(f"ComfyUI {newest.name} is older than the oldest that the nodes support")
    known = {
        checkout: printed(Path(sys.argv[1]), checkout) if sys.argv[1:] else {}
        for checkout in (newest, *(other for other in others if other.version >= FLOOR))
    }
    found = {checkout.name: results or checks(checkout) for checkout, results in known.items()}
    object_info = schemas(newest)
    recorded.write(object_info)
    TABLE.write_text(table(found, object_info), encoding="utf-8")
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
