"""Formats of four bits that Quantize does not make, on the trained models, in real ComfyUI:

    python -m benchmarks.quantization.four_bits

Seeds that quantization-four-bits.json has are not measured again. Writes quantization-four-bits.json and
quantization-four-bits.md into benchmarks/results.
"""

from __future__ import annotations

from typing import Any

from .__main__ import mean_and_error
from .seeds import groups, measured

TEXT = """# Formats of four bits that Quantize does not make

convrot_w4a4 rounds weights and inputs to four bits, one scale for each row of rotated weights and for each token;
ComfyUI loads it since 0.28. awq_w4a16 keeps inputs as they are and is meant for modulation layers, groups of 64 inputs
(or the largest half of that which divides them); comfy-kitchen has its kernel, no ComfyUI up to 0.33 loads it. Relative
L2 errors against full precision: of the model's predictions on {calls} held-out calls, and of {images} images; mean and
standard error over seeds of calibration ({samples} samples of {trajectories} trajectories) and of images. The
arithmetic of the kernels is done in float32; for layers of the sizes that it takes, comfy-kitchen's convrot_w4a4
answers the same. ComfyUI {comfyui}, comfy-kitchen {kitchen}, {machine}. The models are those of
[quantization.md](quantization.md), where W4A8 and W8A8 of all layers are. Made by
`python -m benchmarks.quantization.four_bits`.
"""


def shown(values: list[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.4f}" if len(values) < 2 else f"{mean:.4f} +- {error:.4f}"


def report(data: dict[str, Any]) -> str:
    parts = [TEXT.format(**data)]
    for subject in dict.fromkeys(run["subject"] for run in data["runs"]):
        methods = groups(data, subject)
        seeds = len(next(iter(methods.values())))
        lines = [
            f"## {subject}, seeds: {seeds}",
            "",
            "| | layers | model, held-out calls | images |",
            "|---|---:|---:|---:|",
        ]
        for name, rows in methods.items():
            cells = [shown([row[column] for row in rows]) for column in ("model", "images")]
            lines.append(f"| {name} | {rows[0]['layers']} | {' | '.join(cells)} |")
        parts += ["\n".join(lines), ""]
    return "\n".join(parts)


def main() -> None:
    measured("four_bits", "quantization-four-bits", report, __doc__)


if __name__ == "__main__":
    main()
