"""The sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..caching.attach import feature_cache
from ..compensation.correction import VarianceCompensation, compensate
from ..diffusion.process import NoiseSource, ReverseProcess, SamplingConfig
from ..models.dit import PatchGrid
from .clock import StepClock
from .report import RunReport, peak_memory, reset_peak_memory


@dataclass(frozen=True)
class StepInfo:
    """State handed to the callback after step `index`: x is the next sample, denoised the predicted clean image."""

    index: int
    timestep: int
    x: Tensor
    denoised: Tensor
    computed: bool
    seconds: float


def generate(
    model: PatchGrid,
    class_labels: Sequence[int] | Tensor,
    steps: int | None = None,
    cfg_scale: float = 4.0,
    sampler: str = "ddpm",
    seed: int = 0,
    sigmas: Sequence[float] | Tensor | None = None,
    noise: Tensor | None = None,
    *,
    spacing: str = "linspace",
    variance: str = "fixed_small",
    guidance_channels: int | None = None,
    batched_guidance: bool = True,
    compensation: VarianceCompensation | None = None,
    first_index: int = 0,
    callback: Callable[[StepInfo], None] | None = None,
    progress: bool = False,
) -> tuple[Tensor, RunReport]:
    """Samples one image for each class label: images or latents (N, C, H, W) float32, and the RunReport.

    `model` is a DiT, or one made ready by fuse_dit; the cache that is attached to it is used. Image i depends on `seed`
    and first_index + i alone, not on the batch. `noise` is the start (N, C, H, W) or the start and every step's
    (1 + steps, N, C, H, W); `sigmas` is the whole schedule, given in place of `steps` (50) and `spacing`.
    """
    if steps is not None and sigmas is not None:
        raise ValueError("`steps` and `sigmas` both say how many steps there are; give one of them.")
    steps = SamplingConfig.steps if steps is None else steps
    chosen = None if sigmas is None else tuple(torch.as_tensor(sigmas, dtype=torch.float64).tolist())
    config = SamplingConfig(steps, cfg_scale, sampler, spacing, variance, guidance_channels, batched_guidance, chosen)
    return sample_images(
        model,
        class_labels,
        config,
        seed,
        noise,
        compensation=compensation,
        first_index=first_index,
        callback=callback,
        progress=progress,
    )


@torch.inference_mode()
def sample_images(
    model: PatchGrid,
    class_labels: Sequence[int] | Tensor,
    config: SamplingConfig,
    seed: int = 0,
    noise: Tensor | None = None,
    *,
    compensation: VarianceCompensation | None = None,
    first_index: int = 0,
    callback: Callable[[StepInfo], None] | None = None,
    progress: bool = False,
) -> tuple[Tensor, RunReport]:
    """generate() with the settings of the run as one object."""
    process = ReverseProcess(model, class_labels, config)
    if compensation is not None:
        compensation.check(process.schedule.sigmas[:-1])
    first = range(first_index, first_index + len(process.labels))
    run: Any = getattr(model, "sample", generate_by_steps)  # a FusedDiT has a loop of its own
    return run(process, process.noise_source(seed, first, noise), compensation, callback, progress)


def generate_by_steps(
    process: ReverseProcess,
    source: NoiseSource,
    compensation: VarianceCompensation | None,
    callback: Callable[[StepInfo], None] | None,
    progress: bool,
) -> tuple[Tensor, RunReport]:
    """Queues one step after the other; only ddpm's noise, which the CPU draws, and a callback wait for the device."""
    device, cache = process.device, feature_cache(process.model)
    if cache is not None:
        cache.reset()
    report = RunReport(process.config.sampler, len(process), len(process.labels), process.config.cfg_scale, str(device))
    reset_peak_memory(device)
    correct = corrections(compensation, process)
    x = source.draw().to(device, torch.float32)
    try:
        clock = StepClock(device)
        for i in progress_bar(range(len(process)), progress):
            step_noise = source.draw().to(device) if process.needs_noise(i) else None
            x, denoised = process.step(i, correct(i, x), step_noise)
            clock.end()
            report.computed.append(cache is None or cache.computed(i))
            if callback is not None:
                callback(StepInfo(i, process.schedule.timesteps[i], x, denoised, report.computed[-1], clock.latest))
                clock.begin()
        report.seconds = clock.seconds()
        report.cache_bytes = 0 if cache is None else cache.num_bytes
    finally:
        if cache is not None:
            cache.reset()
    report.peak_memory = peak_memory(device)
    return x, report


def corrections(compensation: VarianceCompensation | None, process: ReverseProcess) -> Callable[[int, Tensor], Tensor]:
    """Variance compensation of x before step i, with all factors on the device from the start."""
    if compensation is None:
        return lambda i, x: x
    rows = [compensation.find(sigma) for sigma in process.schedule.sigmas[:-1]]
    nothing = (compensation.factor[rows] == 1).all(dim=1).tolist()
    mean, factor = (table[rows].to(process.device) for table in (compensation.mean, compensation.factor))
    return lambda i, x: x if nothing[i] else compensate(x, mean[i], factor[i])


def progress_bar(steps: range, shown: bool):
    from tqdm import tqdm

    return tqdm(steps, unit="step", disable=not shown)
