"""Times of the presets of TAP Calibrate and Quantize on a DiT with random weights, through the nodes in real ComfyUI:

    python -m benchmarks.quantization.presets

Presets that quantization-presets.json has are not measured again. Writes it after each, and quantization-presets.md at
the end, into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from qandc_core.calibration.presets import EFFORTS

from .large import HEAD, measure
from .start import RESULTS

PHASES = ["make", "calibrate", "W8A8", "W4A8"]
TEXT = """# Time of the presets

A DiT of {depth} blocks of width {width} (random weights, float32, 256 tokens an image), {threads} thread of {machine},
ComfyUI {comfyui}; {steps} steps, guidance {cfg:g}, Apply Cache with interval {interval}. One run, one preset after the
other; seconds are of the processor, so that others on the machine do not count. Quantize has its preset too and
measures the model's error on the held-out calls of that preset's calibration, so errors of two presets do not compare.
Made by `python -m benchmarks.quantization.presets`.

{rows}
"""
HEADINGS = ("preset", "TAP Calibrate, s", "Quantize to W8A8, s", "Quantize to W4A8, s", "times standard", "error, W4A8")


def report(data: dict[str, dict[str, Any]]) -> str:
    seconds = {name: [found["phases"][phase]["cpu"] for phase in PHASES[1:]] for name, found in data.items()}
    standard = sum(seconds["standard"])
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    for name, parts in seconds.items():
        words = data[name]["phases"]["W4A8"]["report"].split("error of the whole model ")[1].split(" on ")[0]
        cells = (name, *(f"{part:.0f}" for part in parts), f"{sum(parts) / standard:.2f}", words)
        lines.append(f"| {' | '.join(cells)} |")
    return TEXT.format(**data["standard"], rows="\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4 * HEAD)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    file = args.out / "quantization-presets.json"
    data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    shape = {"width": args.width, "depth": args.depth}
    numbers = {"samples": 400, "trajectories": 32, "steps": 20, "cfg": 1.5, "memory_gb": 4.0}  # a preset sets others
    for preset in EFFORTS:
        if preset not in data:
            with tempfile.TemporaryDirectory() as folder:
                options = {**shape, **numbers, "preset": preset}
                data[preset] = measure(options, args.threads, PHASES, Path(folder, "found.json"))
            file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            print(preset, file=sys.stderr, flush=True)
    (args.out / "quantization-presets.md").write_text(report(data), encoding="utf-8")


if __name__ == "__main__":
    main()
