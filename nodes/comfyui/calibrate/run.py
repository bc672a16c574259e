"""Calibration of a MODEL: ComfyUI's sampling as the host of the engine's calibrate()."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management as mm
from torch import Tensor

from ....qandc_core.calibration import run as engine
from ....qandc_core.calibration.choice import SELECTIONS, CalibrationConfig, Candidates
from ....qandc_core.calibration.digest import Digest
from ....qandc_core.calibration.file import Calibration
from ....qandc_core.calibration.layer_inputs import Observer
from ..model.dit import is_dit
from ..quantize.layers import calibrated, check_not_paper
from ..quantize.weights import fingerprint_of
from ..sampling import Progress, Settings, fitted_latent, sample_new
from ..wrappers import WRAPPERS, on_one_device, replace_wrapper
from .candidates import Collecting
from .inputs import digest_of_inputs, schedule_of
from .layer_inputs import Observing

__all__ = ["SELECTIONS", "CalibrationConfig", "calibrate", "digest_of", "empty_latent"]
KEY = "qandc_calibration"
VERSION = 2  # of what a partial file notes


def calibrate(
    patcher, settings: Settings, latent: Tensor, plan: CalibrationConfig, partial: Path | None = None
) -> Calibration:
    """Statistics of every linear layer within blocks, on trajectories of any MODEL sampled with these settings.

    latent is as `empty_latent` gives it.
    """
    return engine.calibrate(SamplingHost(patcher, settings, latent), plan, partial)


class SamplingHost:
    """Trajectories of a MODEL, as KSampler samples them, with everything that is attached to it."""

    def __init__(self, patcher, settings: Settings, latent: Tensor):
        self.patcher, self.settings, self.latent = patcher, settings, latent
        check_not_paper(patcher.model.diffusion_model)
        self.layers = calibrated(patcher.model.diffusion_model)
        if not self.layers:
            raise ValueError(
                "This model has no linear layer of ComfyUI's within blocks, so there is nothing to calibrate."
            )
        self.fingerprint, self.device, self.steps = fingerprint_of(patcher), patcher.load_device, settings.steps
        self.all_run, self.progress = is_dit(patcher), Progress(patcher, 0)

    def expect(self, steps: int) -> None:
        self.progress.total = self.progress.done + steps

    def room(self) -> int:
        """Half of the memory that the loaded model and its activations leave."""
        missing = max(0, self.patcher.model_size() - self.patcher.loaded_size())
        return int(max(0, mm.get_free_memory(self.device) - missing - mm.minimum_inference_memory()) // 2)

    def collect(self, candidates: Candidates, run: int, seed: int, size: int, first: int) -> None:
        self.sample(Collecting(candidates, run), seed, size, first)

    def observe(self, observer: Observer, seed: int, size: int, first: int) -> None:
        self.sample(Observing(observer), seed, size, first)

    def sample(self, watch: Collecting | Observing, seed: int, size: int, first: int) -> None:
        """One sampling run whose predictions and model calls pass through `watch`."""
        watched, latent = self.patcher.clone(), self.latent[[0] * size]
        on_one_device(watched)  # whose layers are observed
        replace_wrapper(watched, WRAPPERS.PREDICT_NOISE, KEY, watch.predict_noise)
        replace_wrapper(watched, WRAPPERS.APPLY_MODEL, KEY, watch.apply_model)
        sample_new(watched, self.settings, latent, seed, self.progress.step, first)


def empty_latent(patcher, latent: dict[str, Any]) -> Tensor:
    """One empty latent of the LATENT's shape; a nested one of video and sound stays nested."""
    return fitted_latent(patcher, {**latent, "samples": latent["samples"] * 0})[:1].float()


def digest_of(patcher, settings: Settings, latent: Tensor, plan: CalibrationConfig) -> Digest:
    """Equal only for equal inputs of `calibrate`: weights, LoRAs, prompts, controls, hooks, patches, cache, schedule,
    plan.
    """
    shapes = [tuple(part.shape) for part in (latent.unbind() if latent.is_nested else [latent])]
    return digest_of_inputs(VERSION, patcher, schedule_of(patcher, settings), settings, shapes, plan)
