"""Facts about a run that are known before it begins, and whether a calibration applies to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

TOLERANCE = 0.02  # relative difference up to which two noise levels count as the same


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run that are known before it begins.

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
    """Step distances of a calibration: `values` (T, T), upper triangular, as optimal_schedule takes them, and the run
    that they were measured on: its noise levels (T + 1,), and whether its sampler adds noise. None: not known.
    """

    values: Tensor
    sigmas: tuple[float, ...] | None = None
    noisy: bool | None = None

    def mismatch(self, run: RunFacts) -> str:
        """Why they say nothing about a run, in words that go on from "because"; "" where they do."""
        if self.noisy is not None and run.noisy is not None and self.noisy != run.noisy:
            adds = ("adds no noise", "adds noise")
            return f"it was made with a sampler that {adds[self.noisy]} and this run's {adds[run.noisy]}"
        return schedule_mismatch(len(self.values), self.sigmas, run.total, run.sigmas)


def schedule_mismatch(made_steps: int, made: Sequence[float] | None, steps: int, sigmas: Sequence[float] | None) -> str:
    """How a run at the noise levels `sigmas` (steps + 1,) differs from the one that something was made on.

    "" if it does not. Where either does not know its levels, the number of steps counts.
    """
    if made_steps != steps:
        return f"it was made for {made_steps} steps and this run has {steps}"
    for index, (ours, theirs) in enumerate(zip(made or (), sigmas or ())):
        if abs(ours - theirs) > TOLERANCE * max(abs(ours), abs(theirs)):
            return (
                "it was made for another part of the schedule, or another scheduler (noise level "
                f"{ours:.3g} at step {index}, {theirs:.3g} in this run)"
            )
    return ""
