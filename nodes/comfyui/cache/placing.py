"""Places the computed steps of a run by a calibration."""

from __future__ import annotations

import comfy.samplers

from ....qandc_core.caching.runs import StepDistances
from ....qandc_core.calibration.file import Calibration
from ..settings import Settings
from ..wrappers import declares_noise


def placing(patcher, calibration: Calibration) -> tuple[StepDistances | None, list[str]]:
    """Its step distances with the run that they were measured on; or none and the reason."""
    if calibration.distances is None:
        return None, [f"the calibration does not place the steps because {calibration.missing_distances}"]
    sampling = calibration.sampling
    sampler = calibration.notes.get("sampler") if sampling is None else sampling.sampler
    adds_noise = calibration.notes.get("noisy", noisy(sampler))  # recorded runs say it themselves
    return StepDistances(calibration.distances, noise_levels(patcher, calibration), adds_noise), []


def noise_levels(patcher, calibration: Calibration) -> tuple[float, ...] | None:
    """Noise levels of the calibration's run; for files without them, those that KSampler would take on this model."""
    notes = calibration.notes
    if calibration.sigmas is not None or notes.get("scheduler") not in comfy.samplers.SCHEDULER_NAMES:
        return calibration.sigmas
    settings = Settings(None, None, notes["steps"], 1.0, notes["sampler"], notes["scheduler"])
    return tuple(settings.schedule(patcher).tolist())


def noisy(sampler: str | None) -> bool | None:
    """True if the sampler adds noise; None for one that is not known here."""
    if sampler not in comfy.samplers.SAMPLER_NAMES:
        return None
    return declares_noise(comfy.samplers.sampler_object(sampler))
