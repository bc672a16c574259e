"""Variance compensation under stock samplers: the model sees corrected samples, the sampler shifted predictions."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ...qandc_core.compensation.correction import VarianceCompensation, compensate
from ...qandc_core.compensation.factors import VarianceMoments
from .sampling import Progress, Settings, sample_new
from .wrappers import (
    REPORT,
    WRAPPERS,
    is_flow,
    note,
    options_of_run,
    replace_wrapper,
    sampler_function_name,
    scalar,
    step_at,
)

KEY = "qandc_compensation"
log = logging.getLogger(__name__)


def preserved_scale(sigma: float, flow: bool) -> float:
    """What turns a sample at sigma into variance-preserving units, in which mean and K are kept."""
    return 1.0 if flow else (1 + sigma**2) ** -0.5


def shift(sampler_name: str, sigma: float, following: float) -> float:
    """c1 / c2 of the step x' = c1 x + c2 D from sigma to the following one: DDPM's posterior, Euler for all others."""
    ratio = following / sigma
    kept = ratio**2 if sampler_name == "sample_ddpm" else ratio
    return kept / (1 - kept)


def shifted(
    denoised: Tensor, x: Tensor, corrected: Tensor, sampler_name: str, sigma: float, following: float
) -> Tensor:
    """D' = D + (x~ - x) c1 / c2: a step from x with D' ends where a step from x~ with D does."""
    return denoised + (corrected - x) * shift(sampler_name, sigma, following)


FIRST_ORDER = ("sample_euler", "sample_ddpm")


def sample_with_schedule(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    """OUTER_SAMPLE: the run's predictions know its noise levels and its sampler."""
    guider = executor.class_obj
    saved, options = guider.model_options, options_of_run(guider)
    options[KEY] = (sigmas.tolist(), sampler_function_name(sampler))
    try:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        guider.model_options = saved


class CompensatedRun:
    """Wrappers of a model whose samples are corrected before every step (Q&C, Eq. 10)."""

    def __init__(self, variance: VarianceCompensation, fitted_sampler: str):
        self.variance, self.fitted_sampler = variance, fitted_sampler

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        levels, name = sigmas.tolist()[:-1], sampler_function_name(sampler)
        self.variance.check(levels)
        if name != self.fitted_sampler:
            raise ValueError(
                f"The variance compensation was fitted with {self.fitted_sampler} and this run samples with "
                f"{name}; choose the same sampler in both nodes."
            )
        if name not in FIRST_ORDER:
            log.info("Q&C variance compensation: exact for euler, ddim and ddpm, approximate for this sampler.")
        report = executor.class_obj.model_options["transformer_options"].get(REPORT)
        if report is not None:
            report.factors = [self.variance.factor[self.variance.find(sigma)].tolist() for sigma in levels]
        return sample_with_schedule(executor, noise, latent_image, sampler, sigmas, *args, **kwargs)

    def predict_noise(self, executor, x, timestep, model_options, seed):
        schedule, name = model_options["transformer_options"][KEY]
        sigma, scale = scalar(timestep), preserved_scale(scalar(timestep), is_flow(executor.class_obj.inner_model))
        step = step_at(schedule, sigma)
        if abs(schedule[step] - sigma) > 1e-4 * sigma:  # between two steps of a multi-stage sampler
            return executor(x, timestep, model_options, seed)
        given = x * scale
        corrected = self.variance.correct(given, sigma)
        if corrected is given:
            return executor(x, timestep, model_options, seed)
        corrected = corrected / scale
        denoised = executor(corrected, timestep, model_options, seed)
        return shifted(denoised, x, corrected, name, sigma, schedule[step + 1])


def attach_compensation(patcher, variance: VarianceCompensation, fitted_sampler: str):
    clone = patcher.clone()
    run = CompensatedRun(variance, fitted_sampler)
    replace_wrapper(clone, WRAPPERS.OUTER_SAMPLE, KEY, run.outer_sample)
    replace_wrapper(clone, WRAPPERS.PREDICT_NOISE, KEY, run.predict_noise)
    note(clone, "compensation", "variance compensation")
    return clone


def detach_compensation(patcher):
    clone = patcher.clone()
    for kind in (WRAPPERS.OUTER_SAMPLE, WRAPPERS.PREDICT_NOISE):
        clone.remove_wrappers_with_key(kind, KEY)
    note(clone, "compensation", "")
    return clone


class Recording:
    """PREDICT_NOISE of the reference run: keeps its samples (in variance-preserving units, on CPU) by noise level."""

    def __init__(self) -> None:
        self.samples: dict[float, Tensor] = {}

    def __call__(self, executor, x, timestep, model_options, seed):
        sigma = scalar(timestep)
        scale = preserved_scale(sigma, is_flow(executor.class_obj.inner_model))
        self.samples.setdefault(sigma, (x * scale).cpu())
        return executor(x, timestep, model_options, seed)


class Fitting:
    """The accelerated run: fits K_t at each step on samples that all earlier corrections already went into."""

    def __init__(self, reference: dict[float, Tensor], method: str, eps: float, start: float, end: float):
        self.reference, self.method, self.eps, self.start, self.end = reference, method, eps, start, end
        self.sigmas: list[float] = []
        self.means: list[Tensor] = []
        self.factors: list[Tensor] = []

    def predict_noise(self, executor, x, timestep, model_options, seed):
        schedule, name = model_options["transformer_options"][KEY]
        sigma = scalar(timestep)
        step, last = step_at(schedule, sigma), self.sigmas[-1] if self.sigmas else float("inf")
        if abs(schedule[step] - sigma) > 1e-4 * sigma or sigma >= last:
            return executor(x, timestep, model_options, seed)
        scale = preserved_scale(sigma, is_flow(executor.class_obj.inner_model))
        mean, factor = self.fit(step, len(schedule) - 1, sigma, x * scale)
        if torch.equal(factor, torch.ones_like(factor)):
            return executor(x, timestep, model_options, seed)
        corrected = compensate(x * scale, mean, factor) / scale
        denoised = executor(corrected, timestep, model_options, seed)
        return shifted(denoised, x, corrected, name, sigma, schedule[step + 1])

    def fit(self, step: int, steps: int, sigma: float, accelerated: Tensor) -> tuple[Tensor, Tensor]:
        channels = accelerated.shape[1]
        mean, factor = torch.zeros(channels), torch.ones(channels)
        if step > 0 and self.start * steps <= step < self.end * steps:
            moments = VarianceMoments(channels, self.eps)
            moments.update(self.reference[sigma], accelerated)
            mean, factor = (v.float() for v in moments.factors(self.method))
        self.sigmas.append(sigma)
        self.means.append(mean)
        self.factors.append(factor)
        return mean, factor

    def result(self) -> VarianceCompensation:
        sigmas = torch.tensor(self.sigmas, dtype=torch.float64)
        return VarianceCompensation(sigmas, torch.stack(self.means), torch.stack(self.factors), self.method)


def fit_compensation(
    reference, accelerated, settings: Settings, latent: Tensor, seed: int, progress: Progress, *,
    method: str, start: float, end: float, eps: float = 1e-2,
) -> VarianceCompensation:  # fmt: skip
    """Samples the empty latents (N, ...) with both models from one noise and fits K_t step by step (Q&C, Eq. 9-12)."""
    recording = Recording()
    recorded = detach_compensation(reference)
    replace_wrapper(recorded, WRAPPERS.PREDICT_NOISE, KEY, recording)
    sample_new(recorded, settings, latent, seed, progress.step)
    fitting = Fitting(recording.samples, method, eps, start, end)
    fitted = accelerated.clone()
    replace_wrapper(fitted, WRAPPERS.OUTER_SAMPLE, KEY, sample_with_schedule)
    replace_wrapper(fitted, WRAPPERS.PREDICT_NOISE, KEY, fitting.predict_noise)
    sample_new(fitted, settings, latent, seed, progress.step)
    return fitting.result()
