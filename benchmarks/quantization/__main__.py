"""Errors of quantized models by what chose their integers, with the cache on, in real ComfyUI:

    python -m benchmarks.quantization

Needs out/digits_flow.safetensors, which `python -m benchmarks.caching` trains. Writes quantization.json and
quantization.md into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from .start import RESULTS, run_inside

COLUMNS = {
    "layers": "layers, held-out inputs",
    "model": "model, held-out calls",
    "same_cache": "images, same cache",
    "no_cache": "images, no cache",
}
OTHERS = ("nearest", "GPTQ, random", "GPTQ, TAP, no cache", "GPTQ, noise", "GPTQ, TAP, biases as they are")
PAIRS = [*(("GPTQ, TAP", other) for other in OTHERS), ("nearest, corrected biases", "nearest")]
TEXT = """# Errors of quantized models by what chose their integers

Mean and standard error over {seeds} seeds of calibration and of images, {images} images each; Apply Cache with interval
{interval} ({reuse}); ComfyUI {comfyui}, float32 and eager integer kernels on CPU ({machine}, {threads} threads,
{minutes:.0f} minutes in all). All errors are relative L2 distances:

- layers: output of every quantized layer, activations in 8 bits, averaged over the layers, on at most {inputs} inputs
  of each, the same for all rows, from trajectories that no row was calibrated on;
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
format. The digits DiT draws 32 x 32 digits; the flow model is of ComfyUI's Lumina 2 class, trained on the same
digits by benchmarks/caching/flow_model.py. Made by `python -m benchmarks.quantization`.

Held-out inputs and calls are the same for all seeds: the spread of those errors is that of the calibration alone.
Differences are paired by seed, in percent of the second row's mean; "smaller" and "larger" are what a t test at 95 %
says of them.
"""


def groups(rows: list[dict]) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """(model, format) -> method -> its rows, one for each seed."""
    found: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for row in rows:
        found.setdefault((row["subject"], row["format"]), {}).setdefault(row["method"], []).append(row)
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


def report(data: dict) -> str:
    found = groups(data["rows"])
    parts = [TEXT.format(**{**data, "minutes": data["seconds"] / 60}), summary(found), ""]
    for (subject, format), methods in found.items():
        parts += [f"## {subject}, {format}", "", table(methods), "", differences(methods), ""]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flow", type=Path, default=Path("out/digits_flow.safetensors"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--reuse", default="automatic", help="what Apply Cache reuses")
    parser.add_argument("--only", default="", help="parts of 'model, format, method', separated by semicolons")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--redraw", action="store_true", help="only write quantization.md from quantization.json again")
    args = parser.parse_args()
    file = args.out / "quantization.json"
    if not args.redraw:
        options = {"seeds": args.seeds, "reuse": args.reuse, "only": args.only, "flow": str(args.flow.resolve())}
        data = run_inside("errors", options, args.threads)
        file.write_text(json.dumps(data, indent=0) + "\n", encoding="utf-8")
    data = json.loads(file.read_text(encoding="utf-8"))
    (args.out / "quantization.md").write_text(report(data), encoding="utf-8")
    print(f"wrote quantization.json and quantization.md in {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
