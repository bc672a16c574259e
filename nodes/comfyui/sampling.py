"""Stock sampling with progress, preview and interruption, as KSampler does it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import latent_preview
from torch import Tensor

from ...qandc_core.sampling.remaining import Remaining
from .settings import Settings, parts_of
from .wrappers import WRAPPERS, replace_wrapper


class Progress:
    """One bar over several sampling runs, with the preview of the newest image; ends within a step when cancelled.

    An estimate is told how the sampling of a model `timed` by it goes.
    """

    def __init__(self, patcher, total: int, estimate: Remaining | None = None):
        self.estimate = estimate
        self.bar = comfy.utils.ProgressBar(total)
        self.total, self.done = total, 0
        latent_format = getattr(patcher.model, "latent_format", None)  # a text encoder has none
        self.previewer = latent_format and latent_preview.get_previewer(patcher.load_device, latent_format)

    def step(self, index: int, denoised: Tensor, x: Tensor, steps: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if self.previewer:
            preview = self.previewer.decode_latent_to_preview_image("JPEG", parts_of(denoised)[0])
        self.bar.update_absolute(self.done + index + 1, self.total, preview)
        if self.estimate is not None:
            self.estimate.step(self.total - self.done - index - 1, last=index + 1 == steps)
        if index + 1 == steps:
            self.done += steps

    def timed(self, patcher):
        """The MODEL; the estimate leaves out what it does before it samples, such as loading its weights."""
        estimate = self.estimate
        if estimate is None:
            return patcher

        def sampling(executor, *args, **kwargs):
            estimate.resume()
            return executor(*args, **kwargs)

        replace_wrapper(patcher, WRAPPERS.SAMPLER_SAMPLE, "qandc_estimate", sampling)
        return patcher

    def advance(self, picture=None) -> None:
        """One unit of work that is no sampling step."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done += 1
        self.bar.update_absolute(self.done, self.total, None if picture is None else ("JPEG", picture, 560))


def fitted_latent(patcher, latent: dict[str, Any]) -> Tensor:
    """The samples of a LATENT, an empty one given this model's channels and resolution."""
    taken = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters  # which ratios depends on the version
    ratios = {key: value for key, value in latent.items() if key.startswith("downscale_ratio") and key in taken}
    return comfy.sample.fix_empty_latent_channels(patcher, latent["samples"], **ratios)


def prepared(patcher, latent: dict[str, Any]) -> dict[str, Any]:
    """A LATENT whose samples fit the model, as sampler nodes make it before they sample."""
    return {**latent, "samples": fitted_latent(patcher, latent)}


def sample(
    patcher,
    settings: Settings,
    latent: Tensor,
    noise: Tensor,
    seed: int,
    callback: Callable,
    mask: Tensor | None = None,
    *,
    prompt: int = 0,
    first: int = 0,
) -> Tensor:
    """Samples as KSampler, KSampler (Advanced), SamplerCustom or SamplerCustomAdvanced does with these settings."""
    samples = settings.guider_on(patcher, prompt, first).sample(
        noise,
        latent,
        settings.sampler_object(),
        settings.schedule(patcher),
        denoise_mask=mask,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    samples = samples.to(comfy.model_management.intermediate_device())
    return samples if settings.guider is not None else samples.to(dtype=comfy.model_management.intermediate_dtype())


def sample_new(
    patcher, settings: Settings, latent: dict[str, Any], seed: int, callback: Callable, first: int = 0, prompt: int = 0
) -> Tensor:
    """Images of a LATENT and the noise of the seed; they are those of a prompt from number `first` on."""
    mask, noise = latent.get("noise_mask"), settings.noise_of(latent, seed)
    return sample(patcher, settings, latent["samples"], noise, seed, callback, mask, prompt=prompt, first=first)
