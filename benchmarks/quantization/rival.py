"""Quantize against quantizing without a calibration, as other nodes do, at equal bytes, in real ComfyUI:

    python -m benchmarks.quantization.rival

Seeds that quantization-rival.json has are not measured again. Writes quantization-rival.json and quantization-rival.md
into benchmarks/results.
"""

from __future__ import annotations

import statistics
from typing import Any

from .__main__ import difference, mean_and_error
from .seeds import groups, measured

PAIRS = (
    ("W8A8, GPTQ", "W8A8, nearest"),
    ("ladder, bytes of W8A8", "W8A8, nearest"),
    ("W4A8, GPTQ", "W4A8, nearest"),
)
COLUMNS = {"model": "model, held-out calls", "images": "images"}
TEXT = """# Against quantizing without a calibration, at equal bytes

"Nearest" is comfy-kitchen's own quantizer with ConvRot on the same layers: what nodes use that quantize in the graph
without a calibration. "GPTQ" and "ladder" are Quantize with a calibration of 128 samples of 32 trajectories; the
ladder mixes formats within the bytes of W8A8. Relative L2 errors against full precision: of the model's predictions on
{calls} calls that no row has seen, and of {images} images with the same noise, whose seeds change with the
calibration's. Mean and standard error over seeds; differences are paired by seed, "smaller" and "larger" are what a t
test at 95 % says of them. ComfyUI {comfyui}, comfy-kitchen {kitchen}, eager kernels on CPU ({machine}). The models are
those of [quantization.md](quantization.md). Made by `python -m benchmarks.quantization.rival`.
"""


def report(data: dict[str, Any]) -> str:
    parts = [TEXT.format(**data)]
    for subject in dict.fromkeys(run["subject"] for run in data["runs"]):
        methods = groups(data, subject)
        lines = [f"## {subject}, {len(next(iter(methods.values())))} seeds", "", "| | MiB | model | images |"]
        lines.append("|---|---:|---:|---:|")
        for name, rows in methods.items():
            size = statistics.mean(row["bytes"] for row in rows) / 2**20
            cells = ["{:.5f} +- {:.5f}".format(*mean_and_error([row[column] for row in rows])) for column in COLUMNS]
            lines.append(f"| {name} | {size:.3f} | {' | '.join(cells)} |")
        lines += ["", f"| paired difference | {' | '.join(COLUMNS.values())} |", "|---|---|---|"]
        for pair in PAIRS:
            cells = ["{:+.1f} +- {:.1f} %, {}".format(*difference(methods, pair, column)) for column in COLUMNS]
            lines.append(f"| {' - '.join(pair)} | {' | '.join(cells)} |")
        parts += ["\n".join(lines), ""]
    return "\n".join(parts)


def main() -> None:
    measured("rival", "quantization-rival", report, __doc__)


if __name__ == "__main__":
    main()
