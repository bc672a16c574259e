"""Trajectories of this package's own DiT, for calibrate()."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..caching.attach import feature_cache
from ..diffusion.process import ReverseProcess, SamplingConfig
from ..models.dit import DiT, check_open
from ..models.layers import DIT_SKIP, named_linears
from .choice import Batch, Candidates, features_of
from .file import FINGERPRINT, fingerprint
from .layer_inputs import Observer, Watch


class DiTTrajectories:
    """A host of calibrate(): image number i has the class labels[i], and starts over at the end of the list.

    Uses the cache that is attached to the model. Raises ValueError on a quantized model, or where skip_patterns leave
    no layer.
    """

    all_run = True

    def __init__(
        self,
        model: DiT,
        class_labels: Sequence[int] | Tensor,
        config: SamplingConfig,
        *,
        skip_patterns: Sequence[str] = DIT_SKIP,
        callback: Callable[[int, int], None] | None = None,
    ):
        check_open(model, "calibrate")
        if hasattr(model, FINGERPRINT):
            raise ValueError("This model is quantized already; calibrate the full-precision one.")
        self.model, self.labels, self.config = model, torch.as_tensor(class_labels), config
        self.layers: Sequence[tuple[str, nn.Module]] = list(named_linears(model, skip_patterns))
        if not self.layers:
            raise ValueError(f"No linear layer is left to observe with skip_patterns {list(skip_patterns)}.")
        self.fingerprint: str = fingerprint(model)
        self.device, self.steps = model.pos_embed.device, len(config.schedule())
        self.callback, self.done, self.total = callback, 0, 0

    def expect(self, steps: int) -> None:
        self.total = self.done + steps

    def room(self) -> int:
        """A DiT's statistics are small beside it."""
        return sys.maxsize

    def ran_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, torch.OutOfMemoryError)

    def collect(self, candidates: Candidates, run: int, batch: Batch, watch: Watch | None = None) -> None:
        sigmas = torch.tensor(self.config.schedule().sigmas, dtype=torch.float64)
        conditions, cache = 1 if self.config.cfg_scale == 1 else 2, feature_cache(self.model)

        begin = (lambda: None) if watch is None else watch.next_prediction
        with nullcontext() if watch is None else self.called_through(watch, batch.size):
            for step, x, denoised in self.steps_of(*batch[:3], begin):
                computed = cache is None or cache.computed(step)
                candidates.add(run, step, step, sigmas, features_of(x), denoised, conditions, computed)

    def observe(self, observer: Observer, batch: Batch) -> None:
        with self.called_through(observer, batch.size):
            for _ in self.steps_of(*batch[:3], observer.next_prediction):
                pass

    def steps_of(
        self, seed: int, size: int, first: int, begin: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Step, sample before it and predicted clean image of one run; begin() is called before each step."""
        labels = self.labels[(torch.arange(size) + first) % len(self.labels)]
        process, cache = ReverseProcess(self.model, labels, self.config), feature_cache(self.model)
        source = process.noise_source(seed, range(size))
        if cache is not None:
            cache.reset()
        try:
            x = source.draw().to(process.device)
            for step in range(len(process)):
                begin()
                before, noise = x, source.draw().to(process.device) if process.needs_noise(step) else None
                x, denoised = process.step(step, x, noise)
                yield step, before, denoised
                self.done += 1
                if self.callback is not None:
                    self.callback(self.done, self.total)
        finally:
            if cache is not None:
                cache.reset()

    @contextmanager
    def called_through(self, watch: Watch, size: int) -> Iterator[None]:
        """The model's calls go through the watch, for as long as the context lasts."""
        forward, cache = self.model.forward, feature_cache(self.model)

        def reused() -> bool:
            return cache is not None and cache.run.reusing

        def called(x: Tensor, t: Tensor, y: Tensor) -> Any:
            return watch.called(lambda: forward(x, t, y), x, t, {"y": y}, len(x) // size, reused)

        self.model.forward = called  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del self.model.forward
