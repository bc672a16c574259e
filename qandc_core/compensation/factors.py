"""Variance compensation factors (Q&C, arXiv 2503.02508, Eq. 9-12)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed import Distributed

METHODS = ("variance_match", "paper", "least_squares")


class VarianceMoments:
    """Per-channel sums over paired samples, accumulated in float64 so that no trajectory is kept.

    With x' the reference, xh the accelerated sample and w = 1 + 1 / (x'^2 + eps).
    """

    def __init__(self, channels: int, eps: float = 1e-2):
        if not 0 < eps < math.inf:
            raise ValueError(f"eps must be above 0 and finite, got {eps}.")
        self.eps = eps
        self.plain = torch.zeros(6, channels, dtype=torch.float64)  # 1, xh, x', xh^2, x'^2, xh x'
        self.weighted = torch.zeros(5, channels, dtype=torch.float64)  # w times 1, xh, x', xh^2, xh x'

    def update(self, reference: Tensor, accelerated: Tensor) -> None:
        """Adds paired samples, both (N, C, ...)."""
        x = reference.detach().cpu().double().transpose(0, 1).flatten(1)
        xh = accelerated.detach().cpu().double().transpose(0, 1).flatten(1)
        w = 1 + 1 / (x**2 + self.eps)
        self.plain += torch.stack([v.sum(1) for v in (torch.ones_like(x), xh, x, xh**2, x**2, xh * x)])
        self.weighted += torch.stack([(w * v).sum(1) for v in (torch.ones_like(x), xh, x, xh**2, xh * x)])

    def sum_over(self, process: Distributed) -> None:
        """Adds the pairs of the other processes."""
        self.plain, self.weighted = process.reduce(self.plain), process.reduce(self.weighted)

    def factors(self, method: str = "variance_match") -> tuple[Tensor, Tensor]:
        """mean of the accelerated samples (C,) and factor K (C,), float64; K = 1 where a channel does not vary."""
        one, xh, x, xh2, x2, cross = self.plain
        mean = xh / one
        if method == "variance_match":
            numerator, denominator = (x2 - x**2 / one).clamp(min=0).sqrt(), (xh2 - xh**2 / one).clamp(min=0).sqrt()
        elif method == "least_squares":
            numerator, denominator = cross - mean * x, xh2 - mean * xh
        elif method == "paper":
            w, wxh, wx, wxh2, wcross = self.weighted
            numerator = wcross - mean * (wxh + wx) + mean**2 * w
            denominator = wxh2 - 2 * mean * wxh + mean**2 * w
        else:
            raise unknown_method(method)
        floor = 1e-12 * xh2.clamp(min=1e-30)
        constant = (xh2 - mean * xh) <= floor
        return mean, torch.where(constant, torch.ones_like(mean), numerator / denominator.clamp(min=1e-30))


def unknown_method(method: str) -> ValueError:
    return ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")


def variance_factors(
    reference: Tensor, accelerated: Tensor, method: str = "variance_match", eps: float = 1e-2
) -> tuple[Tensor, Tensor]:
    """mean (C,) and factor K (C,) of the correction mean + K (x - mean) (Eq. 10), samples (N, C, H, W) paired by noise.

    variance_match: K = std(x') / std(xh) (Eq. 9). paper: the minimiser of rQNSR^2 + MSE (Eq. 11) with the weight
    regularised to 1 + 1 / (x'^2 + eps). least_squares: the minimiser of MSE. Raises ValueError on unequal shapes.
    """
    if reference.ndim != 4 or reference.shape != accelerated.shape:
        raise ValueError(
            f"reference and accelerated must both be (N, C, H, W), got {tuple(reference.shape)} "
            f"and {tuple(accelerated.shape)}."
        )
    moments = VarianceMoments(reference.shape[1], eps)
    moments.update(reference, accelerated)
    return moments.factors(method)
