"""Which timesteps a run visits and how much noise each holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TRAINING_STEPS = 1000
SPACINGS = ("linspace", "leading")


def linear_alpha_bar() -> Tensor:
    """alpha_bar (1000,) float64 of the linear schedule, beta 1e-4..0.02 (DDPM, arXiv 2006.11239)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, TRAINING_STEPS, dtype=torch.float64), dim=0)


@dataclass(frozen=True)
class NoiseSchedule:
    """Timesteps (T,), falling, in training steps; alpha_bar (T + 1,), the last 1 where the clean image is reached."""

    timesteps: tuple[int, ...]
    alpha_bar: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels sqrt((1 - alpha_bar) / alpha_bar) of the variance-exploding form."""
        return tuple(((1 - a) / a) ** 0.5 for a in self.alpha_bar)


def respaced(steps: int, spacing: str = "linspace") -> NoiseSchedule:
    """Visits `steps` of the 1000 training steps, spaced as diffusers names it: linspace (999 to 0) or leading."""
    if not isinstance(steps, int) or not 1 <= steps <= TRAINING_STEPS:
        raise ValueError(f"steps must be between 1 and {TRAINING_STEPS}, got {steps}.")
    if spacing == "linspace":
        # numpy's arithmetic, as in diffusers: torch.linspace falls on the other side of 499.5 for some step counts
        stride = (TRAINING_STEPS - 1) / max(steps - 1, 1)
        timesteps = (torch.arange(steps, dtype=torch.float64) * stride).round().long().flip(0)
    elif spacing == "leading":
        timesteps = (torch.arange(steps) * (TRAINING_STEPS // steps)).flip(0)
    else:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}.")
    return NoiseSchedule(tuple(timesteps.tolist()), (*linear_alpha_bar()[timesteps].tolist(), 1.0))


def from_sigmas(sigmas: Sequence[float] | Tensor) -> NoiseSchedule:
    """Schedule of falling noise levels (T + 1,); the timestep is the training step nearest in log sigma."""
    values = torch.as_tensor(sigmas, dtype=torch.float64)
    if (
        values.ndim != 1
        or len(values) < 2
        or not (values[:-1] > values[1:]).all()
        or values[-1] < 0
        or values[0].isinf()
    ):
        raise ValueError("sigmas must be a falling sequence of at least two noise levels that ends at 0 or above.")
    alpha_bar = linear_alpha_bar()
    table = ((1 - alpha_bar) / alpha_bar).log() / 2
    nearest = (values[:-1].log()[:, None] - table[None]).abs().argmin(dim=1)
    return NoiseSchedule(tuple(nearest.tolist()), tuple((1 / (1 + values**2)).tolist()))
