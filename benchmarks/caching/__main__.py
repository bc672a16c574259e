"""Everything that is measured of Apply Cache on real ComfyUI, every table and plot:

    python -m benchmarks.caching [--packs "ComfyUI-Spectrum;ComfyUI-TeaCache"] [--jobs 8]
    python -m benchmarks.caching fidelity samplers    only these parts
    python -m benchmarks.caching --redraw             tables and plots of the JSON files again

What the JSON files have is not measured again: a call goes on where an earlier one stopped, and `--anew` begins the
parts from the beginning. All parts together take some hours of one core; `fidelity`, `solution`, `samplers`,
`compensation` and `chain` share theirs out over --jobs cores, and begin nothing after --seconds. `packs` are folders
of other packs (packs.py). Writes caching*.json, .md and .png into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.comfyui.checkouts import Checkout, checkouts
from tests.comfyui.inside_programs import install_pack

from .curves import draw, report
from .flow_model import WEIGHTS

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
SCRIPTS = {
    "plans": ("plans.py",),
    "features": ("feature_forecasts.py",),
    "solution": ("solution.py",),
    "samplers": ("samplers.py",),
    "compensation": ("compensation.py",),
    "chain": ("compensation.py", "--chain"),
    "waits": ("overhead.py", "--waits"),
    "overhead": ("overhead.py",),
}
PARTS = ("fidelity", *SCRIPTS)
SHARED_OUT = (
    "solution",
    "samplers",
    "compensation",
    "chain",
)  # over cores, and their tables are made by a further call
KNOWN = {"waits": "host waits a step, on a fake device", "overhead": "pairs"}  # where a file of two parts has each


def data_of(part: str) -> Path:
    names = {"fidelity": "", "chain": "-compensation", "waits": "-overhead"}
    return RESULTS / f"caching{names.get(part, f'-{part}')}.json"


def is_measured(part: str) -> bool:
    """Of a part that is measured as a whole."""
    file = data_of(part)
    return file.is_file() and (part not in KNOWN or KNOWN[part] in json.loads(file.read_text(encoding="utf-8")))


def run(checkout: Checkout, program: str, *options: Any) -> None:
    """A program of this folder in ComfyUI's Python on one thread."""
    command = [str(part) for part in (checkout.python, HERE / program, *options)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def fidelity(args: argparse.Namespace, checkout: Checkout, base: Path) -> None:
    if not args.redraw:
        folders = ";".join(str(Path(folder).resolve()) for folder in args.packs.split(";") if folder)
        options = ("--seeds", args.seeds, "--only", args.only, "--packs", folders)
        run(checkout, "fidelity.py", checkout.path, base, args.flow.resolve(), *options, *pieces(args))
    rows = json.loads(data_of("fidelity").read_text(encoding="utf-8"))
    data_of("fidelity").with_suffix(".md").write_text(report(rows, checkout.name), encoding="utf-8")
    draw(rows, data_of("fidelity").with_suffix(".png"))


def pieces(args: argparse.Namespace) -> tuple:
    return "--jobs", args.jobs, "--seconds", args.seconds


def others(part: str, args: argparse.Namespace, checkout: Checkout, base: Path) -> None:
    program, *options = SCRIPTS[part]
    if part in SHARED_OUT:
        if not args.redraw:
            options += ["--only", args.only]
            run(checkout, program, checkout.path, base, args.flow.resolve(), *options, *pieces(args))
        run(checkout, program, "--report")
    elif not args.redraw and not is_measured(part):
        run(checkout, program, checkout.path, base, *flow_for(part, args.flow), *options)


def flow_for(part: str, flow: Path) -> Sequence[Path]:
    return () if part in ("waits", "overhead") else (flow.resolve(),)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--flow", type=Path, default=WEIGHTS, help="a model that flow_model.py trained")
    parser.add_argument("--packs", default="", help="folders of other packs, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=1, help="of 16 images each, of fidelity")
    parser.add_argument("--only", default="", help="parts of the models' names, with semicolons between")
    parser.add_argument("--jobs", type=int, default=1, help="cores that a part is shared out over")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of each part, after which nothing begins")
    parser.add_argument("--anew", action="store_true", help="measure again what the JSON files have")
    parser.add_argument("--redraw", action="store_true", help="only write tables and plots of the JSON files again")
    args = parser.parse_args()
    unknown = set(args.parts) - {*PARTS}
    if unknown:
        parser.error(f"unknown part {min(unknown)}; expected some of {', '.join(PARTS)}")
    checkout = checkouts()[0]
    for part in (args.parts or PARTS) if args.anew else ():
        data_of(part).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as base:
        install_pack(Path(base))
        for part in args.parts or PARTS:
            if part == "fidelity":
                fidelity(args, checkout, Path(base))
            else:
                others(part, args, checkout, Path(base))


if __name__ == "__main__":
    main()
