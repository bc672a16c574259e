"""What it costs to quantize the modulation layers (adaLN), a third of a DiT's weights, on the built-in model:

    python -m benchmarks.quantization.modulation

Writes quantization-modulation.json and quantization-modulation.md into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.speed.work import step_weight_bytes, step_work
from qandc_core import CalibrationConfig, DiT, DiTTrajectories, SamplingConfig, calibrate, fuse_dit, generate, load_dit
from qandc_core.calibration.statistics import LayerStatistics
from qandc_core.demo import CLASS_NAMES
from qandc_core.evaluation.experiment import hardware
from qandc_core.models.layers import DIT_SKIP, named_linears
from qandc_core.models.presets import preset
from qandc_core.numerics import relative_error
from qandc_core.quantization.model import NATIVE_SKIP
from qandc_core.quantization.native import NativeConfig, NativeLayer, quantize_weight

RESULTS = Path(__file__).parents[1] / "results"
KEPT = {"float": DIT_SKIP, "quantized": NATIVE_SKIP}
FORMATS = ("W8A8", "W4A8")
STEPS, CFG, IMAGES, SEED = 50, 2.0, 16, 1000
CALIBRATED = range(0, len(CLASS_NAMES), 4)  # classes
TEXT = """# Quantizing the modulation layers

Relative L2 distance of the images to full precision's, built-in model, DDIM {steps} steps, guidance {cfg}, {seeds}
seeds x {images} images, mean and standard error; "difference" is paired by seed, quantized against float modulations.
"DiT-XL/2" is the size of all linear weights against bfloat16. {device}, {threads} threads. Made by
`python -m benchmarks.quantization.modulation`.

| | modulations float | quantized | difference | DiT-XL/2, float | quantized |
|---|---|---|---|---|---|
"""


def calibrated(model: DiT, seed: int) -> dict[str, LayerStatistics]:
    """X^T X of every layer over all of a run of every fourth class."""
    runs = DiTTrajectories(model, CALIBRATED, SamplingConfig(STEPS, CFG, "ddim"), skip_patterns=NATIVE_SKIP)
    everything = CalibrationConfig(
        len(CALIBRATED), len(CALIBRATED), samples=len(CALIBRATED) * STEPS, selection="random", seed=seed, held_out=0
    )
    return calibrate(runs, everything).statistics


def quantized(
    model: DiT, format: str, kept: tuple[str, ...], found: dict[str, LayerStatistics] | None
) -> dict[str, NativeLayer | None]:
    config = NativeConfig(format, "nearest" if found is None else "gptq")
    return {
        name: quantize_weight(name, layer.weight, layer.bias, config, None if found is None else found[name])
        for name, layer in named_linears(model, kept)
    }


def images(model: Any, seed: int) -> Tensor:
    return generate(model, [3 * i % len(CLASS_NAMES) for i in range(IMAGES)], STEPS, CFG, "ddim", seed)[0]


def measure(seeds: int) -> dict[str, Any]:
    model = load_dit("demo")
    errors: dict[str, list[float]] = {}
    for seed in range(seeds):
        full, found = images(model, seed), calibrated(model, SEED + seed)
        for format in FORMATS:
            for rounding, guide in (("nearest", None), ("gptq", found)):
                for name, kept in KEPT.items():
                    fast = fuse_dit(model, "reference", quantized(model, format, kept, guide))
                    error = relative_error(images(fast, seed), full)
                    errors.setdefault(f"{format}, {rounding}, {name}", []).append(error)
    return {"seeds": seeds, "images": IMAGES, "steps": STEPS, "cfg": CFG, **hardware(), "errors": errors}


def xl_share(format: str, modulations: bool) -> float:
    """Bytes of DiT-XL/2's linear weights against bfloat16, by arithmetic that tests hold to real layers."""
    work = step_work(preset("DiT-XL/2"), 2)
    gemms = tuple(replace(g, quantizable=g.quantizable or (modulations and "adaLN" in g.name)) for g in work.gemms)
    return step_weight_bytes(replace(work, gemms=gemms), format) / step_weight_bytes(work, "bfloat16")


def mean_error(values: list[float]) -> str:
    spread = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.4f} +- {spread:.4f}"


def report(data: dict[str, Any]) -> str:
    lines = []
    for format in FORMATS:
        for rounding in ("nearest", "gptq"):
            float_, whole = (data["errors"][f"{format}, {rounding}, {name}"] for name in KEPT)
            paired = [after - before for before, after in zip(float_, whole)]
            shares = " | ".join(f"{xl_share(format, modulations):.3f}x" for modulations in (False, True))
            means = " | ".join(map(mean_error, (float_, whole, paired)))
            lines.append(f"| {format}, {rounding} | {means} | {shares} |")
    return TEXT.format(**data) + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    data = measure(args.seeds)
    (args.out / "quantization-modulation.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (args.out / "quantization-modulation.md").write_text(report(data), encoding="utf-8")
    print(report(data))


if __name__ == "__main__":
    main()
