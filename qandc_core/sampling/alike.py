"""Differences between runs other than their acceleration, as far as their reports tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .report import RunReport

LEVEL = 1e-3  # relative, up to which noise levels of two runs are the same
SETTINGS: dict[str, Callable[[RunReport], Any]] = {
    "seed": lambda report: report.seed,
    "sampler": lambda report: report.solver or report.sampler or None,
    "steps": lambda report: report.steps or None,
    "cfg": lambda report: report.cfg_scale,
    "denoise": lambda report: report.denoise,
    "latent": lambda report: " + ".join("x".join(map(str, shape)) for shape in report.size) or None,
}


def unlike_settings(reports: Sequence[RunReport]) -> list[str]:
    """A text for each setting that differs, with its values in the order of the reports that know it."""
    lines = []
    for name, value in SETTINGS.items():
        values = [value(report) for report in reports if value(report) is not None]
        if any(other != values[0] for other in values):
            lines.append(f"{name} {', '.join(map(str, values))}")
    if not any(line.startswith("steps ") for line in lines) and levels_differ(reports):
        lines.append("noise levels (scheduler, shift or part of the schedule)")
    return lines


def levels_differ(reports: Sequence[RunReport]) -> bool:
    """True if the runs went through different noise levels."""
    known = [report.sigmas for report in reports if report.sigmas]
    return any(
        len(levels) != len(known[0])
        or any(abs(a - b) > LEVEL * max(abs(a), abs(b), 1e-6) for a, b in zip(levels, known[0]))
        for levels in known
    )
