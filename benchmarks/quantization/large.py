"""Time and memory of TAP Calibrate and Quantize on DiT-XL/2 with random weights, through the nodes in real ComfyUI:

    python -m benchmarks.quantization.large

Writes quantization-large.json after each phase, which has a process of its own, and quantization-large.md at the end;
the phases tell how far they are. With --preset the numbers are those of a preset of TAP Calibrate and Quantize.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.comfyui.inside_programs import install_pack

from .start import RESULTS, run_inside

HEAD = 72  # as in inside_large.py
PHASES = ("make", "calibrate", "W8A8", "W4A8")
TEXT = """DiT of {depth} blocks of width {width} (random weights, {model:.2f} GiB in float32), 256 px, {threads} threads
of {machine}, ComfyUI {comfyui}: TAP Calibrate with {samples} samples of {trajectories} trajectories,
{steps} steps, guidance {cfg:g}, Apply Cache with interval {interval}, memory_gb {memory_gb:g}, takes {calibrate}.
"""
QUANTIZED = "Quantize takes {words} to {format}, its own model included.\n"
MADE = "Made by `python -m benchmarks.quantization.large`.\n"


def measure(options: dict[str, Any], threads: int, phases: list[str], file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as base:
        install_pack(Path(base))
        for phase in phases:
            result = run_inside("large", {**options, "phase": phase}, threads, Path(base))
            found = {**result, "phases": {**found.get("phases", {}), phase: result.pop("measured")}}
            found.pop("phase"), found.pop("measured")
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(phase, found["phases"][phase], file=sys.stderr, flush=True)
    return found


def words(phase: dict[str, float]) -> str:
    return f"{phase['seconds']:.0f} s and {phase['beyond'] / 2**30:.2f} GiB beyond the model"


def report(data: dict[str, Any]) -> str:
    phases = {name: words(phase) for name, phase in data["phases"].items() if phase}
    text = TEXT.format(**{**data, **phases, "model": data["phases"]["calibrate"]["model"] / 2**30})
    done = [QUANTIZED.format(words=phases[name], format=name) for name in PHASES[2:] if name in phases]
    return "".join([text, *done, f"{data.get('note', '')}\n".lstrip("\n"), MADE])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--trajectories", type=int, default=8)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cfg", type=float, default=1.5)
    parser.add_argument("--memory-gb", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--preset", default="custom", help="of both nodes, in the place of the numbers above")
    parser.add_argument("--phases", type=lambda text: text.split(","), default=list(PHASES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = vars(parser.parse_args())
    if options["width"] % HEAD:
        parser.error(f"--width must be a multiple of {HEAD}, the width of a head, got {options['width']}")
    out, threads, phases = options.pop("out"), options.pop("threads"), options.pop("phases")
    data = measure(options, threads, phases, out / "quantization-large.json")
    if "calibrate" in data["phases"]:
        (out / "quantization-large.md").write_text(report(data), encoding="utf-8")
        print(report(data))


if __name__ == "__main__":
    main()
