"""The sampling loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..caching.attach import feature_cache
from ..compensation.apply import VarianceCompensation
from ..models.dit import DiT
from .process import ReverseProcess, SamplingConfig
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
    model: DiT,
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
    count, device = len(process.labels), process.device
    source = process.noise_source(seed, range(first_index, first_index + count), noise)
    cache = feature_cache(model)
    if cache is not None:
        cache.reset()
    report = RunReport(sampler, len(process), count, cfg_scale, str(device))
    reset_peak_memory(device)
    x = source.draw().to(device, torch.float32)
    try:
        for i in progress_bar(len(process), progress):
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


def progress_bar(steps: int, shown: bool):
    if not shown:
        return range(steps)
    from tqdm import tqdm

    return tqdm(range(steps), unit="step")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
