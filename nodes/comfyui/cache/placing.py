"""What a calibration says about where the computed steps of a run should lie."""

from __future__ import annotations

import comfy.samplers

from ....qandc_core.caching.runs import StepDistances
from ....qandc_core.calibration.file import Calibration
from ..wrappers import sampler_function_name
from .run import adds_noise


def placing(patcher, calibration: Calibration) -> tuple[StepDistances | None, list[str]]:
    """Its step distances with the run that they were measured on; or none and the reason."""
    made = calibration.notes if calibration.sampling is None else {"sampler": calibration.sampling.sampler}
    sampler, spaced = made.get("sampler", ""), "the computed steps have the default spacing"
    if calibration.distances is not None:
        return StepDistances(calibration.distances, noise_levels(patcher, calibration), noisy(sampler)), []
    if "cache" in calibration.notes.get("attached", {}):
        return None, [f"the calibration was made with a cache and cannot place steps, one made without can; {spaced}"]
    if sampler:
        return None, [
            f"the calibration cannot place steps because {sampler} skips noise levels of the schedule; {spaced}"
        ]
    return None, [f"the calibration has no step distances, so {spaced}"]


def noise_levels(patcher, calibration: Calibration) -> tuple[float, ...] | None:
    """Those of the calibration's run; of files that do not note them, those that KSampler would take on this model."""
    notes = calibration.notes
    if "sigmas" in notes:
        return tuple(notes["sigmas"])
    if calibration.sampling is not None:
        return calibration.sampling.schedule().sigmas
    if notes.get("scheduler") not in comfy.samplers.SCHEDULER_NAMES:
        return None
    run = comfy.samplers.KSampler(
        patcher, notes["steps"], patcher.load_device, notes["sampler"], notes["scheduler"], denoise=1.0
    )
    return tuple(run.sigmas.tolist())


def noisy(sampler: str) -> bool | None:
    """Whether the sampler adds noise; None for one that is not known here."""
    if sampler not in comfy.samplers.SAMPLER_NAMES:
        return None
    return adds_noise(sampler_function_name(comfy.samplers.sampler_object(sampler)))
