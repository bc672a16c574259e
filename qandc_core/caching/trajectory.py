"""Detects noise that a sampler adds between predictions, by linear algebra on a few hundred values of the sample.

Every sampler of diffusion models is linear in what it knows: a step, a midpoint, a corrector or a multistep formula
sets the next sample to a x + b D + c D' + ..., with one coefficient for all values of a tensor. So it lies in the span
of the last samples and predictions, whatever the sampler is called and however it was set. What a least-squares fit
leaves over did not come from there:

- noise that the sampler added. Extrapolation does not see it, so the run reuses the last prediction instead. eta,
  s_noise and s_churn need not be known.
- another run: its first sample is noise that no earlier sample explains, and earlier features are not its own.

A fit takes 512 values and at most 15 vectors, about 0.2 ms on the host. The values come over together with the noise
level, which the host waits for anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

POINTS = 512
STEPS = 5  # predictions that a multistep sampler combines at most
NOISE = 1e-3  # of the noise level: what the fit leaves over of a step without noise is float32 rounding
ROUNDING = 1e-5  # of the sample


def probe_positions(size: int, points: int = POINTS) -> Tensor:
    """Positions (n,) spread over a flattened tensor of `size` values, in no step with its rows; the same every time."""
    if size <= points:
        return torch.arange(size)
    return torch.unique(torch.arange(points, dtype=torch.int64) * 2654435761 % size)


def left_over(values: np.ndarray, basis: Sequence[np.ndarray]) -> float:
    """Root mean square of what is left of `values` (n,) after the best fit by the vectors of `basis`."""
    return float(np.sqrt(np.mean(np.square(residual(values, basis)))))


def residual(values: np.ndarray, basis: Sequence[np.ndarray]) -> np.ndarray:
    vectors = [vector / scale for vector in basis if (scale := float(np.abs(vector).max(initial=0.0))) > 0]
    if not vectors:
        return values
    matrix = np.stack(vectors, axis=1)
    return values - matrix @ np.linalg.lstsq(matrix, values, rcond=None)[0]


class NoiseWatch:
    """Tells whether the sampler of a run has added noise, from the samples that it asks predictions for.

    `see` takes each sample before its prediction, `predicted` what came out. Both take values at the same positions.
    """

    def __init__(self) -> None:
        self.vectors: list[list[np.ndarray]] = []  # of each of the last predictions: its sample and what came out
        self.noisy = False

    def see(self, sample: np.ndarray, sigma: float) -> bool:
        """True if noise was added on the way to this sample at noise level sigma, or before."""
        vectors = [vector for step in self.vectors for vector in step]
        if vectors and len(vectors[0]) != len(sample):
            self.vectors, vectors = [], []
        known = vectors and len(sample) > 2 * len(vectors) and all(np.isfinite(v).all() for v in (sample, *vectors))
        if not self.noisy and known:
            allowed = NOISE * sigma + ROUNDING * float(np.sqrt(np.mean(np.square(sample))))
            self.noisy = left_over(sample, vectors) > allowed
        self.vectors = [*self.vectors[1 - STEPS :], [sample]]
        return self.noisy

    def predicted(self, *vectors: np.ndarray) -> None:
        """Takes the prediction that the sampler got for the latest sample, and the unconditional one if known."""
        self.vectors[-1] += vectors

    def forget(self) -> None:
        """The next sample need not follow: another pass of the sampler begins."""
        self.vectors = []
