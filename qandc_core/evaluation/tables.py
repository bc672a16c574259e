"""Markdown and plots from a result file of the experiment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    ("FD", "frechet_distance", "{:.2f}"),
    ("sFD", "spatial_frechet_distance", "{:.2f}"),
    ("IS", "inception_score", "{:.2f}"),
    ("accuracy %", "class_accuracy", "{:.1f}"),
    ("precision", "precision", "{:.3f}"),
    ("recall", "recall", "{:.3f}"),
    ("PSNR dB", "psnr", "{:.2f}"),
    ("relative L2", "relative_l2", "{:.4f}"),
)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def cell(value: dict[str, float | None], pattern: str) -> str:
    mean, error = value["mean"], value["standard_error"]
    text = pattern.format(mean)
    return text if error is None else f"{text} +- {pattern.format(error)}"


def metrics_table(rows: list[dict[str, Any]], timing: dict[str, dict[str, float]] | None = None) -> str:
    """One line for each row, mean +- standard error over seeds; fidelity is left out for the reference itself."""
    columns = [c for c in COLUMNS if any(c[1] in row["metrics"] for row in rows)]
    head = ["", *(name for name, _, _ in columns)] + (["seconds", "speedup (range)"] if timing else [])
    lines = []
    for row in rows:
        metrics, same = row["metrics"], row["metrics"]["relative_l2"]["mean"] == 0
        cells = [
            "-" if same and key in ("psnr", "relative_l2") else cell(metrics[key], pattern)
            for _, key, pattern in columns
        ]
        if timing:
            t = timing[row["name"]]
            cells += [f"{t['seconds']:.2f}", f"{t['speedup']:.2f}x ({t['speedup_low']:.2f}-{t['speedup_high']:.2f})"]
        lines.append([row["name"], *cells])
    return markdown_table(head, lines)


def factor_table(rows: list[dict[str, Any]]) -> str:
    return metrics_table([{**row, "name": f"{row['group']}: {row['name']}"} for row in rows])


def differences_table(differences: list[dict[str, Any]]) -> str:
    """One line for each pair of rows: mean and 95 % interval."""
    columns = [c for c in COLUMNS if any(c[1] in pair["metrics"] for pair in differences)]
    rows = []
    for pair in differences:
        cells = [between(pair["metrics"].get(key), pattern) for _, key, pattern in columns]
        rows.append([f"{pair['row']} - {pair['minus']}", *cells])
    return markdown_table(["", *(name for name, _, _ in columns)], rows)


def between(value: dict[str, float] | None, pattern: str) -> str:
    if value is None:
        return "-"
    mean, low, high = (pattern.format(value[key]) for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    setup = result["setup"]
    errors = "over the seeds" if len(setup["seeds"]) > 1 else "over the images, where one seed has them"
    parts = [
        "# Ablation",
        f"`{result['command']}`",
        f"{setup['hardware']['device']}, {workers(setup)}, torch {setup['hardware']['torch']}. "
        f"Model {setup['model']}, {setup['sampler']} {setup['steps']} steps, guidance {setup['cfg_scale']}, "
        f"{setup['images']} images, seeds {', '.join(map(str, setup['seeds']))}; errors are standard errors {errors}. "
        f"Time: batch of {setup['time_batch']}, median of {setup['time_repeats']} interleaved runs.",
    ]
    if result.get("floor"):
        parts.append(
            f"FD of {result['floor']['images']} real images from the reference: {result['floor']['mean']:.2f} "
            f"+- {result['floor']['standard_error']:.2f}."
        )
    if result.get("main"):
        parts += [
            metrics_table(result["main"]["rows"], result["main"]["timing"]),
            "## Differences from the same noise",
            "Mean and 95 % interval of Student's t: over all images for accuracy, PSNR and relative L2, over the seeds "
            "for the others.",
            differences_table(result["main"]["differences"]),
        ]
    if result.get("factors"):
        parts += [
            "## Other factors, one at a time",
            f"{setup['factor_images']} images, one seed; errors over the images.",
            factor_table(result["factors"]),
        ]
    return "\n\n".join(parts) + "\n"


def workers(setup: dict[str, Any]) -> str:
    """Threads of a process, and the processes where there are several; one of them measures the time."""
    threads, processes = setup["hardware"]["threads"], setup.get("processes", 1)
    each = f"{threads} thread{'s' * (threads > 1)}"
    return each if processes == 1 else f"{processes} processes of {each}, of which one is timed"


def plot_main(result: dict[str, Any], path: Path) -> None:
    """Speedup against Frechet distance for the main rows, and the compensation factors over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, timing = result["main"]["rows"], result["main"]["timing"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    for row in rows:
        score, speed = row["metrics"]["frechet_distance"], timing[row["name"]]["speedup"]
        left.errorbar(speed, score["mean"], yerr=score["standard_error"] or 0, fmt="o", capsize=3, label=row["name"])
    left.set(xlabel="measured speedup", ylabel="Frechet distance (lower is better)", title="Quality against time")
    left.legend(fontsize=8)
    for row in rows:
        if row["factors"]:
            right.plot([sum(k) / len(k) for k in row["factors"]], label=row["name"])
    right.set(xlabel="step", ylabel="K, mean over channels", title="Variance compensation")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
