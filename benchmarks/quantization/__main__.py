"""Errors of quantized models by what chose their integers, with the cache on, in real ComfyUI:

    python -m benchmarks.quantization

Seeds that quantization.json has are not measured again. Writes quantization.json and quantization.md into
benchmarks/results.
"""

from __future__ import annotations

import statistics
from typing import Any

from .seeds import measured

COLUMNS = {
    "layers": "layers, held-out inputs",
    "model": "model, held-out calls",
    "same_cache": "images, same cache",
    "no_cache": "images, no cache",
}
OTHERS = ("nearest", "GPTQ, random", "GPTQ, TAP, no cache", "GPTQ, noise", "GPTQ, TAP, biases as they are")
PAIRS = [*(("GPTQ, TAP", other) for other in OTHERS), ("nearest, corrected biases", "nearest")]
TEXT = """# Errors of quantized models by what chose their integers

Mean and standard error over seeds of calibration and of images, {images} images each; Apply Cache with interval
{interval}; ComfyUI {comfyui}, comfy-kitchen {kitchen}, float32 and eager integer kernels on CPU ({machine}). All
errors are relative L2 distances:

- layers: output of every quantized layer, activations in 8 bits, averaged over the layers, on inputs that are the same
  for all rows, from trajectories that no row was calibrated on;
- model: prediction of the whole model, on {calls} calls of those trajectories;
- images, same cache: against full precision with the same cache and noise, which leaves the loss of quantization;
- images, no cache: against full precision without a cache, which is the loss of both.

GPTQ is calibrated on {samples} samples of {trajectories} trajectories with the cache on, drawn from the steps that
it computes. Exceptions: "no cache" is calibrated without it, on samples of all steps; "noise" is {noise} standard
normal inputs for each layer, as converters use them. GPTQ corrects biases by the mean inputs that it was calibrated on.
"Nearest" is what nodes do that quantize in the graph without a calibration: the same layers, formats, ConvRot and
bytes, with comfy-kitchen's own quantizer in W4A8; in W8A8 the scales of rows were searched, which makes the error of
the weights no larger.
"Paper" has static activation scales, calibrated like "GPTQ, TAP", and rounds to nearest. No layer is kept in a finer
format. The built-in model is a DiT that draws 32 x 32 pictures (guidance 2); the flow model is of ComfyUI's Lumina 2
class (guidance 1.5), trained on the same drawings by benchmarks/caching/flow_model.py. Made by
`python -m benchmarks.quantization`.

Held-out inputs and calls are the same for all seeds: the spread of those errors is that of the calibration alone.
Differences are paired by seed, in percent of the second row's mean; "smaller" and "larger" are what a t test at 95 %
says of them.
"""


def groups(data: dict[str, Any]) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """(model, format) -> method -> its rows, one for each seed."""
    found: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for run in sorted(data["runs"], key=lambda run: (run["subject"], run["seed"])):
        for row in run["rows"]:
            found.setdefault((run["subject"], row["format"]), {}).setdefault(row["method"], []).append(row)
    return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def shown(values: list[float]) -> str:
    return "{:.5f} +- {:.5f}".format(*mean_and_error(values))


def table(methods: dict[str, list[dict]]) -> str:
    lines = ["| method | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for method, rows in methods.items():
        cells = [shown([row[column] for row in rows]) for column in COLUMNS]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(methods: dict[str, list[dict]], pair: tuple[str, str], column: str) -> tuple[float, float, str]:
    """Mean and standard error over the seeds of first - second, in percent of the second's mean, and what a paired
    t test at 95 % says of it.
    """
    from scipy.stats import t

    first, second = ([row[column] for row in methods[name]] for name in pair)
    parts = [100 * (a - b) / statistics.mean(second) for a, b in zip(first, second)]
    mean, error = mean_and_error(parts)
    if len(parts) < 2:
        return mean, error, "one seed"
    if abs(mean) <= t.ppf(0.975, len(parts) - 1) * error:
        return mean, error, "not resolved"
    return mean, error, "smaller" if mean < 0 else "larger"


def differences(methods: dict[str, list[dict]]) -> str:
    lines = ["| paired difference | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for pair in PAIRS:
        if methods.keys() >= set(pair):
            cells = ["{:+.2f} +- {:.2f} %, {}".format(*difference(methods, pair, column)) for column in COLUMNS]
            lines.append(f"| {' - '.join(pair)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def summary(found: dict[tuple[str, str], dict[str, list[dict]]]) -> str:
    """How many of the paired differences resolve, and how many would by chance."""
    lines = []
    for pair in PAIRS:
        known = [methods for methods in found.values() if methods.keys() >= set(pair)]
        said = [difference(methods, pair, column)[2] for methods in known for column in COLUMNS]
        if said:
            lines.append(
                f"- {' against '.join(pair)}: of {len(said)} differences {said.count('smaller')} are resolved in "
                f"favour of the first and {said.count('larger')} against it; by chance {len(said) / 20:.1f} would be "
                "either."
            )
    return "\n".join(lines)


def report(data: dict[str, Any]) -> str:
    found = groups(data)
    parts = [TEXT.format(**data), summary(found), ""]
    for (subject, format), methods in found.items():
        seeds = len(next(iter(methods.values())))
        parts += [f"## {subject}, {format}, {seeds} seeds", "", table(methods), "", differences(methods), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    measured("errors", "quantization", report, __doc__, seeds=8, images=16)
