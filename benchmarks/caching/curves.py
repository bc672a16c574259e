"""Tables and plot of what `fidelity.py` measured: errors by computed steps, and by time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from .shared import machines

SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0)
IN_TIME = (1.5, 2.0, 3.0)
COPIED = "core EasyCache, input copied"  # drawn in the place of the other where there is one
DRAWN = {
    "fewer steps": ("0.45", "o--"),
    "interval, held": ("tab:brown", "s-"),
    "core EasyCache": ("tab:red", "v-"),
    "core LazyCache": ("tab:orange", "^-"),
    "Q&C blocks, order 1": ("tab:cyan", "d-"),
    "Q&C FORA, order 1": ("tab:purple", "d-"),
    "Q&C error budget": ("tab:green", "*-"),
    "Q&C prediction, order 0": ("tab:pink", "x-"),
    "Q&C prediction, order 1": ("tab:blue", "o-"),
    "Q&C prediction, calibrated": ("navy", "P:"),
    "Q&C prediction, calibrated, order 2": ("black", "*:"),
    "TaylorSeer, order 2": ("tab:olive", ">-"),
    "Spectrum": ("tab:gray", "<-"),
    "MagCache": ("salmon", "p-"),
    "ComfyUI-Spectrum, the pack": ("tab:gray", "<--"),
    "ComfyUI-TeaCache, the pack": ("tab:red", "h--"),
}


TEXT = """# Fidelity against computed steps

Distance of the images to those of the full run with the same noise, ComfyUI {version}, float32 on CPU
({machine}); guidance 2 for the built-in model, 1.5 for the flow model. A column is a speedup by the count of computed
steps (in brackets); between two settings of a method the error is interpolated geometrically.
"In equal time" is the same by CPU seconds of one thread, everything in them, against those of the full run; beside
other work on the machine, as here, these show an order and no factors. The
perceptual distance is that of LPIPS with all weights 1 on the convolutions of the built-in model's judge (fidelity.py);
less is better, and of PSNR more. A dash: no setting that was tried lies there.

The built-in model is a DiT that predicts the clean picture of 32 x 32 pixels; the flow model is of ComfyUI's Lumina 2
class, trained by flow_model.py on the same drawings. Nothing about Apply Cache was chosen on either. EasyCache and
LazyCache have their default start and end; in float32 EasyCache writes into the tensor that it was given on flow
models, so a second row copies its input. "Presets" are Apply Cache as it is, without a calibration.
"Calibrated" and "error budget" forecast as Apply Cache does: with order 1, and with 0 where the
sampler adds noise. FORA, TaylorSeer, HiCache, Spectrum and MagCache are written as their papers and code say
(rivals.py); "the pack" is another pack's own code in the same process (packs.py). Made by
`python -m benchmarks.caching fidelity`.
"""


def curves(rows: list[dict], subject: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["subject"] == subject:
            found.setdefault(row["method"], []).append(row)
    return found


def value_at(points: dict[float, float], at: float, near: float) -> float | None:
    """Between the two settings around it geometrically, or of one that is near; None beyond what was tried."""
    known = sorted(points.items())
    for (low, a), (high, b) in zip(known, known[1:]):
        if low <= at <= high and min(a, b) > 0:
            part = (at - low) / (high - low)
            return math.exp((1 - part) * math.log(a) + part * math.log(b))
    exact = [value for place, value in known if abs(place - at) < near]
    return exact[0] if exact else None


def computed_steps(row: dict, image: int) -> float:
    return row["calls"][image]


def seconds(row: dict, image: int) -> float:
    return row["steps"] * row["seconds"] / row["full seconds"]


def cell(settings: list[dict], at: float, measure: str, place: Callable[[dict, int], float]) -> str:
    """Mean and standard error over the images."""
    found: list[float | None] = []
    for image in range(len(settings[0]["calls"]) if measure in settings[0] else 0):
        points = {place(row, image): row[measure][image] for row in settings}
        found.append(value_at(points, at, 0.75))
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
        return "-"
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else float("nan")
    if measure == "psnr":
        return f"{statistics.mean(known):.1f} +- {error:.1f}"
    return f"{statistics.mean(known):.5f} +- {error:.5f}"


def table(rows: list[dict], subject: str) -> str:
    found, steps = curves(rows, subject), next(row["steps"] for row in rows if row["subject"] == subject)
    lines = [
        "| method | " + " | ".join(f"{s:g}x ({steps / s:.1f})" for s in SPEEDUPS) + " |",
        "|---|" + "---|" * len(SPEEDUPS),
    ]
    for method, settings in found.items():
        cells = (cell(settings, steps / s, "errors", computed_steps) for s in SPEEDUPS)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def other_table(rows: list[dict], subject: str) -> str:
    """Errors in equal time; PSNR and perceptual distance at equal computed steps."""
    found, steps = curves(rows, subject), next(row["steps"] for row in rows if row["subject"] == subject)
    heads = [f"in equal time: {s:g}x" for s in IN_TIME] + [f"PSNR, dB: {s:g}x" for s in IN_TIME[1:]]
    heads += [f"perceptual: {s:g}x" for s in IN_TIME[1:]]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for method, settings in found.items():
        if "psnr" not in settings[0]:
            continue
        cells = [cell(settings, steps / s, "errors", seconds) for s in IN_TIME]
        for measure in ("psnr", "perceptual"):
            cells += [cell(settings, steps / s, measure, computed_steps) for s in IN_TIME[1:]]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(rows: list[dict], version: str) -> str:
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    parts = [TEXT.format(version=version, machine=machines(rows))]
    for subject in subjects:
        own = [row for row in rows if row["subject"] == subject]
        count = len(own[0]["errors"])
        drawn = f"{count} images with their own noise" if count % 16 == 0 else f"{count} seeds of 16 images each"
        parts += [f"## {subject}", "", f"Mean and standard error over {drawn}.", "", table(rows, subject), ""]
        if any("psnr" in row for row in own):
            parts += [other_table(rows, subject), ""]
    return "\n".join(parts)


COLUMNS = 3


def draw(rows: list[dict], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    lines = -(-len(subjects) // COLUMNS)
    figure, grid = pyplot.subplots(lines, COLUMNS, figsize=(4.4 * COLUMNS, 4.0 * lines + 1.0), squeeze=False)
    panels = list(grid.flat)
    for panel in panels[len(subjects) :]:
        panel.remove()
    for panel, subject in zip(panels, subjects):
        found = curves(rows, subject)
        found["core EasyCache"] = found.pop(COPIED, found["core EasyCache"])
        for method, settings in found.items():
            if method not in DRAWN:
                continue
            colour, style = DRAWN[method]
            points = [
                (row["steps"] / statistics.mean(row["calls"]), statistics.mean(row["errors"]),
                 statistics.stdev(row["errors"]) / len(row["errors"]) ** 0.5 if len(row["errors"]) > 1 else 0.0)
                for row in settings if min(row["errors"]) > 0
            ]  # fmt: skip
            if points:
                x, y, spread = zip(*sorted(points))
                panel.errorbar(x, y, spread, fmt=style, color=colour, label=method, markersize=4, linewidth=1.2)
        panel.set(title=subject, xlabel="steps / computed steps", yscale="log", xlim=(1, 4.6))
        panel.grid(alpha=0.3, which="both")
    for panel in grid[:, 0]:
        panel.set_ylabel("relative L2 to the full run")
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=5, frameon=False)
    figure.tight_layout(rect=(0, 0.9 / (4.0 * lines + 1.0), 1, 1))
    figure.savefig(out, dpi=90)
