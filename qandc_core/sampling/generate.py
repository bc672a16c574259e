"""The sampling loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..caching.attach import feature_cache
from ..compensation.correction import VarianceCompensation
from ..diffusion.process import NoiseSource, ReverseProcess, SamplingConfig
from ..fused.dit import FusedDiT
from ..fused.loop import DeviceLoop, sample_on_device
from ..models.dit import DiT
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


@torch.inference_mode()
def generate(
    model: DiT | FusedDiT,
    class_labels: Sequence[int] | Tensor,
    steps: int = 50,
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

    Image i depends on `seed` and first_index + i alone, not on the batch. `noise` is the start (N, C, H, W) or the
    start and every step's (1 + steps, N, C, H, W); `sigmas` replaces `steps`. Uses the cache that is attached.
    """
    chosen = None if sigmas is None else tuple(torch.as_tensor(sigmas, dtype=torch.float64).tolist())
    config = SamplingConfig(
        steps, cfg_scale, sampler, spacing, variance, guidance_channels, batched_guidance, chosen
    )  # fmt: skip
    process = ReverseProcess(model, class_labels, config)
    if compensation is not None:
        compensation.check(process.schedule.sigmas[:-1])
    first = range(first_index, first_index + len(process.labels))
    run = generate_on_device if isinstance(model, FusedDiT) else generate_by_steps
    return run(process, process.noise_source(seed, first, noise), compensation, callback, progress)


def generate_by_steps(
    process: ReverseProcess,
    source: NoiseSource,
    compensation: VarianceCompensation | None,
    callback: Callable[[StepInfo], None] | None,
    progress: bool,
) -> tuple[Tensor, RunReport]:
    device, cache = process.device, feature_cache(process.model)
    if cache is not None:
        cache.reset()
    report = RunReport(
        process.config.sampler, len(process), len(process.labels), process.config.cfg_scale, str(device)
    )  # fmt: skip
    reset_peak_memory(device)
    x = source.draw().to(device, torch.float32)
    try:
        for i in progress_bar(range(len(process)), progress):
            started = time.perf_counter()
            step_noise = source.draw().to(device) if process.needs_noise(i) else None
            if compensation is not None:
                x = compensation.correct(x, process.schedule.sigmas[i])
            x, denoised = process.step(i, x, step_noise)
            synchronize(device)
            report.seconds.append(time.perf_counter() - started)
            report.computed.append(cache is None or cache.computed(i))
            if callback is not None:
                info = StepInfo(
                    i, process.schedule.timesteps[i], x, denoised, report.computed[-1], report.seconds[-1]
                )  # fmt: skip
                callback(info)
        report.cache_bytes = 0 if cache is None else cache.num_bytes
    finally:
        if cache is not None:
            cache.reset()
    report.peak_memory = peak_memory(device)
    return x, report


def generate_on_device(
    process: ReverseProcess,
    source: NoiseSource,
    compensation: VarianceCompensation | None,
    callback: Callable[[StepInfo], None] | None,
    progress: bool,
) -> tuple[Tensor, RunReport]:
    """A run of a FusedDiT; a callback or a progress bar makes the host wait for every step."""
    bar = progress_bar(range(len(process)), progress)
    ended: list[float] = []

    def after_step(i: int, loop: DeviceLoop) -> None:
        synchronize(process.device)
        seconds = time.perf_counter() - (ended[-1] if ended else loop.started)
        bar.update()
        if callback is not None:
            x, denoised = loop.x.clone(), loop.denoised.clone()
            callback(StepInfo(i, process.schedule.timesteps[i], x, denoised, loop.computed[i], seconds))
        ended.append(time.perf_counter())

    noise = (source.draw() for _ in range(1 + sum(map(process.needs_noise, range(len(process))))))
    with bar:
        watched = callback is not None or progress
        return sample_on_device(process, noise, compensation, after_step if watched else None)


def progress_bar(steps: range, shown: bool):
    from tqdm import tqdm

    return tqdm(steps, unit="step", disable=not shown)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
