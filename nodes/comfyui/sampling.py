"""Stock sampling with progress, preview and interruption, as KSampler does it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.nested_tensor
import comfy.sample
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...qandc_core.diffusion.classes import is_classes


@dataclass(frozen=True)
class Settings:
    """What a stock sampling node takes beside model, latent and seed. Raises ValueError on a cfg that is no number."""

    positive: Any
    negative: Any
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cfg) and math.isfinite(self.denoise)):
            raise ValueError(f"cfg and denoise must be finite numbers, got {self.cfg} and {self.denoise}.")

    def describe(self) -> dict[str, Any]:
        return {"sampler": self.sampler_name, "scheduler": self.scheduler, "steps": self.steps, "cfg": self.cfg}


class Progress:
    """One bar over several sampling runs, with the preview of the newest image; ends within a step when cancelled."""

    def __init__(self, patcher, total: int):
        self.bar = comfy.utils.ProgressBar(total)
        self.total, self.done = total, 0
        self.previewer = latent_preview.get_previewer(patcher.load_device, patcher.model.latent_format)

    def step(self, index: int, denoised: Tensor, x: Tensor, steps: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if self.previewer:
            preview = self.previewer.decode_latent_to_preview_image("JPEG", parts_of(denoised)[0])
        self.bar.update_absolute(self.done + index + 1, self.total, preview)
        if index + 1 == steps:
            self.done += steps

    def advance(self, picture=None) -> None:
        """One unit of work that is no sampling step."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done += 1
        self.show(picture)

    def show(self, picture) -> None:
        """Where the work stands, with a picture that stays until the next."""
        self.bar.update_absolute(self.done, self.total, None if picture is None else ("JPEG", picture, 560))


def fitted_latent(patcher, latent: dict[str, Any]) -> Tensor:
    """The samples of a LATENT, an empty one given this model's channels and resolution."""
    taken = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters  # which ratios depends on the version
    ratios = {key: value for key, value in latent.items() if key.startswith("downscale_ratio") and key in taken}
    return comfy.sample.fix_empty_latent_channels(patcher, latent["samples"], **ratios)


def parts_of(latent) -> list[Tensor]:
    """The tensors of a latent: several where it is nested, as of video and sound."""
    return latent.unbind() if latent.is_nested else [latent]


def empty_latents(patcher, latent: dict[str, Any], count: int):
    """`count` empty latents of the LATENT's shape, nested where it is."""
    fitted = fitted_latent(patcher, {**latent, "samples": latent["samples"] * 0})
    parts = [torch.zeros(count, *part.shape[1:]) for part in parts_of(fitted)]
    return comfy.nested_tensor.NestedTensor(parts) if fitted.is_nested else parts[0]


def sample(
    patcher,
    settings: Settings,
    latent: Tensor,
    noise: Tensor,
    seed: int,
    callback: Callable,
    mask: Tensor | None = None,
) -> Tensor:
    """What KSampler does."""
    return comfy.sample.sample(
        patcher, noise, settings.steps, settings.cfg, settings.sampler_name, settings.scheduler, settings.positive,
        settings.negative, latent, denoise=settings.denoise, noise_mask=mask, callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed,
    )  # fmt: skip


def from_image(conditioning, first: int):
    """Conditioning of a batch whose first image is number `first`: batches of prompts and lists of classes go on where
    the batch before stopped, instead of starting again.
    """
    rotated = []
    for context, options in conditioning:
        prompts = len(context) if isinstance(context, torch.Tensor) and context.ndim else 1
        options = {key: rolled(value, prompts, first) for key, value in options.items()}
        context = context.roll((-first, -first), (0, 1)) if is_classes(context) else rolled(context, prompts, first)
        rotated.append([context, options])
    return rotated


def rolled(value: Any, prompts: int, first: int) -> Any:
    """A batch of as many prompts, such as their pooled outputs, with number `first` in front; all else as it is."""
    if isinstance(value, torch.Tensor) and prompts > 1 and value.ndim and len(value) == prompts:
        return value.roll(-first, 0)
    return value


def sample_new(patcher, settings: Settings, latent: Tensor, seed: int, callback: Callable, first: int = 0) -> Tensor:
    """Images from pure noise of the seed; `first` is the number of the batch's first image."""
    settings = replace(
        settings, positive=from_image(settings.positive, first), negative=from_image(settings.negative, first)
    )
    return sample(patcher, settings, latent, comfy.sample.prepare_noise(latent, seed), seed, callback)
