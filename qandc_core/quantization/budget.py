"""A whole model's layers in ComfyUI's quantized formats, one layer at a time, within limits of error and size."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from torch import Tensor

from ..calibration.statistics import LayerStatistics
from .formats import BY_NAME, check_available, fitting
from .native import COLLAPSE, Moments, NativeConfig, NativeLayer, quantize_weight, rounded_layer
from .sensitivity import ModelError, sensitivities

FLOAT = "float"
TRIES = 6  # measurements of the whole model's error on the way to a limit of it


@dataclass(frozen=True)
class Budget:
    """A layer whose relative error is above `max_error` gets the next finer format, in the end float.

    Finer formats then go to the layers where they remove the most error for their bytes: until the whole model's
    relative error is at most `max_model_error`, and within `max_bytes` for all layers. Without a limit of the model's
    error all of `max_bytes` are spent in this way.
    """

    max_error: float | None = None
    max_bytes: int | None = None
    max_model_error: float | None = field(default=None, repr=False)  # files know a quantization by its repr

    @property
    def climbs(self) -> bool:
        """True if layers may get finer formats than their own errors ask for."""
        return self.max_bytes is not None or self.max_model_error is not None


@dataclass(frozen=True)
class LayerSource:
    """A layer to quantize: `load` gives weight (N, K) and bias (N,) or None, `bytes` is what they take as they are.

    `keeps_shape`: the weight has to keep its shape (N, K) in the checkpoint, in a format that does.
    """

    name: str
    load: Callable[[], tuple[Tensor, Tensor | None]]
    bytes: int
    keeps_shape: bool = False


@dataclass(frozen=True)
class Step:
    """A format that a layer may have by its name, or float, with its error and bytes."""

    format: str
    error: float
    bytes: int


def quantize_layers(
    layers: Sequence[LayerSource],
    config: NativeConfig,
    statistics: Mapping[str, LayerStatistics],
    budget: Budget = Budget(),
    callback: Callable[[str, float], None] | None = None,
    model_error: ModelError | None = None,
) -> dict[str, NativeLayer | None]:
    """Every layer by its name, tensors on the CPU, None where it stays float; callback(name, error) follows each.

    A layer that gets a finer format than its own error asks for is called back again. `model_error` measures what
    quantized layers do to the model: max_model_error needs it, max_bytes is spent better with it. Raises ValueError as
    quantize_weight does, except that limits of errors promote layers that collapse, and where max_bytes cannot be met.
    """
    return Search(layers, config, statistics, budget, callback, model_error).run()


@dataclass
class Search:
    """The state of `quantize_layers`: what was rounded so far, and the ladder of formats of every layer."""

    layers: Sequence[LayerSource]
    config: NativeConfig
    statistics: Mapping[str, LayerStatistics]
    budget: Budget
    callback: Callable[[str, float], None] | None
    model_error: ModelError | None
    ladders: dict[str, list[Step]] = field(default_factory=dict)
    rounded: dict[tuple[str, str], NativeLayer | None] = field(default_factory=dict)
    moments: Moments = field(default_factory=Moments)

    def run(self) -> dict[str, NativeLayer | None]:
        if self.budget.max_model_error is not None and self.model_error is None:
            raise ValueError("max_model_error is measured on held-out calls of the model; calibrate with held_out.")
        found: dict[str, NativeLayer | None] = {}
        for source in self.layers:
            layer, self.ladders[source.name] = coarsest(
                source, self.config, self.statistics.get(source.name), self.budget, self.moments
            )
            found[source.name] = self.rounded[source.name, self.ladders[source.name][0].format] = on_cpu(layer)
            self.tell(source.name, layer)
        self.moments = Moments()  # room for the model, which is asked now
        if not self.budget.climbs:
            return found
        shares = self.shares(found)
        steps = upgrades(self.ladders, self.config.format, self.budget, shares)
        if self.budget.max_model_error is not None:
            steps = steps[: self.fewest(steps, shares)]
        return self.after(steps)

    def tell(self, name: str, layer: NativeLayer | None) -> None:
        if self.callback is not None:
            self.callback(name, 0.0 if layer is None else layer.error)

    def shares(self, found: Mapping[str, NativeLayer | None]) -> dict[str, float]:
        """s_l of the model's squared error, 1 where that cannot be measured."""
        able = {name: layer for name, layer in found.items() if layer is not None}
        return sensitivities(able, self.model_error) if self.model_error is not None else {}

    def after(self, steps: Sequence[tuple[str, Step]]) -> dict[str, NativeLayer | None]:
        """The layers after these upgrades of the coarsest."""
        formats = {name: ladder[0].format for name, ladder in self.ladders.items()}
        formats |= {name: step.format for name, step in steps}
        return {source.name: self.layer(source, formats[source.name]) for source in self.layers}

    def layer(self, source: LayerSource, format: str) -> NativeLayer | None:
        key = source.name, format
        if key not in self.rounded:
            layer = None
            if format != FLOAT:
                config, seen = replace(self.config, format=format), self.statistics.get(source.name)
                layer = on_cpu(quantize_weight(source.name, *source.load(), config, seen, self.moments))
            self.rounded[key] = layer
            self.tell(source.name, layer)
        return self.rounded[key]

    def fewest(self, steps: Sequence[tuple[str, Step]], shares: Mapping[str, float]) -> int:
        """Number of upgrades that the limit of the model's error needs."""
        assert self.budget.max_model_error is not None and self.model_error is not None
        measure, target = self.model_error, self.budget.max_model_error

        def measured(number: int) -> float:
            layers = self.after(steps[:number])
            return measure({name: layer for name, layer in layers.items() if layer is not None})

        predicted = predicted_errors(self.ladders, steps, shares)
        number = least_number(predicted, measured, target)
        if number == len(steps) and self.budget.max_bytes is not None and (error := measured(number)) > target:
            raise ValueError(
                f"Within {mebibytes(self.budget.max_bytes)} the model's error is {error:.2g}, {target:g} are allowed; "
                "allow more bytes or a larger error."
            )
        return number


def coarsest(
    source: LayerSource, config: NativeConfig, statistics: LayerStatistics | None, budget: Budget, moments: Moments
) -> tuple[NativeLayer | None, list[Step]]:
    """The layer in the coarsest format, from the configured one on, whose error is within the limit; its ladder."""
    weight, bias = source.load()
    wanted = BY_NAME[config.format]
    check_available(wanted)
    able = fitting(wanted, weight.shape[0], weight.shape[1], source.keeps_shape)
    limit = budget.max_error
    if limit is None and budget.max_model_error is not None:
        limit = COLLAPSE
    layer: NativeLayer | None = None
    while layer is None and able:
        format, able = able[0], able[1:]
        chosen = replace(config, format=format.name)
        if limit is None:
            layer = quantize_weight(source.name, weight, bias, chosen, statistics, moments)
        else:
            layer = rounded_layer(source.name, weight, bias, chosen, statistics, moments)
            layer = layer if layer is not None and layer.error <= limit and layer.error < COLLAPSE else None
    if layer is None or not budget.climbs:
        return layer, ladder(source, layer)

    def nearest(format: str) -> NativeLayer | None:
        chosen = replace(config, format=format, rounding="nearest")
        return rounded_layer(source.name, weight, bias, chosen, statistics, moments)

    # gptq of every format would take as long again for each: it lowers the error of all of them alike.
    same = nearest(layer.format)
    factor = layer.error / same.error if same is not None and same.error > 0 else 1.0
    finer = [nearest(format.name) for format in able]
    return layer, ladder(source, layer, *(replace(one, error=factor * one.error) for one in finer if one is not None))


def ladder(source: LayerSource, *layers: NativeLayer | None) -> list[Step]:
    """The formats that the layer may have, from the coarsest to float, without those that a straight line from a
    coarser to a finer one beats.
    """
    steps = [Step(layer.format, layer.error, stored_bytes(layer)) for layer in layers if layer is not None]
    hull: list[Step] = []
    for step in [*steps, Step(FLOAT, 0.0, source.bytes)]:
        while len(hull) > 1 and gain(hull[-2], hull[-1]) < gain(hull[-1], step):
            hull.pop()
        hull.append(step)
    return hull


def gain(before: Step, after: Step) -> float:
    """Squared error removed for each byte more."""
    return (before.error**2 - after.error**2) / max(after.bytes - before.bytes, 1)


def upgrades(
    ladders: Mapping[str, Sequence[Step]], format: str, budget: Budget, shares: Mapping[str, float] = {}
) -> list[tuple[str, Step]]:
    """Layers and their finer formats in the order of squared error removed for each byte more, those that fit.

    `shares` weigh a layer's squared error, 1 where it has none. Raises ValueError where the layers do not fit even
    without.
    """
    least = sum(steps[0].bytes for steps in ladders.values())
    room = sys.maxsize if budget.max_bytes is None else budget.max_bytes - least
    if room < 0:
        assert budget.max_bytes is not None
        limit = "" if budget.max_error is None else f" with errors up to {budget.max_error:g}"
        raise ValueError(
            f"In {format}{limit} the layers take {mebibytes(least)}, {mebibytes(budget.max_bytes)} are allowed; allow "
            "more bytes or a larger error, or choose a coarser format."
        )
    chosen: list[tuple[str, Step]] = []
    queue: list[tuple[float, str, int]] = []

    def offer(name: str, number: int) -> None:
        if number < len(ladders[name]):
            heappush(queue, (-shares.get(name, 1.0) * gain(*ladders[name][number - 1 : number + 1]), name, number))

    for name in ladders:
        offer(name, 1)
    while queue:
        _, name, number = heappop(queue)
        step = ladders[name][number]
        cost = step.bytes - ladders[name][number - 1].bytes
        if cost <= room:
            room -= cost
            chosen.append((name, step))
            offer(name, number + 1)
    return chosen


def predicted_errors(
    ladders: Mapping[str, Sequence[Step]], steps: Sequence[tuple[str, Step]], shares: Mapping[str, float]
) -> list[float]:
    """The model's error after none, one, two ... of the upgrades: sqrt(sum s_l e_l^2)."""
    errors = {name: shares.get(name, 1.0) * ladder[0].error ** 2 for name, ladder in ladders.items()}
    found = [math.sqrt(sum(errors.values()))]
    for name, step in steps:
        errors[name] = shares.get(name, 1.0) * step.error**2
        found.append(math.sqrt(sum(errors.values())))
    return found


def least_number(predicted: Sequence[float], measured: Callable[[int], float], target: float) -> int:
    """The least n with measured(n) <= target that TRIES measurements find, at most len(predicted) - 1.

    Each guess is where the prediction, scaled to the last measurement, meets the target.
    """
    fails, meets, scale = -1, len(predicted) - 1, 1.0
    for _ in range(TRIES):
        guess = next((n for n, error in enumerate(predicted) if scale * error <= target), meets)
        if guess >= meets and meets < len(predicted) - 1:
            break  # what meets the target is what is predicted to
        guess = min(max(guess, fails + 1), meets - 1)
        if guess <= fails or guess < 0:
            break
        error = measured(guess)
        fails, meets = (fails, guess) if error <= target else (guess, meets)
        if predicted[guess] > 0:
            scale = error / predicted[guess]
    return meets


def stored_bytes(layer: NativeLayer) -> int:
    return sum(tensor.nbytes for tensor in layer.tensors.values())


def on_cpu(layer: NativeLayer | None) -> NativeLayer | None:
    return layer and replace(layer, tensors={key: tensor.cpu() for key, tensor in layer.tensors.items()})


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
