"""The fitted correction, looked up by noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def compensate(x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """mean + K (x - mean) per channel (Q&C, Eq. 10), written so that K = 1 returns x bit for bit."""
    mean, factor = (v.to(x).view(1, -1, *[1] * (x.ndim - 2)) for v in (mean, factor))
    return x + (factor - 1) * (x - mean)


@dataclass(frozen=True)
class VarianceCompensation:
    """sigmas (S,) falling; mean and factor (S, C) in variance-preserving units."""

    sigmas: Tensor
    mean: Tensor
    factor: Tensor
    method: str = "variance_match"

    def find(self, sigma: float) -> int:
        """Index of the fitted noise level sigma. Raises ValueError where there is none."""
        gap = (self.sigmas - sigma).abs() / max(sigma, 1e-6)
        nearest = int(gap.argmin())
        if gap[nearest] > 1e-3:
            raise ValueError(
                f"The variance compensation was fitted on {len(self.sigmas)} other noise levels and has none for "
                f"sigma {sigma:.4g}; fit it again with the sampler, schedule and steps that are used now."
            )
        return nearest

    def check(self, sigmas: Sequence[float]) -> None:
        """Raises ValueError unless a run's noise levels are consecutive fitted ones: K depends on the step before."""
        found = [self.find(sigma) for sigma in sigmas]
        if found != list(range(found[0], found[0] + len(found))):
            raise ValueError(
                f"The variance compensation was fitted on {len(self.sigmas)} noise levels and this run skips some of "
                "them; fit it again with the sampler, schedule and steps that are used now."
            )

    def correct(self, x: Tensor, sigma: float) -> Tensor:
        """Corrects x before the step that starts at sigma. Raises ValueError where none was fitted for it."""
        nearest = self.find(sigma)
        if torch.equal(self.factor[nearest], torch.ones_like(self.factor[nearest])):
            return x
        return compensate(x, self.mean[nearest], self.factor[nearest])
