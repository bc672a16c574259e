"""A whole model's layers in ComfyUI's quantized formats, one layer at a time, within limits of error and size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from torch import Tensor

from ..calibration.statistics import LayerStatistics
from .formats import BY_NAME, Format, fitting
from .native import COLLAPSE, NativeConfig, NativeLayer, quantize_weight, rounded_layer

FLOAT = "float"


@dataclass(frozen=True)
class Budget:
    """A layer whose relative error is above `max_error` gets the next finer format, in the end float.

    All layers may take `max_bytes`; what is left of those goes to finer formats where they remove the most error.
    """

    max_error: float | None = None
    max_bytes: int | None = None


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
) -> dict[str, NativeLayer | None]:
    """Every layer by its name, tensors on the CPU, None where it stays float; callback(name, error) follows each.

    With max_bytes a layer that gets a finer format in the end is called back again. Raises ValueError as
    quantize_weight does, except that max_error promotes layers that collapse, and where max_bytes cannot be met.
    """
    found: dict[str, NativeLayer | None] = {}
    ladders: dict[str, list[Step]] = {}

    def keep(name: str, layer: NativeLayer | None) -> None:
        found[name] = on_cpu(layer)
        if callback is not None:
            callback(name, 0.0 if layer is None else layer.error)

    for source in layers:
        layer, ladders[source.name] = coarsest(source, config, statistics.get(source.name), budget)
        keep(source.name, layer)
    if budget.max_bytes is None:
        return found
    upgraded = upgrades(ladders, config.format, budget)
    for source in layers:
        format = upgraded.get(source.name)
        if format == FLOAT:
            keep(source.name, None)
        elif format is not None:
            finer = replace(config, format=format)
            keep(source.name, quantize_weight(source.name, *source.load(), finer, statistics.get(source.name)))
    return found


def coarsest(
    source: LayerSource, config: NativeConfig, statistics: LayerStatistics | None, budget: Budget
) -> tuple[NativeLayer | None, list[Step]]:
    """The layer in the coarsest format, from the configured one on, whose error is within the limit; its ladder."""
    weight, bias = source.load()
    layer: NativeLayer | None = None

    def fits(format: Format | None) -> Format | None:
        return fitting(format, weight.shape[0], weight.shape[1], source.keeps_shape)

    BY_NAME[config.format].check_available()
    format = fits(BY_NAME[config.format])
    while format is not None:
        wanted = replace(config, format=format.name)
        if budget.max_error is None:
            layer = quantize_weight(source.name, weight, bias, wanted, statistics)
            break
        layer = rounded_layer(source.name, weight, bias, wanted, statistics)
        if layer is None or (layer.error <= budget.max_error and layer.error < COLLAPSE):
            break
        layer, format = None, fits(format.finer)
    steps = [layer]
    while budget.max_bytes is not None and format is not None and (format := fits(format.finer)) is not None:
        nearest = replace(config, format=format.name, rounding="nearest")
        steps.append(rounded_layer(source.name, weight, bias, nearest, statistics))
    return layer, ladder(source, *steps)


def ladder(source: LayerSource, *layers: NativeLayer | None) -> list[Step]:
    """The formats that the layer may have, from the coarsest to float."""
    steps = [Step(layer.format, layer.error, stored_bytes(layer)) for layer in layers if layer is not None]
    return [*steps, Step(FLOAT, 0.0, source.bytes)]


def upgrades(ladders: Mapping[str, Sequence[Step]], format: str, budget: Budget) -> dict[str, str]:
    """Finer formats for some layers: first the steps that remove most squared error for each byte more.

    Raises ValueError where the layers do not fit even without.
    """
    assert budget.max_bytes is not None
    least = sum(steps[0].bytes for steps in ladders.values())
    if least > budget.max_bytes:
        limit = "" if budget.max_error is None else f" with errors up to {budget.max_error:g}"
        raise ValueError(
            f"In {format}{limit} the layers take {mebibytes(least)}, {mebibytes(budget.max_bytes)} are allowed; allow "
            "more bytes or a larger error, or choose a coarser format."
        )
    room, chosen = budget.max_bytes - least, dict[str, str]()
    queue: list[tuple[float, str, int]] = []

    def offer(name: str, number: int) -> None:
        if number < len(ladders[name]):
            before, after = ladders[name][number - 1 : number + 1]
            gain = before.error**2 - after.error**2
            heappush(queue, (-gain / max(after.bytes - before.bytes, 1), name, number))

    for name in ladders:
        offer(name, 1)
    while queue:
        _, name, number = heappop(queue)
        step = ladders[name][number]
        cost = step.bytes - ladders[name][number - 1].bytes
        if cost <= room:
            room -= cost
            chosen[name] = step.format
            offer(name, number + 1)
    return chosen


def stored_bytes(layer: NativeLayer) -> int:
    return sum(tensor.nbytes for tensor in layer.tensors.values())


def on_cpu(layer: NativeLayer | None) -> NativeLayer | None:
    return layer and replace(layer, tensors={key: tensor.cpu() for key, tensor in layer.tensors.items()})


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
