"""Runs side by side: fidelity to the first, measured time, and the figure that shows both."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from PIL import Image

from ..sampling.alike import unlike_settings
from ..sampling.report import RunReport
from .figure import LIGHT, FigureRow, Theme, comparison_figure, difference, resized
from .frames import Frames
from .metrics import Fidelity, bands_of, pair_fidelity
from .panels import draw_lines, draw_table, panels, stack
from .remarks import layers, remarks, timelines
from .repeats import MeasuredSpeedup, in_turns
from .tables import markdown_table

log = logging.getLogger(__name__)
COLUMNS = ("run", "time s", "speedup", "steps computed", "cache MiB", "peak MiB", "PSNR dB", "SSIM", "rel. L2")


@dataclass(frozen=True)
class ComparedRun:
    """Images (N, 3, H, W) in [-1, 1] and, where measured, the report of the run that made them.

    `rounds` are its seconds where it was sampled again in turns with the others (`sampled_in_turns`).
    """

    label: str
    images: Frames
    report: RunReport | None = None
    rounds: Sequence[float] = ()

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


def sampled_in_turns(runs: Sequence[ComparedRun], rounds: int, progress: Progress | None = None) -> list[ComparedRun]:
    """The runs with the seconds of `rounds` more samplings in turns, where their reports can sample again.

    progress(done, total) is called at every step and may end the work by raising. Images are not compared anew.
    """
    again = [(i, run.report) for i, run in enumerate(runs) if run.report is not None and run.report.replay]
    tick = Ticks((1 + rounds) * sum(report.steps for _, report in again), progress)

    def sampling(report: RunReport) -> Callable[[], float]:
        assert report.replay is not None
        replay = report.replay
        return lambda: replay(tick).total_seconds

    seconds = in_turns([sampling(report) for _, report in again], rounds)
    found = list(runs)
    for (i, _), taken in zip(again, seconds):
        found[i] = replace(runs[i], rounds=tuple(taken))
    return found


def speedup_of(run: ComparedRun, reference: ComparedRun) -> MeasuredSpeedup | None:
    """From the rounds in turns where both have them, else from the single runs; None where either was not measured."""
    if run.rounds and reference.rounds:
        return MeasuredSpeedup.of(reference.rounds, run.rounds)
    if not all(r.report is not None and r.report.seconds for r in (run, reference)):
        return None
    return MeasuredSpeedup.of([seconds_of(reference)], [seconds_of(run)])


def seconds_of(run: ComparedRun) -> float:
    """The median of the rounds, or of the run itself."""
    if run.rounds:
        return median(run.rounds)
    return run.report.total_seconds if run.report is not None else math.nan


def timing(run: ComparedRun, reference: ComparedRun) -> list[str]:
    report = run.report
    if report is None or not report.seconds:
        return ["-", "-", "-", "-", "-"]
    speedup = speedup_of(run, reference)
    return [
        f"{seconds_of(run):.2f}",
        "-" if speedup is None else str(speedup),
        f"{report.computed_steps} of {report.steps}",
        f"{report.cache_bytes / 2**20:.1f}",
        f"{report.peak_memory / 2**20:.0f}" if report.peak_memory and on_gpu(report) else "-",
    ]


def headlines(runs: Sequence[ComparedRun], rows: Sequence[dict[str, str]]) -> list[str]:
    """One line for each run: gain and cost."""
    lines = []
    for run, row in zip(runs[1:], rows[1:]):
        speedup = speedup_of(run, runs[0])
        rounds = "one run each" if speedup is not None and speedup.rounds == 1 else "range of the rounds"
        faster = "" if speedup is None else f"{speedup} as fast, {rounds}"
        psnr = {"equal": "equal images", "-": "images of another size or number"}.get(
            row["PSNR dB"], f"PSNR {row['PSNR dB']} dB"
        )
        ssim = "" if row["SSIM"] in ("-", "1.0000") else f"SSIM {row['SSIM']}"
        lines.append(f"{run.label}: " + ", ".join(filter(None, [faster, psnr, ssim])))
    return lines


def on_gpu(report: RunReport) -> bool:
    """True where peaks can be compared: elsewhere they are the process's since it began, not a run's."""
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
    """Differences that make the comparison unfair; without a report the settings of a run are not known."""
    lines = unlike_settings([run.report for run in runs if run.report is not None])
    found = [f"Not the same run: {'; '.join(lines)}."] if lines else []
    sizes = [run.size for run in runs]
    if len(set(sizes)) > 1:
        found.append(f"Images differ in number or size: {', '.join(sizes)}; only those like the first are measured.")
    return found


def comparison_markdown(rows: Sequence[dict[str, str]]) -> str:
    return markdown_table(COLUMNS, [[row[column] for column in COLUMNS] for row in rows])


def run_comparison(
    runs: Sequence[ComparedRun],
    shown: int = 8,
    gain: float = 4.0,
    progress: Progress | None = None,
    theme: Theme = LIGHT,
    said: Sequence[str] = (),
) -> tuple[Image.Image, str]:
    """The figure, and its table as Markdown. `shown` images of each run are drawn, evenly chosen where there are more.

    What makes the runs no fair comparison comes first, `said` among it, then one line for what each run gains and
    costs. progress(done, total) is called several times a second and may end the work by raising.
    """
    rows, told = comparison_rows(runs, progress), [*mismatches(runs), *said]
    for line in told:
        log.warning("Q&C Compare: %s", line)
    size = min(256, max(72, runs[0].images.shape[-1]))
    pictures = [figure_row(run, row, runs[0], shown, size, gain) for run, row in zip(runs, rows)]
    heads, notes = headlines(runs, rows), remarks(runs)
    head = comparison_figure(pictures, "\n".join(heads), size, gain, told, theme)
    table = draw_table([list(COLUMNS), *([row[column] for column in COLUMNS] for row in rows)], theme)
    lines = draw_lines(notes, max(head.width, table.width), theme)
    text = "".join(f"**{line}**\n\n" for line in [*told, *heads]) + comparison_markdown(rows)
    text += "".join(f"\n\n{line}" for line in notes) + timelines(runs) + layers(runs)
    curves = panels([run.report for run in runs], theme)
    return stack([part for part in (head, curves, table, lines) if part is not None], theme), text


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


def numbers(row: dict[str, str]) -> str:
    first = f"{row['time s']} s, {row['speedup']}" if row["time s"] != "-" else ""
    second = f"PSNR {row['PSNR dB']}" + (" dB" if row["PSNR dB"] not in ("-", "equal") else "")
    return "\n".join(filter(None, [first, second if row["PSNR dB"] != "-" else ""]))
