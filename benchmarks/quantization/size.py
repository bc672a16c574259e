"""Memory and time of Quantize on a model of more than two billion parameters, through the node in real ComfyUI:

    python -m benchmarks.quantization.size

The model is FLUX.1's network in its published width with fewer blocks and random weights in bfloat16. All layers are
quantized to W8A8 without a calibration; with one, the first block of each kind to W4A8 with gptq, which tells the
seconds of every layer. Writes quantization-size.json after each phase and quantization-size.md at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from tests.comfyui.inside_programs import install_pack

from .start import RESULTS, run_inside

PHASES = ("make", "W8A8", "W4A8")
TEXT = """# Quantize on {billions:.2f} billion parameters

`python -m benchmarks.quantization.size`: FLUX.1's network in its published width (3072) with {double} of 19 double
and {single} of 38 single blocks, random weights in bfloat16 ({model:.2f} GiB), {threads} threads of {machine},
ComfyUI {comfyui}. One run.

- W8A8, rounded to nearest, the whole model: {W8A8[seconds]:.0f} s, at most {W8A8[peak]:.1f} GiB in memory, the source
  included. All 57 blocks of FLUX.1 (12 billion parameters) take {W8A8[whole]:.0f} min by these seconds of a layer.
"""
GPTQ = """- W4A8 with gptq, the first block of each kind, after TAP Calibrate ({W4A8[calibrating]:.0f} s): at most
  {W4A8[peak]:.1f} GiB. All 57 blocks take {W4A8[whole]:.0f} min.
"""
HEADINGS = {"W8A8": "W8A8 nearest, s", "W4A8": "W4A8 gptq, s"}


def measure(options: dict[str, Any], threads: int, file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as base:
        install_pack(Path(base))
        Path(base, "models", "diffusion_models").mkdir(parents=True)
        for phase in PHASES:
            result = run_inside("size", {**options, "phase": phase}, threads, Path(base))
            found = {**result, "phases": {**found.get("phases", {}), phase: result.pop("measured")}}
            found.pop("phase"), found.pop("measured")
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(phase, found["phases"][phase], file=sys.stderr, flush=True)
    return found


def by_class(layers: dict[str, float]) -> dict[str, float]:
    """Mean seconds of the layers of the same place in a block: double_blocks.img_mlp.0 of double_blocks.3.img_mlp.0."""
    classes = defaultdict(list)
    for name, seconds in layers.items():
        kind, _, rest = name.split(".", 2)
        classes[f"{kind}.{rest}"].append(seconds)
    return {name: mean(seconds) for name, seconds in classes.items()}


def report(data: dict[str, Any]) -> str:
    phases = {}
    for name in (name for name in PHASES[1:] if name in data["phases"]):
        phase, layers = data["phases"][name], by_class(data["phases"][name]["layers"])
        whole = sum(seconds * data["whole"][layer.split(".")[0]] for layer, seconds in layers.items())
        phases[name] = {**phase, "peak": phase["peak"] / 2**30, "layers": layers, "whole": whole / 60}
    billions = data["phases"]["make"]["parameters"] / 1e9
    model = data["phases"]["W8A8"]["model"] / 2**30
    text = TEXT.format(**{**data, **phases, "billions": billions, "model": model})
    text += GPTQ.format(**phases) if "W4A8" in phases else ""
    text += f"\n{data['note']}\n" if "note" in data else ""
    lines = [f"| layer | {' | '.join(HEADINGS[name] for name in phases)} |", "|---" * (len(phases) + 1) + "|"]
    for layer in phases["W8A8"]["layers"]:
        lines.append(f"| {layer} | {' | '.join(format(phases[name]['layers'][layer], '.1f') for name in phases)} |")
    return text + "\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--double", type=int, default=3)
    parser.add_argument("--single", type=int, default=7)
    parser.add_argument("--memory-gb", type=float, default=1.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = vars(parser.parse_args())
    out, threads = options.pop("out"), options.pop("threads")
    data = measure(options, threads, out / "quantization-size.json")
    (out / "quantization-size.md").write_text(report(data), encoding="utf-8")
    print(report(data))


if __name__ == "__main__":
    main()
