"""A run with a cache, in the words that Apply Cache shows."""

from __future__ import annotations

from ..status import sentences
from .run import ModelRun


def cache_words(run: ModelRun, ended: str = "") -> str:
    """The number of computed steps, the speedup of the model calls, and every warning on its own line.

    A node shows two lines before it has to be made larger, so what a user must know comes first. `ended` says why a
    run stopped before its end.
    """
    actions, computed = run.actions(), sum(run.computed())
    visited = len(actions) - run.not_visited
    parts, gain = [f"{computed} of {visited} steps computed"], run.times.speedup()
    if computed < visited:
        parts += [*([] if gain is None else [f"{gain:.2g}x"]), f"order {run.plan.order}"]
    lines = [ended, ", ".join(parts), *(f"Warning: {text}" for text in run.warnings)]
    if run.not_visited:
        lines.append(f"{run.not_visited} steps were not visited by the sampler")
    if computed < visited and gain is not None:
        lines.append(
            f"{gain:.2g}x is measured: the time of all model calls if each took as long as the median computed one, "
            "over their actual time"
        )
    if run.reuse:
        lines.append(f"reuses {run.reuse}, {run.reason}; {run.peak_bytes / 2**20:.1f} MiB")
    return sentences(lines)
