"""The reverse process, one step at a time: what generate(), calibration and variance fitting all advance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..caching.attach import feature_cache
from ..fused.dit import FusedDiT
from ..models.dit import DiT
from .guidance import guided_prediction
from .noise import GivenNoise, ImageNoise
from .samplers import SAMPLERS, ddim_step, ddpm_step, denoised_image, implied_noise
from .schedule import NoiseSchedule, from_sigmas, respaced

VARIANCES = ("fixed_small", "learned_range")


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample. `sigmas` (falling, ending at 0) replaces `steps` and `spacing`.

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

    def schedule(self) -> NoiseSchedule:
        return from_sigmas(self.sigmas) if self.sigmas is not None else respaced(self.steps, self.spacing)


class NoiseSource(Protocol):
    def draw(self) -> Tensor: ...


class ReverseProcess:
    """Denoises one batch with one model; `step(i, x, noise)` is the whole state machine."""

    def __init__(self, model: DiT | FusedDiT, class_labels: Sequence[int] | Tensor, config: SamplingConfig):
        self.model, self.config = model, config
        self.schedule = config.schedule()
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, model.pos_embed.dtype
        self.labels = check_labels(class_labels, model.config.num_classes).to(self.device)
        if config.variance == "learned_range" and not model.config.learn_sigma:
            raise ValueError("variance='learned_range' needs a model that predicts it, and this one has fixed sigma.")

    def __len__(self) -> int:
        return len(self.schedule)

    @property
    def shape(self) -> tuple[int, int, int]:
        config = self.model.config
        return (config.in_channels, config.input_size, config.input_size)

    def noise_source(self, seed: int, indices: Sequence[int], noise: Tensor | None = None) -> NoiseSource:
        if noise is None:
            return ImageNoise(seed, indices, self.shape)
        return GivenNoise(noise, seed, indices, self.model.config.in_channels)

    def needs_noise(self, i: int) -> bool:
        return self.config.sampler == "ddpm" and self.schedule.alpha_bar[i + 1] < 1

    def step(self, i: int, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """x_i -> (x_{i+1}, predicted clean image), both (N, C, H, W) float32."""
        config, alpha_bar, cache = self.config, self.schedule.alpha_bar, feature_cache(self.model)
        if cache is not None:
            cache.begin_step(i, self.schedule.sigmas)
        t = torch.full((len(x),), self.schedule.timesteps[i], device=self.device)
        eps, v = guided_prediction(
            self.model, x.to(self.dtype), t, self.labels, self.model.null_class,
            config.cfg_scale, config.guidance_channels, config.batched_guidance,
        )  # fmt: skip
        # Guidance is linear, so guiding the predicted image guides the noise.
        if self.model.config.prediction == "sample":
            eps = implied_noise(x, eps.float(), alpha_bar[i])
        eps = eps.float()
        x0 = denoised_image(x, eps, alpha_bar[i])
        if cache is not None:
            cache.observe(i, x0)
        if config.sampler == "ddim":
            return ddim_step(x, eps, alpha_bar[i], alpha_bar[i + 1]), x0
        learned = v.float() if v is not None and config.variance == "learned_range" else None
        return ddpm_step(x, eps, alpha_bar[i], alpha_bar[i + 1], noise, learned), x0


def check_labels(class_labels: Sequence[int] | Tensor, num_classes: int) -> Tensor:
    """Class ids as int64 (N,); the null class num_classes is allowed."""
    labels = torch.as_tensor(class_labels)
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point():
        raise ValueError("class_labels must be a non-empty list of integer class ids.")
    if labels.min() < 0 or labels.max() > num_classes:
        raise ValueError(
            f"class id {int(labels.min() if labels.min() < 0 else labels.max())} is out of range: this model has the "
            f"classes 0 to {num_classes - 1}, and {num_classes} for no class."
        )
    return labels.long()
