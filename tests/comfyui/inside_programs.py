"""Starts the programs of inside/ in a ComfyUI checkout's own Python."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests import kitchens

from .checkouts import Checkout

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = Path(__file__).with_name("inside")


def install_pack(base: Path) -> None:
    """Makes `base` a ComfyUI base directory with this pack in it."""
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "ComfyUI-QandC").symlink_to(REPOSITORY, target_is_directory=True)


def run_program(
    checkout: Checkout,
    name: str,
    base: Path,
    kitchen: Path | None = None,
    only: tuple[str, ...] = (),
    longest: float = 900,
) -> dict:
    """What the program printed within `longest` seconds: check -> value, of the checks in `only` where it names some.
    `kitchen` holds a comfy-kitchen to run with instead of the Python's or that of $QANDC_KITCHEN.
    """
    command = [checkout.python, str(PROGRAMS / f"{name}.py"), str(checkout.path), str(base), *only]
    kitchen = kitchen or kitchens.wanted()
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if kitchen is not None:
        environment["PYTHONPATH"] = str(kitchen)
    done = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True, timeout=longest)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    assert done.returncode == 0 and results, done.stderr[-4000:]
    return json.loads(results[0].removeprefix("RESULTS "))
