"""The second pass of calibration: what layers see on the chosen samples, and model calls that are held out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calls import ModelCall, storable
from .choice import Choice
from .statistics import LayerStatistics, merge_rows, observed

HELD_OUT_ROWS = 256  # of a layer's held-out inputs
log = logging.getLogger(__name__)


@dataclass
class Share:
    """Hands out `total` rows evenly among so many parts that come one after the other."""

    total: int
    parts: int
    done: int = 0

    def take(self, parts: int) -> int:
        before, self.done = self.done, self.done + parts
        return self.total * self.done // self.parts - self.total * before // self.parts


class Draw:
    """The rows at random that a model call keeps; layers with as many rows keep the same ones."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.orders: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, count: int) -> Tensor:
        """At most `count` rows of x (M, K)."""
        if len(x) not in self.orders:
            self.orders[len(x)] = torch.randperm(len(x), generator=self.generator)
        return x[self.orders[len(x)][:count].to(x.device)]


class Observer:
    """Gathers the inputs of the layers that run on one run's chosen samples.

    The host tells it where each prediction begins (`next_prediction`) and hands every model call through `called`.
    """

    def __init__(
        self, layers: Sequence[tuple[str, nn.Module]], statistics: dict[str, LayerStatistics], choice: Choice, run: int,
        tokens: int, seed: int,
    ):  # fmt: skip
        chosen, apart = choice.samples, choice.held_out
        self.layers, self.statistics = layers, statistics
        self.chosen, self.apart = chosen[chosen[:, 0] == run], apart[apart[:, 0] == run]
        earlier = int(chosen[chosen[:, 0] < run, 3].sum()), int((apart[:, 0] < run).sum())
        self.rows = Share(tokens, int(chosen[:, 3].sum()), earlier[0])
        self.held_out_rows = Share(HELD_OUT_ROWS, len(apart), earlier[1])
        self.generator = torch.Generator().manual_seed((seed + run) % 2**63)
        self.calls: list[ModelCall] = []
        self.call = self.condition = 0
        self.images, self.apart_now = chosen[:0, 2], apart[:0]

    def next_prediction(self) -> None:
        self.images = self.chosen[self.chosen[:, 1] == self.call, 2]
        self.apart_now = self.apart[self.apart[:, 1] == self.call]
        self.call, self.condition = self.call + 1, 0

    def called(self, call: Callable[[], Any], x: Tensor, t: Tensor, conditions: Mapping[str, Any], count: int) -> Any:
        """What call() answers, a model call on x (N, ...) whose batch holds so many conditions side by side."""
        rows, apart = self.places(len(x), count)
        if not len(rows) and not len(apart):
            return call()
        self.keep_calls(apart.tolist(), x, t, conditions)
        with observed(self.layers, self.observer(len(x), rows.to(x.device), apart.to(x.device))):
            return call()

    def places(self, batch: int, conditions: int) -> tuple[Tensor, Tensor]:
        """Rows of the batch that are chosen, and that are held out; it has its conditions one after the other."""
        images, first = batch // conditions, self.condition
        self.condition += conditions
        rows = torch.cat([self.images + i * images for i in range(conditions)])
        image, condition = self.apart_now[:, 2], self.apart_now[:, 3] - first
        here = (condition >= 0) & (condition < conditions)
        return rows, (image + condition * images)[here]

    def observer(self, batch: int, rows: Tensor, apart: Tensor):
        """observe(name, inputs) of one model call: samples at `rows` of the batch are added, those at `apart` kept."""
        draw, wanted = Draw(self.generator), self.rows.take(len(rows))
        draw_apart, wanted_apart = Draw(self.generator), self.held_out_rows.take(len(apart)) if len(apart) else 0

        def observe(name: str, inputs: Tensor) -> None:
            if not inputs.numel():
                return  # an expert to which no token went
            layer = self.statistics[name]
            if len(rows):
                x = of_samples(inputs, batch, rows)
                layer.update(x)
                if layer.rows is not None:
                    layer.keep_rows(draw(x, wanted))
            if len(apart):
                layer.keep_held_out(draw_apart(of_samples(inputs, batch, apart), wanted_apart))

        return observe

    def keep_calls(self, rows: list[int], x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> None:
        """Notes the samples at `rows` of the batch as calls of their own."""
        self.calls += [call for row in rows if (call := call_of(row, x, t, conditions)) is not None]


def call_of(row: int, x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> ModelCall | None:
    """One sample of a batch as a call of its own; None, with a message, where a condition cannot be stored."""
    given = {key: part_of(value, row, len(x)) for key, value in conditions.items() if value is not None}
    unfit = [key for key, value in given.items() if not storable(value)]
    if unfit:
        log.info("Q&C calibration: a held-out call is left out, its %s cannot be stored.", ", ".join(unfit))
        return None
    return ModelCall(part_of(x, row, len(x)), part_of(t, row, len(x)), given)


def of_samples(inputs: Tensor, batch: int, rows: Tensor) -> Tensor:
    """The inputs (M, K) that belong to some rows of the batch; all of them in layers that do not keep it first."""
    if len(inputs) % batch:
        return merge_rows(inputs)
    return merge_rows(inputs.reshape(batch, -1, inputs.shape[-1])[rows])


def part_of(value: Any, row: int, batch: int) -> Any:
    """One sample's part of a batched argument, on CPU."""
    if isinstance(value, Tensor):
        batched = value.ndim and len(value) == batch
        return (value[row : row + 1] if batched else value).detach().cpu().clone()
    if isinstance(value, (list, tuple)):
        parts = [part_of(item, row, batch) for item in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value
