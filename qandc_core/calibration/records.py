"""The records of a run: statistics of each layer, on the device during the run and on the CPU afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .calls import ModelCall
from .memory import StatisticsPlan, layer_bytes
from .statistics import LayerStatistics
from .stream import Reservoir

PROBE_TOKENS = 256  # of a layer on which it is measured what a run adds


@dataclass
class Room:
    """Bytes of a device that may be taken; what does not fit goes to the CPU."""

    device: torch.device
    left: int

    def take(self, size: int) -> torch.device:
        """The device that takes `size` bytes."""
        if size > self.left:
            return torch.device("cpu")
        self.left -= size
        return self.device

    def give_back(self, tensors: Iterable[Tensor]) -> None:
        """Notes that these tensors are about to leave the device, if they are there."""
        self.left += sum(tensor.nbytes for tensor in tensors if tensor.device == self.device)


@dataclass(frozen=True)
class Drawn:
    """Tokens (M, K) drawn from the inputs of a layer in one call, a key for each, and the bounds of all its inputs;
    without bounds they are held out.
    """

    tokens: Tensor
    keys: Tensor
    bounds: tuple[Tensor, Tensor] | None = None


@dataclass
class LayerRecord:
    """Statistics of one layer: sums, and inputs by purpose."""

    statistics: LayerStatistics
    kept: dict[str, Reservoir]

    @classmethod
    def empty(cls, width: int, space: StatisticsPlan, probe: bool, room: Room) -> LayerRecord:
        statistics = LayerStatistics.empty(width, device=room.device)
        if space.hessian(width):
            statistics.hessian = torch.zeros(width, width, device=room.take(4 * width**2))
        capacities = {"inputs": space.inputs(width), "held_out": space.held_out, "probe": PROBE_TOKENS * probe}
        kept = {
            kind: Reservoir.empty(tokens, width, room.take(2 * tokens * width))
            for kind, tokens in capacities.items()
            if tokens
        }
        return cls(statistics, kept)

    def add(self, drawn: Drawn) -> None:
        if drawn.bounds is not None:
            self.statistics.update(drawn.tokens, drawn.bounds)
        for kind, kept in self.kept.items():
            if (kind == "held_out") == (drawn.bounds is None):
                kept.add(drawn.tokens, drawn.keys)

    @property
    def large(self) -> list[Tensor]:
        """X^T X and the kept inputs."""
        held = [self.statistics.hessian, *(kept.memory for kept in self.kept.values())]
        return [tensor for tensor in held if tensor is not None]

    def fetch(self) -> None:
        """Brings everything to the CPU."""
        self.statistics.fetch()
        for kept in self.kept.values():
            kept.memory = kept.memory.cpu()

    def merge(self, other: LayerRecord) -> None:
        """Adds what another record of the layer holds, on the CPU as this one, as one pass over both would have."""
        self.statistics.merge(other.statistics)
        for kind, kept in other.kept.items():
            if kind in self.kept:
                self.kept[kind].add(kept.tokens, kept.keys)
            else:
                self.kept[kind] = kept


@dataclass
class RunRecord:
    """The result of one run: its layers by name, held-out calls with their keys, and the predictions by noise level."""

    layers: dict[str, LayerRecord]
    calls: list[tuple[float, ModelCall]] = field(default_factory=list)
    predictions: list[tuple[float, Tensor]] = field(default_factory=list)
    samples: int = 0


class Waiting:
    """What was drawn of one layer and is not summed up yet: no more than its record will take."""

    def __init__(self, width: int, space: StatisticsPlan, room: Room):
        self.most = layer_bytes(width, space.tokens, space.held_out)
        self.room = room
        self.drawn: list[Drawn] = []

    @property
    def large(self) -> list[Tensor]:
        return [drawn.tokens for drawn in self.drawn]

    def takes(self, drawn: Drawn) -> bool:
        """False where there is no room for this one too."""
        size = drawn.tokens.nbytes
        if size > self.room.left or size + sum(tensor.nbytes for tensor in self.large) > self.most:
            return False
        self.room.left -= size
        self.drawn.append(drawn)
        return True

    def emptied(self) -> Iterator[Drawn]:
        """What waits, one after the other; the room of each is free when the next one comes."""
        while self.drawn:
            drawn = self.drawn.pop(0)
            yield drawn
            self.room.give_back([drawn.tokens])
