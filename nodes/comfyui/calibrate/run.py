"""Calibration of a MODEL: ComfyUI's sampling as the host of the engine's calibrate()."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management as mm

from ....qandc_core.calibration import run as engine
from ....qandc_core.calibration.choice import Batch, CalibrationConfig, Candidates
from ....qandc_core.calibration.digest import Digest
from ....qandc_core.calibration.file import Calibration
from ....qandc_core.calibration.layer_inputs import Observer, Watch
from ....qandc_core.sampling.remaining import Remaining
from ..model.dit import is_dit
from ..quantize.layers import calibrated, check_not_paper
from ..quantize.weights import fingerprint_of
from ..sampling import Progress, sample_new
from ..settings import Settings, image_numbers, images_of
from ..wrappers import WRAPPERS, on_one_device, replace_wrapper
from .candidates import Collecting, Watching
from .inputs import digest_of_inputs

CALIBRATION = "qandc_calibration"
VERSION = 4  # of what a partial file notes


def calibrate(
    patcher,
    settings: Settings,
    latent: dict[str, Any],
    plan: CalibrationConfig,
    partial: Path | None = None,
    estimate: Remaining | None = None,
) -> Calibration:
    """Statistics of every linear layer within blocks, on trajectories of any MODEL sampled with these settings.

    latent is a LATENT as `prepared` gives it; its images are where trajectories start from, in turn.
    """
    return engine.calibrate(SamplingHost(patcher, settings, latent, estimate), plan, partial)


class SamplingHost:
    """Trajectories of a MODEL, as a stock sampler node samples them, with all its wrappers and patches."""

    def __init__(self, patcher, settings: Settings, latent: dict[str, Any], estimate: Remaining | None = None):
        patcher = settings.guider_on(patcher).model_patcher  # hooks may need one that is not dynamic
        self.patcher, self.settings, self.latent = patcher, settings, latent
        check_not_paper(patcher.model.diffusion_model)
        self.layers = calibrated(patcher.model.diffusion_model)
        if not self.layers:
            raise ValueError(
                "This model has no linear layer of ComfyUI's within blocks, so there is nothing to calibrate."
            )
        self.fingerprint, self.device = fingerprint_of(patcher), patcher.load_device
        self.steps = settings.steps_on(patcher)
        self.all_run, self.progress = is_dit(patcher), Progress(patcher, 0, estimate)

    def expect(self, steps: int) -> None:
        self.progress.total = self.progress.done + steps

    def room(self) -> int:
        """Half of the memory that the loaded model and its activations leave."""
        missing = max(0, self.patcher.model_size() - self.patcher.loaded_size())
        return int(max(0, mm.get_free_memory(self.device) - missing - mm.minimum_inference_memory()) // 2)

    def ran_out_of_memory(self, error: Exception) -> bool:
        if not mm.is_oom(error):
            return False
        mm.soft_empty_cache()
        return True

    def collect(self, candidates: Candidates, run: int, batch: Batch, watch: Watch | None = None) -> None:
        collecting = Collecting(candidates, run, self.patcher.model, watch)
        self.sample(collecting, batch)
        if not collecting.call:
            raise ValueError(
                f"The guider {type(self.settings.guider).__name__} samples without ComfyUI's CFGGuider, so its model "
                "calls cannot be observed; use one of ComfyUI's guiders."
            )

    def observe(self, observer: Observer, batch: Batch) -> None:
        self.sample(Watching(self.patcher.model, observer), batch)

    def sample(self, watch: Watching, batch: Batch) -> None:
        """One sampling run whose predictions and model calls pass through `watch`."""
        watched = self.progress.timed(self.patcher.clone())
        on_one_device(watched)  # whose layers are observed
        replace_wrapper(watched, WRAPPERS.PREDICT_NOISE, CALIBRATION, watch.predict_noise)
        replace_wrapper(watched, WRAPPERS.APPLY_MODEL, CALIBRATION, watch.apply_model)
        images = images_of(self.latent, image_numbers(batch, self.settings.count))
        sample_new(watched, self.settings, images, batch.seed, self.progress.step, batch.first, batch.prompt)


def digest_of(patcher, settings: Settings, latent: dict[str, Any], plan: CalibrationConfig) -> Digest:
    """Equal only for equal inputs of `calibrate`: weights, LoRAs, prompts, guider, controls, hooks, patches, cache,
    sampler, noise levels, noise, what trajectories start from, plan.
    """
    return digest_of_inputs(VERSION, patcher, settings.schedule(patcher), settings, latent, plan)
