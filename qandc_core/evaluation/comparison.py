"""Runs side by side: fidelity to the first, measured time, and the figure that shows both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..sampling.report import RunReport
from .figure import INK, MARGIN, MUTED, PAPER, FigureRow, comparison_figure
from .metrics import psnr, relative_l2, ssim

SSIM_SIDE = 11  # window of the structural similarity
PALETTE = ((38, 110, 190), (214, 96, 40), (44, 140, 80), (150, 70, 160), (180, 150, 20), (90, 100, 110))
PANEL = (420, 170)
COLUMNS = ("run", "time s", "speedup", "steps computed", "cache MiB", "peak MiB", "PSNR dB", "SSIM", "rel. L2")


@dataclass(frozen=True)
class ComparedRun:
    """Images (N, 3, H, W) in [-1, 1] and, where measured, the report of the run that made them."""

    label: str
    images: Tensor
    report: RunReport | None = None


def check_comparable(runs: Sequence[ComparedRun]) -> None:
    for run in runs[1:]:
        if run.images.shape != runs[0].images.shape:
            raise ValueError(
                f"{run.label} has images of the shape {tuple(run.images.shape)}, {runs[0].label} of "
                f"{tuple(runs[0].images.shape)}; compare runs of equal size and number."
            )


def comparison_rows(runs: Sequence[ComparedRun]) -> list[dict[str, str]]:
    """One row of texts for each run, fidelity and speedup against the first."""
    check_comparable(runs)
    return [dict(zip(COLUMNS, [run.label, *timing(run, runs[0]), *fidelity(run, runs[0])])) for run in runs]


def timing(run: ComparedRun, reference: ComparedRun) -> list[str]:
    report = run.report
    if report is None or not report.seconds:
        return ["-", "-", "-", "-", "-"]
    base = reference.report
    faster = f"{base.total_seconds / report.total_seconds:.2f}x" if base is not None and base.seconds else "-"
    return [
        f"{report.total_seconds:.2f}",
        faster,
        f"{report.computed_steps} of {report.steps}",
        f"{report.cache_bytes / 2**20:.1f}",
        f"{report.peak_memory / 2**20:.0f}" if report.peak_memory and on_gpu(report) else "-",
    ]


def on_gpu(report: RunReport) -> bool:
    """Elsewhere the peak is that of the process since it began, which tells runs nothing apart."""
    return report.device.startswith("cuda")


def fidelity(run: ComparedRun, reference: ComparedRun) -> list[str]:
    if run is reference:
        return ["-", "-", "-"]
    peak = float(psnr(run.images, reference.images).mean())
    similarity = f"{float(ssim(run.images, reference.images).mean()):.4f}" if can_ssim(run.images) else "-"
    distance = f"{float(relative_l2(run.images, reference.images).mean()):.4f}"
    return ["equal" if math.isinf(peak) else f"{peak:.2f}", similarity, distance]


def can_ssim(images: Tensor) -> bool:
    return min(images.shape[-2:]) >= SSIM_SIDE


def comparison_markdown(rows: Sequence[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row[column] for column in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def run_comparison(runs: Sequence[ComparedRun], shown: int = 8, gain: float = 4.0) -> tuple[Image.Image, str]:
    """The figure, and its table as Markdown. Raises ValueError on images of unequal shapes."""
    rows = comparison_rows(runs)
    size = min(256, max(72, runs[0].images.shape[-1]))
    pictures = [
        FigureRow(run.label, numbers(row), run.images[:shown].cpu(), run.report.computed if run.report else ())
        for run, row in zip(runs, rows)
    ]
    title = "Against the first row: speedup, PSNR, and below each row the difference"
    said = remarks(runs)
    parts = [comparison_figure(pictures, title, size, gain), panels(runs), draw_table(rows), draw_lines(said)]
    text = comparison_markdown(rows) + "".join(f"\n\n{line}" for line in said) + timelines(runs) + layers(runs)
    return stack([part for part in parts if part is not None]), text


def remarks(runs: Sequence[ComparedRun]) -> list[str]:
    """What each run's quantization cost, what its cache reused, what that gained by its own clock, and its warnings."""
    lines = []
    for run in runs:
        report = run.report
        if report is not None and report.quantization is not None:
            lines.append(f"{run.label}: {report.quantization.summary()}")
        if report is None or not report.tier:
            continue
        gain = "" if report.cache_speedup is None else f", model calls {report.cache_speedup:.2f}x faster for it"
        lines.append(f"{run.label}: reuses {report.tier}{gain}" + "".join(f"; {text}" for text in report.warnings))
    return lines


def timelines(runs: Sequence[ComparedRun]) -> str:
    """A letter for each step of each condition."""
    named = [(f"{run.label}, {name}", line) for run in runs if run.report for name, line in run.report.timeline.items()]
    if not named:
        return ""
    rows = "\n".join(f"{line}  {name}" for name, line in named)
    return f"\n\nSteps (C computed, R held, F forecast):\n\n```\n{rows}\n```"


def layers(runs: Sequence[ComparedRun]) -> str:
    """The layers that quantization cost most."""
    parts = [(run.label, run.report.quantization) for run in runs if run.report and run.report.quantization]
    return "".join(f"\n\nLayers of {label}:\n\n{report.table()}" for label, report in parts)


def numbers(row: dict[str, str]) -> str:
    first = f"{row['time s']} s, {row['speedup']}" if row["time s"] != "-" else ""
    second = f"PSNR {row['PSNR dB']}" + (" dB" if row["PSNR dB"] not in ("-", "equal") else "")
    return "\n".join(filter(None, [first, second if row["PSNR dB"] != "-" else ""]))


def panels(runs: Sequence[ComparedRun]) -> Image.Image | None:
    """Milliseconds of every step, and the factors K_t where variance was compensated."""
    reports = [(i, run.report) for i, run in enumerate(runs) if run.report is not None]
    times = {i: [1000 * s for s in r.seconds] for i, r in reports if len(r.seconds) > 1}
    factors = {i: [sum(k) / len(k) for k in r.factors] for i, r in reports if len(r.factors) > 1}
    drawn = [curves("ms of every step", times), curves("K_t of every step, mean over channels", factors)]
    found = [panel for panel in drawn if panel is not None]
    if not found:
        return None
    strip = Image.new("RGB", (MARGIN + len(found) * (PANEL[0] + MARGIN), PANEL[1]), PAPER)
    for i, panel in enumerate(found):
        strip.paste(panel, (MARGIN + i * (PANEL[0] + MARGIN), 0))
    return strip


def curves(title: str, series: dict[int, list[float]]) -> Image.Image | None:
    """Lines over the steps, each in the colour of its run's place in the table."""
    if not series:
        return None
    panel = Image.new("RGB", PANEL, PAPER)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(12)
    left, top, right, bottom = 54, 24, PANEL[0] - 8, PANEL[1] - 20
    low, high = min(map(min, series.values())), max(map(max, series.values()))
    span = (high - low) or 1.0
    draw.text((left, 4), title, INK, font)
    draw.rectangle((left, top, right, bottom), outline=MUTED)
    draw.text((2, top - 6), f"{high:.3g}", MUTED, font)
    draw.text((2, bottom - 8), f"{low:.3g}", MUTED, font)
    for i, values in series.items():
        points = [
            (left + (right - left) * j / (len(values) - 1), bottom - (bottom - top) * (v - low) / span)
            for j, v in enumerate(values)
        ]
        draw.line(points, fill=PALETTE[i % len(PALETTE)], width=2)
    return panel


def draw_table(rows: Sequence[dict[str, str]]) -> Image.Image:
    font = ImageFont.load_default(13)
    cells = [list(COLUMNS), *([row[column] for column in COLUMNS] for row in rows)]
    widths = [max(round(font.getlength(line[c])) for line in cells) + 22 for c in range(len(COLUMNS))]
    table = Image.new("RGB", (MARGIN * 2 + 14 + sum(widths), 22 * len(cells) + MARGIN * 2), PAPER)
    draw = ImageDraw.Draw(table)
    for r, line in enumerate(cells):
        x, y = MARGIN + 14, MARGIN + 22 * r
        if r:
            draw.rectangle((MARGIN, y + 3, MARGIN + 8, y + 11), fill=PALETTE[(r - 1) % len(PALETTE)])
        for text, width in zip(line, widths):
            draw.text((x, y), text, INK if r else MUTED, font)
            x += width
    return table


def draw_lines(lines: Sequence[str]) -> Image.Image | None:
    if not lines:
        return None
    font = ImageFont.load_default(13)
    width = round(max(font.getlength(line) for line in lines))
    panel = Image.new("RGB", (width + 2 * MARGIN + 14, 20 * len(lines) + MARGIN), PAPER)
    draw = ImageDraw.Draw(panel)
    for i, line in enumerate(lines):
        draw.text((MARGIN + 14, 20 * i), line, MUTED, font)
    return panel


def stack(parts: Sequence[Image.Image]) -> Image.Image:
    figure = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), PAPER)
    top = 0
    for part in parts:
        figure.paste(part, (0, top))
        top += part.height
    return figure
