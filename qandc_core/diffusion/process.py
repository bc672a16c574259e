"""The reverse process, one step at a time: what generate(), calibration and variance fitting all advance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..caching.attach import feature_cache
from ..models.dit import PatchGrid
from ..values import real_number, whole_number
from .classes import check_labels
from .guidance import guided_prediction
from .noise import GivenNoise, ImageNoise
from .schedule import NoiseSchedule, from_sigmas, respaced
from .steps import SAMPLERS, learned_range_std, step_coefficients

VARIANCES = ("fixed_small", "learned_range")


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of a sampling run. `sigmas` (falling, ending at 0) is the whole schedule, in place of `steps` and
    `spacing`.

    `guidance_channels` None guides all channels; 3 gives the grids published for DiT.
    """

    steps: int = 50
    cfg_scale: float = 4.0
    sampler: str = "ddpm"
    spacing: str = "linspace"
    variance: str = "fixed_small"
    guidance_channels: int | None = None
    batched_guidance: bool = True
    sigmas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}.")
        if self.variance not in VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {self.variance!r}.")
        if self.sigmas is not None:
            self.take_steps_of(self.sigmas)
        real_number(vars(self), "cfg_scale", -1e6, 1e6)  # NaN is in no range
        if self.guidance_channels is not None:
            whole_number(vars(self), "guidance_channels", 0, 2**16)

    def take_steps_of(self, sigmas: tuple[float, ...]) -> None:
        steps = len(sigmas) - 1
        if self.steps not in (SamplingConfig.steps, steps) or self.spacing != SamplingConfig.spacing:
            raise ValueError("`sigmas` is the whole schedule; leave out `steps` and `spacing`.")
        object.__setattr__(self, "steps", steps)

    def schedule(self) -> NoiseSchedule:
        return from_sigmas(self.sigmas) if self.sigmas is not None else respaced(self.steps, self.spacing)


class NoiseSource(Protocol):
    def draw(self) -> Tensor: ...


class ReverseProcess:
    """Denoises one batch with one model; `step(i, x, noise)` is the whole state machine."""

    def __init__(self, model: PatchGrid, class_labels: Sequence[int] | Tensor, config: SamplingConfig):
        self.model, self.config = model, config
        self.schedule = config.schedule()
        self.device, self.dtype = model.pos_embed.device, model.pos_embed.dtype
        self.labels = check_labels(class_labels, model.config.num_classes, model.config.has_null_class).to(self.device)
        self.null_class = model.null_class if config.cfg_scale != 1 else -1
        if config.variance == "learned_range" and not model.config.learn_sigma:
            raise ValueError("variance='learned_range' needs a model that predicts it, and this one has fixed sigma.")

    def __len__(self) -> int:
        return len(self.schedule)

    def noise_source(self, seed: int, indices: Sequence[int], noise: Tensor | None = None) -> NoiseSource:
        if noise is None:
            return ImageNoise(seed, indices, self.model.config.shape)
        return GivenNoise(noise, seed, indices, self.model.config.in_channels)

    def needs_noise(self, i: int) -> bool:
        return self.config.sampler == "ddpm" and self.schedule.alpha_bar[i + 1] < 1

    def step(self, i: int, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """x_i -> (x_{i+1}, predicted clean image), both (N, C, H, W) float32."""
        config, cache = self.config, feature_cache(self.model)
        timestep = self.schedule.timesteps[i]
        t = torch.full((len(x),), timestep, device=self.device)
        with nullcontext() if cache is None else cache.step(i, self.schedule.sigmas, timestep, self.config.sampler):
            eps, v = guided_prediction(
                self.model,
                x.to(self.dtype),
                t,
                self.labels,
                self.null_class,
                config.cfg_scale,
                config.guidance_channels,
                config.batched_guidance,
            )
        coefficients = step_coefficients(self.schedule, config.sampler, i)
        # Guidance is linear, so guiding the predicted image guides the noise.
        predicts_image = self.model.config.prediction == "sample"
        x0 = eps.float() if predicts_image else coefficients.clean_image(x, eps.float())
        if cache is not None:
            cache.observe(i, x0)
        deviation = None
        if noise is not None and v is not None and config.variance == "learned_range":
            deviation = learned_range_std(v.float(), *self.schedule.alpha_bar[i : i + 2])
        return coefficients.advance(x, x0, noise, deviation), x0
