"""What is known of a run before it begins, and whether a calibration was made of such a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

TOLERANCE = 0.02  # relative difference of noise levels up to which two schedules are the same part of the same run


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before it begins.

    `flow` says that noise replaces the image instead of adding to it, `cost` what share of a computed step a reused one
    takes, `sigmas` (total + 1,) the noise levels and `noisy` whether the sampler adds noise; None: not known.
    """

    total: int
    flow: bool = False
    cost: float = 0.0
    sigmas: Sequence[float] | None = None
    noisy: bool | None = None


@dataclass(frozen=True, eq=False)
class StepDistances:
    """What a calibration knows of steps: `values` (T, T), upper triangular, as optimal_schedule takes them, and the run
    that they were measured on: its noise levels (T + 1,), and whether its sampler adds noise. None: not known.
    """

    values: Tensor
    sigmas: tuple[float, ...] | None = None
    noisy: bool | None = None

    def mismatch(self, run: RunFacts) -> str:
        """Why they say nothing about a run, in words; "" where they do."""
        if len(self.values) != run.total:
            return f"the calibration is of {len(self.values)} steps and this run has {run.total}"
        if self.noisy is not None and run.noisy is not None and self.noisy != run.noisy:
            kinds = ("a sampler that adds no noise", "a sampler that adds noise")
            return f"the calibration is of {kinds[self.noisy]} and this run has {kinds[run.noisy]}"
        if self.sigmas is not None and run.sigmas is not None and not same_levels(self.sigmas, run.sigmas):
            theirs, ours = levels(self.sigmas), levels(run.sigmas)
            return f"the calibration is of other noise levels ({theirs}) than this run's ({ours})"
        return ""


def levels(sigmas: Sequence[float]) -> str:
    return f"{sigmas[0]:.3g}, {sigmas[len(sigmas) // 2]:.3g} half-way, {sigmas[-1]:.3g}"


def same_levels(first: Sequence[float], second: Sequence[float]) -> bool:
    return len(first) == len(second) and all(
        abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) for a, b in zip(first, second)
    )
