"""The Markdown of `python -m benchmarks.comfyui`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
TEXT = """# Speed of sampling in ComfyUI

One model under KSampler's sampling (euler, simple), in one process: as it is, through the nodes of core that make
models faster, and through Quantize and Apply Cache. Rows are the nodes in the order of the graph, TorchCompileModel
before caches; EasyCache and Apply Cache have their defaults, with order 1. Every round runs all rows once, stock first
and the others in random order, from noise of its own, after each has run untimed. A compiled EasyCache is measured
beside stock alone: it would find the graphs of other rows, in which it is not.

- seconds: one run without loading the model, median and range over the rounds;
- speedup: against the stock row of the same round, median and range of the ratios;
- computed: steps for which the model ran, of all; a range where rounds differ;
- step: median seconds of a prediction that was computed, and of one that was reused;
- error: relative L2 distance of the latents to those of the stock row from the same noise, mean over images, with its
  standard error over the rounds;
- memory: the model, and in brackets with the most that a run held beyond what the process held before it, MiB;
- waits: how often the host waits for the GPU, for each step;
- first run: seconds of the first run, where it compiled; rows without one reuse the graphs of a row above.

{gpu}
Made by the command of each section.
"""
NO_GPU = "GPU: not measured.\n"
SECTION = """## {title}

{parameters:.1f} M parameters, {dtype}, batch {batch}, {steps} steps, guidance {cfg:g}, {rounds} rounds; ComfyUI
{comfyui}, torch {torch}, {machine} ({took:.0f} s in all).
{quality}
Backends of comfy-kitchen {comfy_kitchen}: {backends}.

    {command}
"""
TRAINED = "Quantize is calibrated by TAP Calibrate, with its default limit on the error of a layer."
RANDOM = (
    "The weights are random: times and memory are those of a trained model, errors say nothing of one. Quantize has\n"
    "no calibration and no limit on the error of a layer."
)
COLUMNS = (
    "",
    "seconds",
    "speedup",
    "computed",
    "step, computed",
    "step, reused",
    "error",
    "memory",
    "waits",
    "first run",
)


def spread(values: list[float], digits: str) -> str:
    """Median and range."""
    low, middle, high = (format(value, digits) for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low}-{high})"


def mean_error(values: list[float]) -> str:
    if len(values) < 2:
        return f"{statistics.mean(values):.4f}"
    return f"{statistics.mean(values):.4f} +- {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def known(row: Row, key: str) -> list[float]:
    return [found[key] for found in row["rounds"] if found[key] is not None]


def median_of(row: Row, key: str) -> str:
    values = known(row, key)
    return f"{statistics.median(values):.4g}" if values else "-"


def computed(row: Row) -> str:
    counts = sorted({found["computed"] for found in row["rounds"]})
    return f"{'-'.join(map(str, counts[:1] + counts[1:][-1:]))} of {row['steps']}"


def memory(row: Row) -> str:
    return f"{row['model_bytes'] / 2**20:.1f} ({row['peak_bytes'] / 2**20:.1f})"


def line(row: Row) -> list[str]:
    if "fails" in row:
        return [row["variant"], f"fails: {row['fails'].replace('|', '/')}", *[""] * (len(COLUMNS) - 2)]
    return [
        row["variant"],
        spread(known(row, "seconds"), ".3g"),
        spread(known(row, "speedup"), ".2f"),
        computed(row),
        median_of(row, "computed_step"),
        median_of(row, "reused_step"),
        mean_error(known(row, "error")),
        memory(row),
        "-" if row.get("waits") is None else f"{row['waits']:.1f}",
        f"{row['first_seconds']:.3g}" if row["first_graphs"] else "-",
    ]


def table(rows: list[Row]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(line, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def gathered(rows: list[Row], words: Callable[[Row], list[str]]) -> dict[str, list[str]]:
    """What is said of rows -> the rows."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for text in words(row):
            found.setdefault(text, []).append(row["variant"])
    return found


def formats(row: Row) -> list[str]:
    """Layers of a row that Quantize alone made."""
    counts = ", ".join(f"{count} in {format}" for format, count in row.get("layers", {}).items())
    if not counts or "+" in row["variant"]:
        return []
    return [f"layers: {counts}; kernels: {row['backend']}{making(row.get('made'))}"]


def making(made: dict[str, Any] | None) -> str:
    if not made or made["gpu_bytes"] is None:
        return ""
    return f"; made in {made['seconds']:.1f} s with {made['gpu_bytes'] / 2**20:.0f} MiB of the GPU's memory"


def recording(row: Row) -> list[str]:
    seconds = [found.get("writing", 0) for found in row["rounds"]]
    return [f"of the time {spread(seconds, '.2g')} s after the last step"] if max(seconds, default=0) > 0.01 else []


def remarks(row: Row) -> list[str]:
    said = list(dict.fromkeys(text for found in row["rounds"] for text in found["warnings"]))
    graphs = sum(found["graphs"] for found in row["rounds"])
    if graphs:
        said.append(f"torch.compile made {graphs} graphs in the timed rounds")
    if row.get("given_up"):
        said.append("torch.compile reached its limit of graphs for a function and runs that one as it is")
    return formats(row) + recording(row) + said


def section(run: dict[str, Any]) -> str:
    backends = ", ".join(f"{name} ({state})" for name, state in run["backends"].items())
    quality = TRAINED if run["trained"] else RANDOM
    given = {"parameters": run["parameters"] / 1e6, "backends": backends}
    notes = [f"- {', '.join(names)}: {text}" for text, names in gathered(run["rows"], remarks).items()]
    return "\n".join([SECTION.format(**{**run, **given, "quality": quality}), table(run["rows"]), "", *notes])


def report(runs: dict[str, dict[str, Any]]) -> str:
    """All runs on one device."""
    gpu = NO_GPU if all(run["device_name"] == "cpu" for run in runs.values()) else ""
    return "\n".join([TEXT.format(gpu=gpu), *(section(run) + "\n" for run in runs.values())])
