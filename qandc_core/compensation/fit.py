"""Sequential fit: K_t is measured on trajectories that all earlier corrections already went into.

`SequentialFit` is the fit itself. A host samples: here both models advance together, one step at a time; in ComfyUI the
reference is sampled first, and the accelerated run is corrected while it is being measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..caching.attach import cache_bypassed, feature_cache
from ..caching.features import CacheRun
from ..diffusion.process import ReverseProcess, SamplingConfig
from ..distributed import ALONE, Distributed
from ..models.dit import DiT
from .correction import Shapes, VarianceCompensation, compensate, split_parts
from .factors import METHODS, VarianceMoments, unknown_method

Pair = tuple[Tensor, Tensor]


class SequentialFit:
    """Factors of one step after the other (Q&C, Eq. 9-12), between the fractions `start` and `end` of the run.

    K = 1 elsewhere, and at the first step, which both models begin with the same noise. Raises ValueError on bounds and
    methods that do not exist, before anything is sampled.
    """

    def __init__(
        self,
        steps: int,
        method: str = METHODS[0],
        eps: float = 1e-2,
        start: float = 0.0,
        end: float = 1.0,
        process: Distributed = ALONE,
    ):
        if method not in METHODS:
            raise unknown_method(method)
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"The corrected part of the run must begin before it ends, both within 0 and 1, got {start} to {end}."
            )
        VarianceMoments(0, eps)  # refuses an eps that is none
        self.steps, self.method, self.eps, self.start, self.end = steps, method, eps, start, end
        self.process = process
        self.sigmas: list[float] = []
        self.means: list[Tensor] = []
        self.factors: list[Tensor] = []

    def __len__(self) -> int:
        """Number of steps that are fitted."""
        return len(self.sigmas)

    def corrects(self, step: int) -> bool:
        return step > 0 and self.start * self.steps <= step < self.end * self.steps

    def step(self, sigma: float, pairs: Iterable[Pair], shapes: Shapes = ()) -> Pair:
        """mean and K (C,) of the next step, from paired samples (reference, accelerated) in variance-preserving units.

        Samples are (N, C, ...), or several parts joined (`split_parts`). Raises ValueError where they are not finite.
        """
        parts = [(split_parts(x, shapes), split_parts(xh, shapes)) for x, xh in pairs]
        channels = [part.shape[1] for part in parts[0][0]]
        mean, factor = torch.zeros(sum(channels)), torch.ones(sum(channels))
        if self.corrects(len(self)):
            mean, factor = self.measured(parts, channels)
        self.sigmas.append(sigma)
        self.means.append(mean)
        self.factors.append(factor)
        return mean, factor

    def measured(self, parts: Sequence[tuple[list[Tensor], list[Tensor]]], channels: Sequence[int]) -> Pair:
        found = []
        for i, width in enumerate(channels):
            moments = VarianceMoments(width, self.eps)
            for reference, accelerated in parts:
                moments.update(reference[i], accelerated[i])
            moments.sum_over(self.process)
            found.append(moments.factors(self.method))
        mean, factor = (torch.cat(values).float() for values in zip(*found))
        if not mean.isfinite().all() or not factor.isfinite().all():
            raise ValueError(
                f"Samples are not finite before step {len(self) + 1} of {self.steps}: there is no variance to match; "
                "look for the cause in the models, or in cfg."
            )
        return mean, factor

    def result(self) -> VarianceCompensation:
        """The fit of all steps so far. Raises ValueError on factors beyond reason."""
        sigmas = torch.tensor(self.sigmas, dtype=torch.float64)
        return VarianceCompensation(sigmas, torch.stack(self.means), torch.stack(self.factors), self.method)


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
    process: Distributed = ALONE,
) -> VarianceCompensation:
    """Fits K_t (Q&C, Eq. 9-12) for every step between the fractions `start` and `end` of the run; K = 1 elsewhere.

    One pair of trajectories for each class label; memory grows with their number, not with the number of steps.
    callback(step, steps) after each step. Several processes share the pairs out and return the same fit.
    """
    schedule, labels = config.schedule(), torch.as_tensor(class_labels)
    if len(labels) < process.world:
        process = ALONE  # each fits all of the few pairs
    fit = SequentialFit(len(schedule), method, eps, start, end, process)
    share = process.shard(len(labels))
    labels, first_index = labels[share.start : share.stop], first_index + share.start
    batches = [
        PairedBatch(reference, accelerated, chunk, config, seed, range(at, at + len(chunk)))
        for chunk, at in zip(labels.split(batch_size), range(first_index, first_index + len(labels), batch_size))
    ]
    cache = feature_cache(accelerated)
    try:
        for i, sigma in enumerate(schedule.sigmas[:-1]):
            mean, factor = fit.step(sigma, [(batch.x, batch.xh) for batch in batches])
            for batch in batches:
                batch.advance(i, mean, factor)
            if callback is not None:
                callback(i, len(schedule))
    finally:
        if cache is not None:
            cache.reset()
    return fit.result()


class JointFit:
    """One fit of several runs that take turns: each hands in its samples of a step and goes on when all have.

    wait() returns when every run has come to it (see `turns`).
    """

    def __init__(self, fit: SequentialFit, wait: Callable[[], None]):
        self.fit, self.wait = fit, wait
        self.pairs: list[Pair] = []

    def step(self, step: int, sigma: float, take: Callable[[], Pair], shapes: Shapes = ()) -> Pair:
        """mean and K (C,) of a step. take() gives the run's pair; a step that is evaluated again has its factors."""
        if step == len(self.fit):
            self.pairs.append(take())
            self.wait()
            if step == len(self.fit):  # the first run that goes on
                self.fit.step(sigma, self.pairs, shapes)
                self.pairs = []
        return self.fit.means[step], self.fit.factors[step]
