"""One step of each sampler, written once: all of them move the sample towards the predicted clean image.

With the clean image D and the noise level s = sqrt((1 - a) / a), a = alpha_bar, noise adds to the image in
"variance-exploding" units, x_ve = x / sqrt(a), the ones of ComfyUI's samplers. There a step from s to s' is

    x_ve' = c1 x_ve + (1 - c1) D + fresh noise,    c1 = s'/s for DDIM (Euler),  c1 = (s'/s)^2 for DDPM's posterior mean,

so a sampler is its c1 and the noise that it adds. Multiplying by sqrt(a') gives the step in the variance-preserving
units of DiT, which is what `step_coefficients` tabulates. The host's loop, the loop on the device and the correction of
samples under samplers that are not ours all read these numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .schedule import NoiseSchedule

SAMPLERS = ("ddpm", "ddim")
Scalar = float | Tensor


def kept_share(sampler: str, sigma: float, following: float) -> float:
    """c1 of x' = c1 x + (1 - c1) D from noise level sigma to the following one, in variance-exploding units."""
    ratio = following / sigma
    return ratio**2 if sampler == "ddpm" else ratio


@dataclass(frozen=True)
class StepCoefficients:
    """x_0 = (x - noise_part * eps) / signal_part; then x' = keep * x + denoise * x_0 + fresh * noise.

    Numbers, or scalars on the device where the host knows no step.
    """

    signal_part: Scalar
    noise_part: Scalar
    keep: Scalar
    denoise: Scalar
    fresh: Scalar

    def clean_image(self, x: Tensor, eps: Tensor) -> Tensor:
        """x_0 that the predicted noise implies (DDPM, arXiv 2006.11239, Eq. 15)."""
        return (x - self.noise_part * eps) / self.signal_part

    def advance(self, x: Tensor, x0: Tensor, noise: Tensor | None, deviation: Tensor | None = None) -> Tensor:
        """The next sample; `deviation` replaces the fixed-small one, `noise` is None where none is added."""
        mean = self.keep * x + self.denoise * x0
        if noise is None:
            return mean
        return mean + (self.fresh if deviation is None else deviation) * noise


def step_coefficients(schedule: NoiseSchedule, sampler: str, i: int) -> StepCoefficients:
    """DDIM (arXiv 2010.02502, Eq. 12 with sigma = 0) or DDPM with fixed-small variance (arXiv 2006.11239, Eq. 6-7)."""
    a, after = schedule.alpha_bar[i], schedule.alpha_bar[i + 1]
    sigma, following = schedule.sigmas[i], schedule.sigmas[i + 1]
    kept = kept_share(sampler, sigma, following)
    fresh = math.sqrt(posterior_variance(a, after)) if sampler == "ddpm" else 0.0
    return StepCoefficients(
        math.sqrt(a), math.sqrt(1 - a), kept * math.sqrt(after / a), (1 - kept) * math.sqrt(after), fresh
    )


def posterior_variance(alpha_bar: float, next_alpha_bar: float) -> float:
    """The fixed-small variance of q(x_{t-1} | x_t, x_0) (DDPM, Eq. 7)."""
    return (1 - next_alpha_bar) / (1 - alpha_bar) * (1 - alpha_bar / next_alpha_bar)


def learned_range_std(v: Tensor, alpha_bar: float, next_alpha_bar: float) -> Tensor:
    """Standard deviation interpolated in log variance by v in [-1, 1] (Improved DDPM, arXiv 2102.09672, Eq. 15)."""
    low = math.log(posterior_variance(alpha_bar, next_alpha_bar))
    high = math.log(1 - alpha_bar / next_alpha_bar)
    mix = (v + 1) / 2
    return (0.5 * (mix * high + (1 - mix) * low)).exp()
