"""Reports of compared runs in words: remarks, the timeline of every condition, the worst layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..sampling.report import RunReport

if TYPE_CHECKING:
    from .comparison import ComparedRun


def remarks(runs: Sequence[ComparedRun]) -> list[str]:
    """Cost of each run's quantization, what its cache reused and gained by its own clock, and its warnings."""
    lines = [line for run in runs if run.report is not None for line in remarks_of(run.label, run.report)]
    counts = {len(run.rounds) for run in runs if run.rounds}
    if counts:
        lines.append(
            f"Times: median of {max(counts)} interleaved rounds after a warm-up; speedup: median of the rounds, and "
            "their range."
        )
    elif sum(run.report is not None and bool(run.report.seconds) for run in runs) > 1:
        lines.append("Times are of one run each, the set-up of the first included; set repeats to measure their range.")
    return lines


def remarks_of(label: str, report: RunReport) -> list[str]:
    lines = []
    if not report.finished:
        lines.append(f"{label}: the run did not end")
    if report.parts > 1:
        lines.append(f"{label}: {report.parts} sampler runs, added up")
    if report.quantization is not None:
        lines.append(f"{label}: {report.quantization.summary()}")
    warnings = "".join(f"; {text}" for text in report.warnings)
    if report.reuse:
        gain = "" if report.cache_speedup is None else f", model calls {report.cache_speedup:.2f}x faster for it"
        lines.append(f"{label}: reuses {report.reuse}{gain}{warnings}")
    elif warnings:
        lines.append(f"{label}: {warnings.removeprefix('; ')}")
    return lines


def timelines(runs: Sequence[ComparedRun]) -> str:
    """A letter for each step of each condition."""
    named = [(f"{run.label}, {name}", line) for run in runs if run.report for name, line in run.report.timeline.items()]
    if not named:
        return ""
    rows = "\n".join(f"{line}  {name}" for name, line in named)
    return f"\n\nSteps (C computed, R reused, F extrapolated):\n\n```\n{rows}\n```"


def layers(runs: Sequence[ComparedRun]) -> str:
    """The layers that quantization cost most."""
    parts = [(run.label, run.report.quantization) for run in runs if run.report and run.report.quantization]
    return "".join(f"\n\nLayers of {label}:\n\n{report.table()}" for label, report in parts)
