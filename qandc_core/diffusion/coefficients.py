"""Sampler steps and forecasts as numbers known before the run: what a step on the device multiplies by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .schedule import NoiseSchedule


@dataclass(frozen=True)
class StepCoefficients:
    """x_0 = (x - noise_part * eps) / signal_part; then x' = keep * x + denoise * x_0 + fresh * noise."""

    signal_part: float
    noise_part: float
    keep: float
    denoise: float
    fresh: float


def step_coefficients(schedule: NoiseSchedule, sampler: str, i: int) -> StepCoefficients:
    """DDIM (arXiv 2010.02502, Eq. 12 with sigma = 0) or DDPM with fixed-small variance (arXiv 2006.11239, Eq. 6-7)."""
    a, after = schedule.alpha_bar[i], schedule.alpha_bar[i + 1]
    signal, noise = math.sqrt(a), math.sqrt(1 - a)
    if sampler == "ddim":
        ratio = math.sqrt(1 - after) / noise
        return StepCoefficients(signal, noise, ratio, math.sqrt(after) - ratio * signal, 0.0)
    beta = 1 - a / after
    keep = math.sqrt(1 - beta) * (1 - after) / (1 - a)
    fresh = math.sqrt(beta * (1 - after) / (1 - a))
    return StepCoefficients(signal, noise, keep, math.sqrt(after) * beta / (1 - a), fresh)


def forecast_weights(computed: Sequence[bool], order: int) -> list[float]:
    """For each step w in older + w (newer - older), over the last two computed steps; 1 holds the newer."""
    weights, seen = [], [0, 0]
    for i, computes in enumerate(computed):
        if computes:
            seen = [seen[1], i] if i else [0, 0]
        before, at = seen
        weights.append((i - before) / (at - before) if order and at > before else 1.0)
    return weights
