"""Seconds to round layers of FLUX.1's shapes by GPTQ, and what they come to for whole models:

    python -m benchmarks.quantization.layer_times

Random weights and inputs; every shape is measured in every format, one layer each. What quantization-layers.json has is
not measured again. Writes it and quantization-layers.md after each layer into benchmarks/results; "-" is not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qandc_core.calibration.statistics import LayerStatistics
from qandc_core.evaluation.experiment import cpu_name
from qandc_core.quantization.native import NativeConfig, quantize_weight

RESULTS = Path(__file__).parents[1] / "results"
WIDTH, TOKENS, HELD_OUT = 3072, 4096, 256  # tokens kept of a layer by the preset standard
# Layers of a double and of a single block, (N, K)
DOUBLE = 2 * [(6 * WIDTH, WIDTH), (3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
SINGLE = [(7 * WIDTH, WIDTH), (WIDTH, 5 * WIDTH), (3 * WIDTH, WIDTH)]
MODELS = {"2.07 billion (3 double and 7 single blocks)": (3, 7), "12 billion (19 and 38, FLUX.1)": (19, 38)}
CASES = {"W8A8, nearest": ("W8A8", "nearest"), "W8A8, GPTQ": ("W8A8", "gptq"), "W4A8, GPTQ": ("W4A8", "gptq")}
TEXT = """# Seconds to round a layer

Layers of FLUX.1's shapes, random weights in bfloat16, {tokens} tokens of random inputs kept for X^T X and {held_out}
held out, float32, one thread of {machine}; torch {torch}, comfy-kitchen {kitchen}. One layer each, with X^T X and
its factor made for it; seconds of the processor. Made by `python -m benchmarks.quantization.layer_times`.

{rows}

Extrapolated from these seconds to all layers of the blocks, without loading the model, measuring its error and the
time that layers of the same inputs save (query, key and value are one layer in FLUX.1):

{sums}
"""


def seconds(outputs: int, inputs: int, format: str, rounding: str) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(outputs, inputs, dtype=torch.bfloat16).uniform_(-0.02, 0.02, generator=generator)
    statistics = LayerStatistics.empty(inputs, inputs=TOKENS, held_out=HELD_OUT)
    x = torch.randn(TOKENS, inputs, generator=generator)
    statistics.update(x)
    statistics.keep_inputs(x)
    statistics.keep_held_out(x[:HELD_OUT])
    begun = time.process_time()
    quantize_weight("layer", weight, None, NativeConfig(format, rounding), statistics)
    return time.process_time() - begun


def key(shape: tuple[int, int], case: str) -> str:
    return f"{shape[0]} x {shape[1]}, {case}"


def report(data: dict[str, Any]) -> str:
    shapes, found = list(dict.fromkeys(DOUBLE + SINGLE)), data["seconds"]
    lines = [f"| outputs x inputs | {' | '.join(CASES)} |", "|---|" + "---:|" * len(CASES)]
    for shape in shapes:
        cells = (f"{found[name]:.1f}" if (name := key(shape, case)) in found else "-" for case in CASES)
        lines.append(f"| {shape[0]} x {shape[1]} | {' | '.join(cells)} |")
    sums = [f"| parameters | {' | '.join(f'{case}, min' for case in CASES)} |", "|---|" + "---:|" * len(CASES)]
    for name, (double, single) in MODELS.items():
        layers = double * DOUBLE + single * SINGLE
        seconds = {case: [found.get(key(shape, case), math.nan) for shape in layers] for case in CASES}
        totals = (sum(parts) / 60 for parts in seconds.values())
        sums.append(f"| {name} | {' | '.join('-' if math.isnan(total) else f'{total:.0f}' for total in totals)} |")
    return TEXT.format(**data, rows="\n".join(lines), sums="\n".join(sums))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.out / "quantization-layers.json"
    data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    data |= {
        "machine": cpu_name(), "torch": torch.__version__, "tokens": TOKENS,
        "held_out": HELD_OUT, "kitchen": version("comfy-kitchen"), "seconds": data.get("seconds", {}),
    }  # fmt: skip
    for shape in dict.fromkeys(DOUBLE + SINGLE):
        for case, options in CASES.items():
            if key(shape, case) not in data["seconds"]:
                data["seconds"][key(shape, case)] = seconds(*shape, *options)
                file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
                (args.out / "quantization-layers.md").write_text(report(data), encoding="utf-8")
                print(key(shape, case), f"{data['seconds'][key(shape, case)]:.1f}", flush=True)


if __name__ == "__main__":
    main()
