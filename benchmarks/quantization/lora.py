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
TEXT = """# LoRAs after Quantize against LoRAs baked in before

Relative L2 error of the model's predictions on {calls} held-out calls against full precision with the same LoRA. Every
seed is another random LoRA of rank {rank} on all quantized layers, of {size} of each weight's norm. Weights are rounded
to nearest. "Ratio" is to the row "{baked}", paired by seed; mean and standard error. "As a whole matrix" is the same
change without its factors, as of merged models; "core alone" is ComfyUI's own patcher on the same layers, which decodes
the weight, adds the LoRA and rounds the sum again. ComfyUI {comfyui}, comfy-kitchen {kitchen}, eager kernels on CPU
({machine}). The models are those of [quantization.md](quantization.md). Made by
`python -m benchmarks.quantization.lora`.
"""


def report(data: dict[str, Any]) -> str:
    parts = [TEXT.format(**data, baked=BAKED)]
    for subject in dict.fromkeys(run["subject"] for run in data["runs"]):
        methods = groups(data, subject)
        lines = [f"## {subject}", ""]
        lines += ["| | seeds | error | ratio |", "|---|---:|---:|---:|"]
        for name, rows in methods.items():
            baked = methods[f"{name.split(', ')[0]}, {BAKED}"]
            error = "{:.5f} +- {:.5f}".format(*mean_and_error([row["model"] for row in rows]))
            ratios = [row["model"] / other["model"] for row, other in zip(rows, baked)]
            ratio = "" if rows is baked else "{:.3f} +- {:.3f}".format(*mean_and_error(ratios))
            lines.append(f"| {name} | {len(rows)} | {error} | {ratio} |")
        parts += ["\n".join(lines), ""]
    return "\n".join(parts)


def main() -> None:
    measured("lora", "quantization-lora", report, __doc__)


if __name__ == "__main__":
    main()
