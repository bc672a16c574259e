"""Facts about a run that are known before it begins, and whether a calibration applies to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 0.02  # relative difference up to which two noise levels count as the same


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run that are known before it begins.

    `flow` says that noise replaces the image instead of adding to it, `cost` what share of a computed step a reused one
    takes, `sigmas` (total + 1,) the noise levels, `noisy` whether the sampler adds noise and `guided` whether two
    predictions are combined in a step; None: not known. `sampler` is its name.
    """

    total: int
    flow: bool = False
    cost: float = 0.0
    sigmas: Sequence[float] | None = None
    noisy: bool | None = None
    sampler: str = ""
    guided: bool | None = None


@dataclass(frozen=True, eq=False)
class StepDistances:
    """Step distances of a calibration: `values` (T, T), as optimal_schedule takes them, and the run that they were
    measured on: its noise levels (T + 1,), and whether its sampler adds noise. None: not known.
    """

    values: Tensor
    sigmas: tuple[float, ...] | None = None
    noisy: bool | None = None

    @property
    def lengths(self) -> Tensor | None:
        """By what each column was divided where the values do not say it: they are triangular in older files. There
        predictions count as equally long, and a column has the share of the way that its step goes.
        """
        if self.sigmas is None or len(self.sigmas) != len(self.values) + 1 or bool(self.values.tril(-1).any()):
            return None
        levels = torch.tensor(self.sigmas, dtype=torch.float64)
        return 1 / (1 - levels[1:] / levels[:-1]).abs().clamp(min=1e-9)

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
