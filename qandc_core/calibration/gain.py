"""The gain of one more run of calibration: the reduction of the layer error, measured on calls not seen before.

GPTQ rounds a layer's columns one after the other and lets each make up for the errors before it. With the second
moment of the inputs H = U D U^T, U unit upper triangular, rounding errors R on the grid become weight errors
E = R U^-1, so inputs x get the output error R U^-1 x, on average over the grid proportional to |U^-1 x|^2. Rounding to
nearest gives |x|^2; `rounding_error` is their ratio. It needs no weights and one Cholesky factor.

U^-1 x are the residuals of a linear regression of each input channel on those after it, fitted on what was calibrated.
So what is known of regressions holds: on the runs that it was fitted on a fit looks too good by as much as it looks bad
on a new one, and half the difference is what endless data would gain (Akaike 1974, Takeuchi 1976). `lowered` is that
difference for a run that is about to be added: the log of the error on its inputs before, over that after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import widest_float

DAMPING = 0.01  # of the diagonal's mean, as GPTQ's
LATEST = 5  # runs whose difference is averaged
ENOUGH = 0.02  # relative layer error that is left to gain


def rounding_error(moment: Tensor, x: Tensor) -> float:
    """Output error |(W - W_q) x|^2 to expect of GPTQ with X^T X = moment (K, K) on inputs x (M, K), relative to that
    of rounding to nearest.

    Raises LinAlgError where the moment is not positive semidefinite.
    """
    h = moment.to(x.device, widest_float(x.device)).flip(0, 1)
    diagonal = h.diagonal()
    alive = diagonal > 0
    diagonal += torch.where(alive, DAMPING * diagonal[alive].mean() if alive.any() else 1.0, 1.0)
    factor = torch.linalg.cholesky(h)
    factor = factor / factor.diagonal()
    inputs = x.to(h.dtype).flip(1).T
    residuals = torch.linalg.solve_triangular(factor, inputs, upper=False, unitriangular=True)
    return float(residuals.square().sum() / inputs.square().sum().clamp(min=1e-30))


def lowered(before: Tensor, after: Tensor, x: Tensor) -> float:
    """Log of the rounding error on a run's inputs x (M, K) by the moments without that run, over that with it."""
    return math.log(max(rounding_error(before, x), 1e-30) / max(rounding_error(after, x), 1e-30))


def left_to_gain(history: Sequence[float]) -> float | None:
    """Share of the layer error that endless runs would remove, by what the latest removed; None for fewer runs."""
    latest = history[-LATEST:]
    if len(latest) < LATEST:
        return None
    return -math.expm1(-max(sum(latest) / len(latest), 0.0) / 2)


def is_enough(history: Sequence[float]) -> bool:
    left = left_to_gain(history)
    return left is not None and left < ENOUGH
