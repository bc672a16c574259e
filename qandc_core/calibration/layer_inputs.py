"""The inputs of layers: in the second pass of calibration those of the chosen samples and held-out model calls, or in
the first pass those of all samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .calls import ModelCall, storable
from .choice import Choice
from .statistics import LayerStatistics, merge_tokens, observed, with_room
from .stream import Reservoir

HELD_OUT_TOKENS = 256  # of a layer's held-out inputs
log = logging.getLogger(__name__)


@dataclass
class Share:
    """Shares `total` tokens evenly among parts that come one after the other."""

    total: int
    parts: int
    done: int = 0

    def take(self, parts: int) -> int:
        before, self.done = self.done, self.done + parts
        return self.total * self.done // self.parts - self.total * before // self.parts


class Draw:
    """The random tokens that a model call keeps; layers with as many tokens keep the same ones."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.orders: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, count: int) -> Tensor:
        """At most `count` tokens of x (M, K)."""
        if len(x) not in self.orders:
            self.orders[len(x)] = torch.randperm(len(x), generator=self.generator)
        return x[self.orders[len(x)][:count].to(x.device, non_blocking=True)]


class Watch(Protocol):
    """Looks into the model calls of a sampling run; the host tells it where each prediction begins."""

    def next_prediction(self) -> None: ...

    def called(
        self,
        call: Callable[[], Any],
        x: Tensor,
        t: Tensor,
        conditions: Mapping[str, Any],
        count: int,
        reused: Callable[[], bool],
    ) -> Any:
        """The result of call(), a model call on x (N, ...) whose batch holds `count` conditions side by side; reused()
        tells, while it runs, if it is made of cached features.
        """


class Gathering:
    """Gathers the inputs of all samples of a run, as long as `wanted` says that all of them may be taken; then it
    forgets what it has.
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, nn.Module]],
        statistics: dict[str, LayerStatistics],
        seed: int,
        wanted: Callable[[], bool],
        computed_only: bool = True,
    ):
        self.layers, self.statistics, self.wanted = layers, statistics, wanted
        self.computed_only = computed_only
        self.generator = torch.Generator().manual_seed(seed % 2**63)
        self.kept = {
            name: Reservoir(with_room(layer.inputs), torch.empty(0, dtype=torch.float64))
            for name, layer in statistics.items()
            if layer.inputs is not None
        }

    def next_prediction(self) -> None:
        """All are alike."""

    def called(
        self,
        call: Callable[[], Any],
        x: Tensor,
        t: Tensor,
        conditions: Mapping[str, Any],
        count: int,
        reused: Callable[[], bool],
    ) -> Any:
        if self.statistics and not self.wanted():
            self.forget()
        if not self.statistics:
            return call()
        keys = cache(lambda count: torch.rand(count, dtype=torch.float64, generator=self.generator))

        def observe(name: str, inputs: Tensor) -> None:
            if not inputs.numel() or (self.computed_only and reused()):
                return
            tokens = merge_tokens(inputs)
            self.statistics[name].update(tokens)
            if name in self.kept:
                self.kept[name].add(tokens, keys(len(tokens)))

        with observed(self.layers, observe):
            return call()

    def result(self) -> dict[str, LayerStatistics]:
        for name, kept in self.kept.items():
            self.statistics[name].inputs = kept.tokens
        return self.statistics

    def forget(self) -> None:
        self.statistics, self.kept = {}, {}


class Observer:
    """Gathers the inputs of the layers that run on one run's chosen samples."""

    def __init__(
        self,
        layers: Sequence[tuple[str, nn.Module]],
        statistics: dict[str, LayerStatistics],
        choice: Choice,
        run: int,
        tokens: int,
        seed: int,
    ):
        chosen, held_out = choice.samples, choice.held_out
        self.layers, self.statistics = layers, statistics
        self.chosen, self.held_out = chosen[chosen[:, 0] == run], held_out[held_out[:, 0] == run]
        earlier = int(chosen[chosen[:, 0] < run, 3].sum()), int((held_out[:, 0] < run).sum())
        self.tokens = Share(tokens, max(1, int(chosen[:, 3].sum())), earlier[0])
        self.held_out_tokens = Share(HELD_OUT_TOKENS, len(held_out), earlier[1])
        self.generator = torch.Generator().manual_seed((seed + run) % 2**63)
        self.calls: list[ModelCall] = []
        self.call = self.condition = 0
        self.images, self.held_out_now = chosen[:0, 2], held_out[:0]

    def next_prediction(self) -> None:
        self.images = self.chosen[self.chosen[:, 1] == self.call, 2]
        self.held_out_now = self.held_out[self.held_out[:, 1] == self.call]
        self.call, self.condition = self.call + 1, 0

    def called(
        self,
        call: Callable[[], Any],
        x: Tensor,
        t: Tensor,
        conditions: Mapping[str, Any],
        count: int,
        reused: Callable[[], bool] = lambda: False,
    ) -> Any:
        samples, held_out = self.places(len(x), count)
        if not len(samples) and not len(held_out):
            return call()
        self.keep_calls(held_out.tolist(), x, t, conditions)
        with observed(self.layers, self.observer(len(x), samples.tolist(), held_out.tolist())):
            return call()

    def places(self, batch: int, conditions: int) -> tuple[Tensor, Tensor]:
        """Samples of the batch that are chosen, and that are held out; it has its conditions one after the other."""
        images, first = batch // conditions, self.condition
        self.condition += conditions
        samples = torch.cat([self.images + i * images for i in range(conditions)])
        image, condition = self.held_out_now[:, 2], self.held_out_now[:, 3] - first
        here = (condition >= 0) & (condition < conditions)
        return samples, (image + condition * images)[here]

    def observer(self, batch: int, samples: list[int], held_out: list[int]):
        """observe(name, inputs) of one model call: the inputs of `samples` are added, those of `held_out` kept."""
        draw, wanted = Draw(self.generator), self.tokens.take(len(samples))
        draw_held_out = Draw(self.generator)
        wanted_held_out = self.held_out_tokens.take(len(held_out)) if held_out else 0

        def observe(name: str, inputs: Tensor) -> None:
            if not inputs.numel():
                return  # an expert to which no token went
            layer = self.statistics[name]
            if samples:
                x = of_samples(inputs, batch, samples)
                layer.update(x)
                if layer.inputs is not None:
                    layer.keep_inputs(draw(x, wanted))
            if held_out:
                layer.keep_held_out(draw_held_out(of_samples(inputs, batch, held_out), wanted_held_out))

        return observe

    def keep_calls(self, samples: list[int], x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> None:
        """Keeps these samples of the batch as calls of their own, on the CPU."""
        calls = (call_of(sample, x, t, conditions) for sample in samples)
        self.calls += [call.copied("cpu") for call in calls if call is not None]


def call_of(sample: int, x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> ModelCall | None:
    """One sample of a batch as a call of its own, a view; None, with a message, where a condition cannot be stored."""
    given = {key: part_of(value, sample, len(x)) for key, value in conditions.items() if value is not None}
    unfit = [key for key, value in given.items() if not storable(value)]
    if unfit:
        log.info("Q&C calibration: a held-out call is skipped: its %s cannot be stored.", ", ".join(unfit))
        return None
    return ModelCall(part_of(x, sample, len(x)), part_of(t, sample, len(x)), given)


def of_samples(inputs: Tensor, batch: int, samples: Sequence[int]) -> Tensor:
    """The inputs (M, K) that belong to some samples of the batch; all of them in layers that do not keep it first."""
    if len(inputs) % batch:
        return merge_tokens(inputs)
    by_sample = inputs.reshape(batch, -1, inputs.shape[-1])
    parts = [by_sample[i] for i in samples]  # by number: a tensor of them would have to be sent to the device
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def part_of(value: Any, sample: int, batch: int) -> Any:
    """One sample's part of a batched argument."""
    if isinstance(value, Tensor):
        batched = value.ndim and len(value) == batch
        return value[sample : sample + 1] if batched else value
    if isinstance(value, (list, tuple)):
        parts = [part_of(item, sample, batch) for item in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value
