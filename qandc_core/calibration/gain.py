"""The gain from more calibration runs: how far the error of GPTQ's rounding would fall, estimated from the runs alone.

GPTQ rounds a layer's columns one after the other and lets each make up for the errors before it. With the second
moment of the inputs H = U D U^T, U unit upper triangular, rounding errors R on the grid become weight errors
E = R U^-1, so inputs x get the output error R U^-1 x, on average over the grid proportional to |U^-1 x|^2. Rounding to
nearest gives |x|^2; `rounding_error` is their ratio. It needs no weights and one Cholesky factor.

U^-1 x are the residuals of a linear regression of each input channel on those after it, fitted on what was calibrated.
So what is known of regressions holds (Akaike 1974, Takeuchi 1976). On a run that they do not hold, k - 1 runs do worse
than endless ones by about c / (k - 1) of the squared error, and k runs do better by c / k on one that they hold. The
log of the ratio of both, which `lowered` measures on the inputs of the k-th run, therefore gives c, and after n runs
c / n of the squared error is left to gain. Reported everywhere is the error, not its square, of which it is half.

The rounding of the inputs to 8 bits, which no calibration changes, is not in it. It is a small part of the error of
4-bit layers and most of that of 8-bit ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import widest_float

DAMPING = 0.01  # of the diagonal's mean, as GPTQ's
LATEST = 5  # runs that are averaged
ENOUGH = 0.05  # of the rounding error
Moment = tuple[Tensor, float]  # X^T X (K, K), and its damping relative to the mean of its diagonal


def rounding_error(moment: Tensor, x: Tensor, damping: float = DAMPING) -> float:
    """Output error |(W - W_q) x|^2 to expect of GPTQ with X^T X = moment (K, K) on inputs x (M, K), relative to that
    of rounding to nearest.

    Raises LinAlgError where the moment is not positive semidefinite.
    """
    h = moment.to(x.device, widest_float(x.device)).flip(0, 1)
    diagonal = h.diagonal()
    alive = diagonal > 0
    diagonal += torch.where(alive, damping * diagonal[alive].mean() if alive.any() else 1.0, 1.0)
    factor = torch.linalg.cholesky(h)
    factor = factor / factor.diagonal()
    inputs = x.to(h.dtype).flip(1).T
    residuals = torch.linalg.solve_triangular(factor, inputs, upper=False, unitriangular=True)
    return float(residuals.square().sum() / inputs.square().sum().clamp(min=1e-30))


def lowered(before: Moment, after: Moment, x: Tensor) -> float:
    """Log of the rounding error on a run's inputs x (M, K) by the moment without that run, over that with it."""
    errors = [rounding_error(moment, x, damping) for moment, damping in (before, after)]
    return math.log(max(errors[0], 1e-30) / max(errors[1], 1e-30))


def left_to_gain(history: Sequence[float], runs: int) -> float | None:
    """Share of the rounding error that endless runs would remove, by the values that `lowered` had for the latest of
    `runs`; None for too few of them.
    """
    latest = history[-LATEST:]
    if len(latest) < LATEST:
        return None
    numbers = (max(k, 2) for k in range(runs - len(latest) + 1, runs + 1))
    c = sum(log / (1 / (k - 1) + 1 / k) for k, log in zip(numbers, latest)) / len(latest)
    return -math.expm1(-max(c, 0.0) / runs / 2)
