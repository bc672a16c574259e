"""One step of each sampler, from alpha_bar to next_alpha_bar, x in variance-preserving units."""

from __future__ import annotations

import math

from torch import Tensor

SAMPLERS = ("ddpm", "ddim")


def denoised_image(x: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """x_0 predicted from x_t and the noise (DDPM, arXiv 2006.11239, Eq. 15)."""
    return (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)


def implied_noise(x: Tensor, x0: Tensor, alpha_bar: float) -> Tensor:
    """The noise that a predicted clean image stands for."""
    return (x - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)


def ddim_step(x: Tensor, eps: Tensor, alpha_bar: float, next_alpha_bar: float) -> Tensor:
    """Deterministic DDIM step (arXiv 2010.02502, Eq. 12 with sigma = 0)."""
    x0 = denoised_image(x, eps, alpha_bar)
    return math.sqrt(next_alpha_bar) * x0 + math.sqrt(1 - next_alpha_bar) * eps


def posterior_variance(alpha_bar: float, next_alpha_bar: float) -> float:
    """The fixed-small variance of q(x_{t-1} | x_t, x_0) (DDPM, Eq. 7)."""
    return (1 - next_alpha_bar) / (1 - alpha_bar) * (1 - alpha_bar / next_alpha_bar)


def learned_range_std(v: Tensor, alpha_bar: float, next_alpha_bar: float) -> Tensor:
    """Standard deviation interpolated in log variance by v in [-1, 1] (Improved DDPM, arXiv 2102.09672, Eq. 15)."""
    low = math.log(posterior_variance(alpha_bar, next_alpha_bar))
    high = math.log(1 - alpha_bar / next_alpha_bar)
    mix = (v + 1) / 2
    return (0.5 * (mix * high + (1 - mix) * low)).exp()


def ddpm_step(
    x: Tensor, eps: Tensor, alpha_bar: float, next_alpha_bar: float, noise: Tensor | None, v: Tensor | None = None
) -> Tensor:
    """Ancestral step (DDPM, Eq. 6-7); the variance is learned where v is given, else fixed small.

    `noise` is None on the step that reaches the clean image.
    """
    x0 = denoised_image(x, eps, alpha_bar)
    beta = 1 - alpha_bar / next_alpha_bar
    mean = math.sqrt(next_alpha_bar) * beta / (1 - alpha_bar) * x0
    mean = mean + math.sqrt(1 - beta) * (1 - next_alpha_bar) / (1 - alpha_bar) * x
    if noise is None:
        return mean
    if v is None:
        return mean + math.sqrt(posterior_variance(alpha_bar, next_alpha_bar)) * noise
    return mean + learned_range_std(v, alpha_bar, next_alpha_bar) * noise
