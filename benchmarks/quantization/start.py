"""Starts the programs inside_*.py in a ComfyUI checkout's own Python, with the pack as its only custom node."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from qandc_core.evaluation.experiment import cpu_name
from tests.comfyui.checkouts import Checkout, checkouts
from tests.comfyui.inside_programs import PROGRAMS, install_pack

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"


def run_inside(
    program: str, options: dict[str, Any], threads: int, base: Path | None = None, kitchen: Path | None = None
) -> dict[str, Any]:
    """What inside_<program>.py makes of the options; `base` is a ComfyUI base directory with the pack in it, `kitchen`
    a folder with a comfy-kitchen to use instead of the installed one.
    """
    if base is None:
        with tempfile.TemporaryDirectory() as made:
            install_pack(Path(made))
            return run_inside(program, options, threads, Path(made), kitchen)
    checkout = checkouts()[0]
    found = results_of(HERE / f"inside_{program}.py", checkout, base, options, threads, kitchen)
    kept = {key: value for key, value in options.items() if key != "flow"}  # a path of this machine
    return {"comfyui": checkout.name, "machine": cpu_name(), "threads": threads, **kept, **found}


def results_of(
    program: Path, checkout: Checkout, base: Path, options: dict[str, Any], threads: int, kitchen: Path | None = None,
    **environment: str,
) -> dict[str, Any]:  # fmt: skip
    """What a program prints, run by the checkout's Python with the helpers of all benchmarks at hand."""
    folders = [*([kitchen] if kitchen else []), program.parent, HERE, HERE.parent / "caching", PROGRAMS]
    environment |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [checkout.python, program, checkout.path, base, json.dumps(options)]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))
