"""LoRAs on quantized models against LoRAs that were baked in before quantizing, in real ComfyUI:

    python -m benchmarks.quantization.lora --kitchen FOLDER

FOLDER holds a comfy-kitchen with W6A8 (0.2.36 or newer); without it W6A8 is left out. Seeds that quantization-lora.json
has are not measured again. Writes quantization-lora.json and quantization-lora.md into benchmarks/results.
"""

from __future__ import annotations

from typing import Any

from .__main__ import mean_and_error
from .seeds import groups, measured

BAKED = "baked in before"
COLUMNS = ("model", "images")
TEXT = """# LoRAs after Quantize against LoRAs baked in before

Relative L2 errors against full precision with the same LoRA: of the model's predictions on {calls} held-out calls, and
of {images} images. Every seed is another random LoRA of rank {rank} on all quantized layers, of 0.3 of each weight's
norm, and other noise. Weights are rounded to nearest. "Ratio" is to the row "{baked}", paired by seed; mean
and standard error. "As a whole matrix" is the same change without its factors, as of merged models; "core alone" is
ComfyUI's own patcher on the same layers, which decodes the weight, adds the LoRA and rounds the sum again. ComfyUI
{comfyui}, comfy-kitchen {kitchen}, eager kernels on CPU ({machine}). The models are those of
[quantization.md](quantization.md). Made by `python -m benchmarks.quantization.lora`.
"""


def report(data: dict[str, Any]) -> str:
    parts = [TEXT.format(**data, baked=BAKED)]
    for subject in dict.fromkeys(run["subject"] for run in data["runs"]):
        methods = groups(data, subject)
        lines = [f"## {subject}, {len(next(iter(methods.values())))} seeds", ""]
        lines += ["| | model | ratio | images | ratio |", "|---|---:|---:|---:|---:|"]
        for name, rows in methods.items():
            baked = methods[", ".join([*name.split(", ")[:2], BAKED])]
            cells = []
            for column in COLUMNS:
                cells.append("{:.5f} +- {:.5f}".format(*mean_and_error([row[column] for row in rows])))
                ratios = [row[column] / other[column] for row, other in zip(rows, baked)]
                cells.append("" if rows is baked else "{:.2f} +- {:.2f}".format(*mean_and_error(ratios)))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        parts += ["\n".join(lines), ""]
    return "\n".join(parts)


def main() -> None:
    measured("lora", "quantization-lora", report, __doc__)


if __name__ == "__main__":
    main()
