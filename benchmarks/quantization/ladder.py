"""Formats mixed for the model's error against single widths of as many bytes, in real ComfyUI:

    python -m benchmarks.quantization.ladder --kitchen FOLDER

FOLDER holds a comfy-kitchen with W6A8 (0.2.36 or newer), such as an unpacked wheel. Seeds that quantization-ladder.json
has are not measured again. Writes quantization-ladder.json and quantization-ladder.md into benchmarks/results.
"""

from __future__ import annotations

import statistics
from typing import Any

from .__main__ import difference, mean_and_error
from .seeds import SUBJECTS, groups, measured

SINGLE = ("W6A8", "W8A8")
TEXT = """# A ladder of formats against single widths

Relative L2 error of the whole model's prediction on {calls} calls that neither the calibration nor the choice of
formats has seen; mean and standard error over seeds of calibration. Codes by GPTQ on 128 samples of 32
trajectories. The ladder starts every layer at W4A8 and gives W6A8, W8A8 or float to those that take most of the model's
error away for their bytes, by shares of that error measured on 3 of 8 other held-out calls; "without shares" it looks
at each layer's own error alone. "MiB" are of all quantized layers. ComfyUI {comfyui}, comfy-kitchen {kitchen}, eager
kernels on CPU ({machine}), a shared machine: seconds are rough. The models are those of
[quantization.md](quantization.md). Made by `python -m benchmarks.quantization.ladder`.
"""


def formats(rows: list[dict[str, Any]]) -> str:
    """Layers in each format, on average over the seeds."""
    names = dict.fromkeys(name for row in rows for name in row["layers"])
    return ", ".join(f"{statistics.mean(row['layers'].get(name, 0) for row in rows):.0f} {name}" for name in names)


def table(methods: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| | MiB | error | layers | s |", "|---|---:|---:|---|---:|"]
    for name, rows in methods.items():
        size = statistics.mean(row["bytes"] for row in rows) / 2**20
        error = "{:.5f} +- {:.5f}".format(*mean_and_error([row["error"] for row in rows]))
        seconds = statistics.mean(row["seconds"] for row in rows)
        lines.append(f"| {name} | {size:.3f} | {error} | {formats(rows)} | {seconds:.0f} |")
    return "\n".join(lines)


def differences(methods: dict[str, list[dict[str, Any]]]) -> str:
    """Paired by seed."""
    lines = []
    for single in SINGLE:
        for other in (single, f"ladder without shares, bytes of {single}"):
            pair = (f"ladder, bytes of {single}", other)
            lines.append(
                f"- {' - '.join(pair)}: " + "{:+.1f} +- {:.1f} %, {}".format(*difference(methods, pair, "error"))
            )
    pair = ("ladder, error of W6A8", "W6A8")
    lines.append(
        f"- bytes, {' - '.join(pair)}: " + "{:+.1f} +- {:.1f} %, {}".format(*difference(methods, pair, "bytes"))
    )
    return "\n".join(lines)


def report(data: dict[str, Any]) -> str:
    parts = [TEXT.format(**data)]
    for subject in SUBJECTS:
        methods = groups(data, subject)
        if methods:
            seeds = len({run["seed"] for run in data["runs"] if run["subject"] == subject})
            parts += [
                f"## {subject}, {seeds} seeds",
                "",
                table(methods),
                "",
                "Paired by seed:",
                "",
                differences(methods),
                "",
            ]
    return "\n".join(parts)


if __name__ == "__main__":
    measured("ladder", "quantization-ladder", report, __doc__)
