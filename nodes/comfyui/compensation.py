"""Variance compensation under stock samplers: the wrappers that correct and fit (see qandc_core.compensation)."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import comfy.model_management as mm
import torch
from torch import Tensor

from ...qandc_core.caching.steps import step_at
from ...qandc_core.calibration.choice import Batch, CalibrationConfig
from ...qandc_core.compensation.correction import (
    Shapes,
    VarianceCompensation,
    check_falling,
    compensate_parts,
    is_identity,
    preserved_scale,
    shifted,
)
from ...qandc_core.compensation.fit import JointFit, SequentialFit
from ...qandc_core.compensation.turns import Turns
from ...qandc_core.sampling.remaining import Remaining
from .fitted import FittedFor, differs
from .sampling import Progress, sample_new
from .settings import Settings, guidance_of, image_numbers, images_of, sampler_options
from .wrappers import (
    WRAPPERS,
    details,
    is_flow,
    note,
    options_of_run,
    replace_wrapper,
    reports_of,
    sampler_function_name,
    scalar,
)

COMPENSATION = "qandc_compensation"
EXACT_SAMPLERS = {"sample_euler": "ddim", "sample_ddpm": "ddpm"}  # ComfyUI's ddim is sample_euler
FREE = ("dpm_fast", "dpm_adaptive")  # samplers that place their own noise levels
log = logging.getLogger(__name__)


@dataclass
class RunState:
    """State that the predictions of one run read: its noise levels, sampler, and the parts of a nested latent."""

    sigmas: list[float]
    sampler: str
    shapes: Shapes = field(default_factory=tuple)


def parts_of_run(latent: Tensor, kwargs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Shapes without N of the parts of a run's latent, which OUTER_SAMPLE gets flattened and joined."""
    return [tuple(shape[1:]) for shape in kwargs.get("latent_shapes") or [latent.shape]]


class Correcting:
    """Wrappers of a model whose samples are corrected before every step (Q&C, Eq. 10)."""

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """OUTER_SAMPLE: the run's predictions know its noise levels and its sampler."""
        guider, parts = executor.class_obj, parts_of_run(latent_image, kwargs)
        run = RunState(sigmas.tolist(), sampler_function_name(sampler), parts if len(parts) > 1 else ())
        check_falling(run.sigmas)
        self.begin(guider, sampler, run, noise, [part[0] for part in parts])
        with options_of_run(guider) as options:
            options[COMPENSATION] = run
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def predict_noise(self, executor, x, timestep, model_options, seed):
        run: RunState = model_options["transformer_options"][COMPENSATION]
        sigma = scalar(timestep)
        step = step_at(run.sigmas, sigma)
        if abs(run.sigmas[step] - sigma) > 1e-4 * sigma:  # between two steps of a multi-stage sampler
            return executor(x, timestep, model_options, seed)
        scale = preserved_scale(sigma, is_flow(executor.class_obj.inner_model))
        mean, factor = self.factors(run, step, sigma, x * scale)
        if is_identity(factor):
            return executor(x, timestep, model_options, seed)
        corrected = compensate_parts(x * scale, mean, factor, run.shapes) / scale
        denoised = executor(corrected, timestep, model_options, seed)
        return shifted(denoised, x, corrected, EXACT_SAMPLERS.get(run.sampler, "ddim"), sigma, run.sigmas[step + 1])

    def begin(self, guider, sampler, run: RunState, noise: Tensor, channels: Sequence[int]) -> None:
        """Raises ValueError on a run that cannot be corrected."""

    def factors(self, run: RunState, step: int, sigma: float, given: Tensor) -> tuple[Tensor, Tensor]:
        """mean and K (C,) for the sample `given` in variance-preserving units."""
        raise NotImplementedError


class CompensatedRun(Correcting):
    def __init__(self, variance: VarianceCompensation, fitted: FittedFor):
        self.variance, self.fitted = variance, fitted

    def begin(self, guider, sampler, run: RunState, noise: Tensor, channels: Sequence[int]) -> None:
        variance, levels = self.variance, run.sigmas[:-1]
        self.fitted.check(guider, sampler, channels)
        variance.check(levels)
        if sum(channels) != variance.factor.shape[1]:
            fitted = variance.factor.shape[1]
            raise differs("for channels", fitted, "has", sum(channels), "fit again for this model")
        if levels and variance.find(levels[0]) and noise.any():
            raise ValueError(
                f"The variance compensation was fitted from sigma {float(variance.sigmas[0]):.4g} on, and this run "
                f"begins with new noise at {levels[0]:.4g}, where nothing has drifted yet; fit it for these steps."
            )
        if run.sampler not in EXACT_SAMPLERS:
            log.info("Q&C variance compensation: exact for euler, ddim and ddpm, approximate for this sampler.")
        for report in reports_of(guider.model_options["transformer_options"]):
            report.factors = [variance.at(sigma)[1].tolist() for sigma in levels]

    def factors(self, run: RunState, step: int, sigma: float, given: Tensor) -> tuple[Tensor, Tensor]:
        return self.variance.at(sigma)


def attach_compensation(patcher, variance: VarianceCompensation, fitted: FittedFor):
    clone = attached(patcher, CompensatedRun(variance, fitted))
    note(clone, "compensation", "variance compensation")
    return clone


def attached(patcher, run: Correcting):
    clone = patcher.clone()
    replace_wrapper(clone, WRAPPERS.OUTER_SAMPLE, COMPENSATION, run.outer_sample)
    replace_wrapper(clone, WRAPPERS.PREDICT_NOISE, COMPENSATION, run.predict_noise)
    return clone


class ReferenceRun(Correcting):
    """The reference run: keeps its samples (in variance-preserving units, on CPU) by noise level, corrects nothing."""

    def __init__(self) -> None:
        self.samples: dict[float, Tensor] = {}
        self.channels: list[int] = []

    def begin(self, guider, sampler, run: RunState, noise: Tensor, channels: Sequence[int]) -> None:
        self.channels = list(channels)
        if any(part in run.sampler for part in FREE):
            raise no_steps(run.sampler)

    def factors(self, run: RunState, step: int, sigma: float, given: Tensor) -> tuple[Tensor, Tensor]:
        self.samples.setdefault(run.sigmas[step], given.cpu())
        return torch.zeros(sum(self.channels)), torch.ones(sum(self.channels))


class Fitting(Correcting):
    """An accelerated run: fits K_t at each step on samples that all earlier corrections already went into."""

    def __init__(self, joint: JointFit, recording: ReferenceRun):
        self.joint, self.recording = joint, recording

    def begin(self, guider, sampler, run: RunState, noise: Tensor, channels: Sequence[int]) -> None:
        if list(self.recording.samples) != run.sigmas[:-1]:
            raise no_steps(run.sampler)

    def factors(self, run: RunState, step: int, sigma: float, given: Tensor) -> tuple[Tensor, Tensor]:
        def pair() -> tuple[Tensor, Tensor]:
            return self.recording.samples.pop(run.sigmas[step]), given

        return self.joint.step(step, sigma, pair, run.shapes)

    def sampler_sample(self, executor, *args, **kwargs):
        """SAMPLER_SAMPLE: what follows unloads the model's hooks, which the other runs' last calls still need."""
        samples = executor(*args, **kwargs)
        self.joint.wait()
        return samples


def no_steps(sampler: str) -> ValueError:
    return ValueError(
        f"{sampler} does not evaluate the model at every noise level of its schedule, so there are no steps to "
        "compensate; choose another sampler, such as euler."
    )


def fit_compensation(
    reference,
    accelerated,
    settings: Settings,
    latent: dict[str, Any],
    plan: CalibrationConfig,
    estimate: Remaining | None = None,
    *,
    method: str,
    start: float,
    end: float,
) -> tuple[VarianceCompensation, FittedFor, int]:
    """Samples the images of a plan with both models from one noise and fits K_t step by step, over all of them.

    Q&C, Eq. 9-12. Out of memory it starts again with half as many images at once, which gives what that number would
    have given from the beginning; also returns the number. Raises ValueError, before the accelerated run, on bounds,
    methods and samplers that cannot be fitted.
    """
    while True:
        fit = SequentialFit(settings.steps_on(reference), method, start=start, end=end)
        pairing = Pairing(reference, accelerated, settings, latent, plan, estimate)
        largest = max(batch.size for batch in pairing.batches)
        try:
            return pairing.run(fit)
        except Exception as error:
            if largest == 1 or not mm.is_oom(error):
                raise
        log.warning("Q&C compensation: out of memory with %d pairs at once, continuing with %d.", largest, largest // 2)
        plan = replace(plan, batch_size=largest // 2)
        del pairing
        gc.collect()
        mm.soft_empty_cache()


class Pairing:
    """The runs of a fit: every batch with the reference, then all batches with the accelerated model, in turns."""

    def __init__(self, reference, accelerated, settings, latent, plan: CalibrationConfig, estimate: Remaining | None):
        self.reference, self.accelerated, self.settings, self.latent = reference, accelerated, settings, latent
        self.plan, self.batches = plan, list(plan.batches())
        steps = 2 * settings.steps_on(reference) * len(self.batches)
        self.progress = Progress(accelerated, steps, estimate)

    def run(self, fit: SequentialFit) -> tuple[VarianceCompensation, FittedFor, int]:
        turns, recordings = Turns(), [ReferenceRun() for _ in self.batches]
        for recording, batch in zip(recordings, self.batches):
            self.sample(attached(self.reference, recording), batch)
        fit.steps, joint = len(recordings[0].samples), JointFit(fit, turns.wait)
        runs = [partial(self.fit_one, joint, *each) for each in zip(recordings, self.batches)]
        turns.take(runs)
        settings, sampler = self.settings, self.settings.sampler_object()
        fitted = FittedFor(
            sampler_function_name(sampler),
            sampler_options(sampler),
            guidance_of(settings.guider_on(self.reference)),
            recordings[0].channels,
            details(self.accelerated),
        )
        return fit.result(), fitted, self.plan.batch_size

    def fit_one(self, joint: JointFit, recording: ReferenceRun, batch: Batch) -> None:
        fitting = Fitting(joint, recording)
        patcher = attached(self.accelerated, fitting)
        replace_wrapper(patcher, WRAPPERS.SAMPLER_SAMPLE, COMPENSATION, fitting.sampler_sample)
        self.sample(patcher, batch)

    def sample(self, patcher, batch: Batch) -> None:
        images = images_of(self.latent, image_numbers(batch, self.settings.count))
        timed = self.progress.timed(patcher)
        sample_new(timed, self.settings, images, batch.seed, self.count, batch.first, batch.prompt)

    def count(self, index: int, denoised: Tensor, x: Tensor, steps: int) -> None:
        """One step of any run: several may be under way."""
        self.progress.step(0, denoised, x, 1)
