"""Runs side by side: fidelity to the first, measured time, and the figure that shows both."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from ..sampling.report import RunReport
from .figure import INK, MARGIN, MUTED, PAPER, FigureRow, comparison_figure, difference, resized, wrapped
from .frames import Frames
from .metrics import Fidelity, bands_of, pair_fidelity

PALETTE = ((38, 110, 190), (214, 96, 40), (44, 140, 80), (150, 70, 160), (180, 150, 20), (90, 100, 110))
PANEL = (420, 170)
log = logging.getLogger(__name__)
COLUMNS = ("run", "time s", "speedup", "steps computed", "cache MiB", "peak MiB", "PSNR dB", "SSIM", "rel. L2")


@dataclass(frozen=True)
class ComparedRun:
    """Images (N, 3, H, W) in [-1, 1] and, where measured, the report of the run that made them."""

    label: str
    images: Frames
    report: RunReport | None = None

    @property
    def size(self) -> str:
        count, _, height, width = self.images.shape
        return f"{count} x {width}x{height}"

    def comparable(self, reference: ComparedRun) -> bool:
        return self.images.shape == reference.images.shape


Progress = Callable[[int, int], None]


class Ticks:
    """Counts finished parts of the work to a callback(done, total), which may end it by raising."""

    def __init__(self, total: int, progress: Progress | None):
        self.done, self.total, self.progress = 0, total, progress

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def comparison_rows(runs: Sequence[ComparedRun], progress: Progress | None = None) -> list[dict[str, str]]:
    """One row of texts for each run, fidelity and speedup against the first. Frames are compared one at a time."""
    reference, compared = runs[0], [run for run in runs[1:] if run.comparable(runs[0])]
    bands = len(bands_of(*reference.images.shape[2:]))
    tick = Ticks(len(compared) * len(reference.images) * bands, progress)
    return [dict(zip(COLUMNS, [run.label, *timing(run, reference), *fidelity(run, reference, tick)])) for run in runs]


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


def fidelity(run: ComparedRun, reference: ComparedRun, tick: Callable[[], None] = lambda: None) -> list[str]:
    """PSNR over the images that differ at all, SSIM and relative L2 over all of them."""
    if run is reference or not run.comparable(reference):
        return ["-", "-", "-"]
    pairs = ((run.images[i], reference.images[i]) for i in range(len(run.images)))
    found = [pair_fidelity(image, other.to(image.device), tick=tick) for image, other in pairs]
    peaks = [f.psnr for f in found if not math.isinf(f.psnr)]
    return [f"{mean(peaks):.2f}" if peaks else "equal", *(text_of(found, name) for name in ("ssim", "relative_l2"))]


def text_of(found: Sequence[Fidelity], name: str) -> str:
    value = mean([getattr(f, name) for f in found])
    return "-" if math.isnan(value) else f"{value:.4f}"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mismatches(runs: Sequence[ComparedRun]) -> list[str]:
    """What else differs between runs, in their order; a run without report says nothing."""
    lines = []
    reports = [run.report for run in runs if run.report is not None]
    for name, value in SETTINGS.items():
        values = [value(report) for report in reports if value(report) is not None]
        if any(v != values[0] for v in values):
            lines.append(f"{name} {', '.join(map(str, values))}")
    found = [f"Not the same run: {'; '.join(lines)}."] if lines else []
    sizes = [run.size for run in runs]
    if len(set(sizes)) > 1:
        found.append(f"Images differ in number or size: {', '.join(sizes)}; only those like the first are measured.")
    return found


SETTINGS: dict[str, Callable[[RunReport], Any]] = {
    "seed": lambda report: report.seed,
    "sampler": lambda report: report.sampler or None,
    "steps": lambda report: report.steps or None,
    "cfg": lambda report: report.cfg_scale,
    "denoise": lambda report: report.denoise,
    "latent": lambda report: " + ".join("x".join(map(str, shape)) for shape in report.size) or None,
}


def comparison_markdown(rows: Sequence[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row[column] for column in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def run_comparison(
    runs: Sequence[ComparedRun], shown: int = 8, gain: float = 4.0, progress: Progress | None = None
) -> tuple[Image.Image, str]:
    """The figure, and its table as Markdown. `shown` images of each run are drawn, evenly chosen where there are more.

    progress(done, total) is called several times a second and may end the work by raising.
    """
    rows, told = comparison_rows(runs, progress), mismatches(runs)
    for line in told:
        log.warning("Q&C Compare: %s", line)
    size = min(256, max(72, runs[0].images.shape[-1]))
    pictures = [figure_row(run, row, runs[0], shown, size, gain) for run, row in zip(runs, rows)]
    title = "Against the first row: speedup, PSNR, and below each row the difference"
    head, table = comparison_figure(pictures, title, size, gain, told), draw_table(rows)
    said = draw_lines(remarks(runs), max(head.width, table.width))
    text = "".join(f"**{line}**\n\n" for line in told) + comparison_markdown(rows)
    text += "".join(f"\n\n{line}" for line in remarks(runs)) + timelines(runs) + layers(runs)
    return stack([part for part in (head, panels(runs), table, said) if part is not None]), text


def figure_row(
    run: ComparedRun, row: dict[str, str], reference: ComparedRun, shown: int, size: int, gain: float
) -> FigureRow:
    """A run's row of the figure, from one frame at a time."""
    indices = evenly(len(run.images), shown)
    images = torch.cat([resized(run.images[i][None].cpu(), size) for i in indices])
    computed, differences = run.report.computed if run.report else (), None
    compared = run.comparable(reference)
    if compared and run is not reference:
        pairs = ((run.images[i][None].cpu(), reference.images[i][None].cpu()) for i in indices)
        differences = torch.cat([resized(difference(image, other, gain), size) for image, other in pairs])
    return FigureRow(run.label, numbers(row), images, computed, differences, compared)


def evenly(count: int, shown: int) -> list[int]:
    """At most `shown` of `count` indices, the first and the last among them."""
    if count <= shown:
        return list(range(count))
    return [round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)]


def remarks(runs: Sequence[ComparedRun]) -> list[str]:
    """What each run's quantization cost, what its cache reused, what that gained by its own clock, and its warnings."""
    lines = []
    for run in runs:
        report = run.report
        if report is not None and report.quantization is not None:
            lines.append(f"{run.label}: {report.quantization.summary()}")
        if report is None or not report.reuse:
            continue
        gain = "" if report.cache_speedup is None else f", model calls {report.cache_speedup:.2f}x faster for it"
        lines.append(f"{run.label}: reuses {report.reuse}{gain}" + "".join(f"; {text}" for text in report.warnings))
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


def draw_lines(texts: Sequence[str], width: int) -> Image.Image | None:
    """The texts, broken into lines that fit the width."""
    font = ImageFont.load_default(13)
    lines = [line for text in texts for line in wrapped(text, font, width - 2 * MARGIN - 14)]
    if not lines:
        return None
    panel = Image.new("RGB", (width, 20 * len(lines) + MARGIN), PAPER)
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
