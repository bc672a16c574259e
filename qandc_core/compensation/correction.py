"""The fitted correction, looked up by noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.steps import kept_share

LARGEST_FACTOR = 1000.0  # a channel that would need more has collapsed
Shapes = Sequence[Sequence[int]]


def compensate(x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """mean + K (x - mean) per channel (Q&C, Eq. 10), written so that K = 1 returns x bit for bit."""
    mean, factor = (v.to(x).view(1, -1, *[1] * (x.ndim - 2)) for v in (mean, factor))
    return x + (factor - 1) * (x - mean)


def split_parts(x: Tensor, shapes: Shapes = ()) -> list[Tensor]:
    """Views of the parts (N, C, ...) that were flattened and joined to x (N, 1, L), by their shapes without N.

    Without shapes x is its only part.
    """
    if not shapes:
        return [x]
    flat = x.flatten(1).split([math.prod(shape) for shape in shapes], dim=1)
    return [part.unflatten(1, tuple(shape)) for part, shape in zip(flat, shapes)]


def compensate_parts(x: Tensor, mean: Tensor, factor: Tensor, shapes: Shapes = ()) -> Tensor:
    """Eq. 10 on every part; mean and factor (C,) are those of all parts' channels, in order."""
    parts = split_parts(x, shapes)
    channels = [part.shape[1] for part in parts]
    corrected = [compensate(*args) for args in zip(parts, mean.split(channels), factor.split(channels))]
    return torch.cat([part.flatten(1) for part in corrected], dim=1).view_as(x) if shapes else corrected[0]


def preserved_scale(sigma: float, flow: bool) -> float:
    """Factor from a sample at sigma to variance-preserving units; 1 for flow models, which are in them."""
    return 1.0 if flow else (1 + sigma**2) ** -0.5


def shifted(denoised: Tensor, x: Tensor, corrected: Tensor, sampler: str, sigma: float, following: float) -> Tensor:
    """D' = D + (x~ - x) c1 / c2: a step of ddim or ddpm from x with D' ends where one from x~ with D does.

    All in the sampler's own units: x' = c1 x + c2 D. Raises ValueError where the noise level does not fall.
    """
    kept = kept_share(sampler, sigma, following)
    if kept >= 1:
        raise ValueError(f"Variance compensation needs falling noise levels, and {following:.4g} follows {sigma:.4g}.")
    return denoised + (corrected - x) * (kept / (1 - kept))


def check_falling(sigmas: Sequence[float]) -> None:
    """Raises ValueError unless the noise levels (T + 1,) of a run are finite and each lies below the one before."""
    finite = all(math.isfinite(sigma) and sigma >= 0 for sigma in sigmas)
    if not finite or any(after >= before for before, after in zip(sigmas, sigmas[1:])):
        raise ValueError(
            "Variance compensation needs noise levels that fall from step to step, and this schedule repeats or raises "
            "them; choose another scheduler or sampler."
        )


@dataclass(frozen=True)
class VarianceCompensation:
    """sigmas (S,) falling; mean and factor (S, C) in variance-preserving units.

    Raises ValueError where they do not fit together, are not finite, or scale a channel beyond reason.
    """

    sigmas: Tensor
    mean: Tensor
    factor: Tensor
    method: str = "variance_match"

    def __post_init__(self) -> None:
        shapes = [tuple(v.shape) for v in (self.sigmas, self.mean, self.factor)]
        if self.sigmas.ndim != 1 or self.mean.ndim != 2 or len(self.sigmas) != len(self.mean) or shapes[1] != shapes[2]:
            raise ValueError(
                f"Variance compensation needs sigmas (S,), mean and factor (S, C), got {shapes}; fit it again."
            )
        levels = self.sigmas.tolist()
        falling = all(before > after > 0 for before, after in zip(levels, levels[1:]))
        lowest = 0.0 if self.method == "variance_match" else -LARGEST_FACTOR
        sane = ((self.factor >= lowest) & (self.factor <= LARGEST_FACTOR)).all() and self.mean.isfinite().all()
        if not falling or not self.sigmas.isfinite().all() or not sane:
            raise ValueError(
                "The variance compensation holds noise levels that do not fall, or means and factors that are not "
                f"finite or not between {lowest:g} and {LARGEST_FACTOR:g}; fit it again, with more pairs."
            )

    def find(self, sigma: float) -> int:
        """Index of the fitted noise level sigma. Raises ValueError where there is none."""
        gap = (self.sigmas - sigma).abs() / max(sigma, 1e-6)
        nearest = int(gap.argmin())
        if not gap[nearest] <= 1e-3:
            raise ValueError(
                f"The variance compensation was fitted on {len(self.sigmas)} other noise levels and has none for "
                f"sigma {sigma:.4g}; fit it again with the sampler, schedule and steps that are used now."
            )
        return nearest

    def check(self, sigmas: Sequence[float]) -> None:
        """Raises ValueError unless a run's noise levels are consecutive fitted ones: K depends on the step before."""
        found = [self.find(sigma) for sigma in sigmas]
        if found and found != list(range(found[0], found[0] + len(found))):
            raise ValueError(
                f"The variance compensation was fitted on {len(self.sigmas)} noise levels and this run skips some of "
                "them; fit it again with the sampler, schedule and steps that are used now."
            )

    def at(self, sigma: float) -> tuple[Tensor, Tensor]:
        """mean and factor (C,) of the step that starts at sigma. Raises ValueError where none was fitted for it."""
        nearest = self.find(sigma)
        return self.mean[nearest], self.factor[nearest]

    def correct(self, x: Tensor, sigma: float) -> Tensor:
        """Corrects x before the step that starts at sigma. Raises ValueError where none was fitted for it."""
        mean, factor = self.at(sigma)
        return x if is_identity(factor) else compensate(x, mean, factor)


def is_identity(factor: Tensor) -> bool:
    return bool((factor == 1).all())
