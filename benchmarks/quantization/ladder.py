"""Formats mixed for the model's error against single widths of as many bytes, in real ComfyUI:

    python -m benchmarks.quantization.ladder --kitchen FOLDER

FOLDER holds a comfy-kitchen with W6A8 (0.2.36 or newer), such as an unpacked wheel. Seeds that quantization-ladder.json
has are not measured again. Writes quantization-ladder.json and quantization-ladder.md into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from .__main__ import difference, mean_and_error
from .start import RESULTS, run_inside

SUBJECTS = ("digits DiT, ddim, 50 steps", "flow, euler, 30 steps")
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


def groups(data: dict[str, Any], subject: str) -> dict[str, list[dict[str, Any]]]:
    """Name -> its rows, one for each seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in data["runs"]:
        for row in run["rows"] if run["subject"] == subject else ():
            found.setdefault(row["name"], []).append(row)
    return found


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flow", type=Path, default=Path("out/digits_flow.safetensors"))
    parser.add_argument("--kitchen", type=Path, help="folder with comfy-kitchen 0.2.36 or newer")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", default="", help="part of a model's name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    file = args.out / "quantization-ladder.json"
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"runs": []}
    for seed in range(args.first, args.seeds):
        for subject in SUBJECTS:
            if args.only not in subject or any(
                (run["subject"], run["seed"]) == (subject, seed) for run in data["runs"]
            ):
                continue
            options = {"subject": subject, "seed": seed, "flow": str(args.flow.resolve())}
            run = run_inside("ladder", options, args.threads, kitchen=args.kitchen)
            data |= {key: run.pop(key) for key in ("comfyui", "machine", "threads", "kitchen", "calls")}
            data["runs"].append(run)
            file.write_text(json.dumps(data, indent=0) + "\n", encoding="utf-8")
            print(f"{subject}, seed {seed}", file=sys.stderr)
    (args.out / "quantization-ladder.md").write_text(report(data), encoding="utf-8")
    print(report(data))


if __name__ == "__main__":
    main()
