"""Sequential fit: K_t is measured on trajectories that all earlier corrections already went into."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..caching.attach import cache_bypassed, feature_cache
from ..caching.features import CacheRun
from ..diffusion.process import ReverseProcess, SamplingConfig
from ..models.dit import DiT
from .correction import VarianceCompensation, compensate
from .factors import METHODS, VarianceMoments


class PairedBatch:
    """One batch sampled by both models with the same noise; holds the current samples only."""

    def __init__(
        self,
        reference: DiT,
        accelerated: DiT,
        labels: Tensor,
        config: SamplingConfig,
        seed: int,
        indices: Sequence[int],
    ):
        self.reference = ReverseProcess(reference, labels, config)
        self.accelerated = ReverseProcess(accelerated, labels, config)
        self.cache, self.run = feature_cache(accelerated), CacheRun()
        self.source = self.reference.noise_source(seed, indices)
        self.x = self.source.draw().to(self.reference.device)
        self.xh = self.x.clone()

    def advance(self, i: int, mean: Tensor, factor: Tensor) -> None:
        noise = self.source.draw().to(self.reference.device) if self.reference.needs_noise(i) else None
        with cache_bypassed(self.reference.model):
            self.x, _ = self.reference.step(i, self.x, noise)
        if self.cache is not None:
            self.cache.run = self.run
        self.xh, _ = self.accelerated.step(i, compensate(self.xh, mean, factor), noise)
        if self.cache is not None:
            self.run = self.cache.run


@torch.inference_mode()
def fit_variance_compensation(
    reference: DiT,
    accelerated: DiT,
    class_labels: Sequence[int] | Tensor,
    config: SamplingConfig,
    *,
    method: str = "variance_match",
    eps: float = 1e-2,
    start: float = 0.0,
    end: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    first_index: int = 0,
    callback: Callable[[int, int], None] | None = None,
) -> VarianceCompensation:
    """Fits K_t (Q&C, Eq. 9-12) for every step between the fractions `start` and `end` of the run; K = 1 elsewhere.

    One pair of trajectories for each class label; memory grows with their number, not with the number of steps.
    callback(step, steps) after each step.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    labels = torch.as_tensor(class_labels)
    batches = [
        PairedBatch(reference, accelerated, chunk, config, seed, range(at, at + len(chunk)))
        for chunk, at in zip(labels.split(batch_size), range(first_index, first_index + len(labels), batch_size))
    ]
    schedule, channels = config.schedule(), reference.config.in_channels
    means, factors = [], []
    cache = feature_cache(accelerated)
    try:
        for i in range(len(schedule)):
            mean, factor = torch.zeros(channels), torch.ones(channels)
            if 0 < i and start * len(schedule) <= i < end * len(schedule):
                moments = VarianceMoments(channels, eps)
                for batch in batches:
                    moments.update(batch.x, batch.xh)
                mean, factor = (v.float() for v in moments.factors(method))
            for batch in batches:
                batch.advance(i, mean, factor)
            means.append(mean)
            factors.append(factor)
            if callback is not None:
                callback(i, len(schedule))
    finally:
        if cache is not None:
            cache.reset()
    sigmas = torch.tensor(schedule.sigmas[:-1], dtype=torch.float64)
    return VarianceCompensation(sigmas, torch.stack(means), torch.stack(factors), method)
