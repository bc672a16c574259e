"""The state of a calibration under way: the chosen samples, the statistics so far, and resuming from a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from .calls import ModelCall
from .choice import Choice
from .file import Calibration
from .memory import StatisticsPlan
from .statistics import LayerStatistics

log = logging.getLogger(__name__)


@dataclass
class CalibrationState:
    """Progress of a calibration: the choice, and the statistics of `runs` sampling runs of the second pass."""

    choice: Choice
    distances: Tensor | None
    statistics: dict[str, LayerStatistics]
    held_out: tuple[ModelCall, ...] = ()
    runs: int = 0
    missing: str = ""  # why there are no distances
    batch_size: int = 0

    def result(self, model: str) -> Calibration:
        """The state as a Calibration; what that has no field for goes into its notes."""
        places = {"samples": self.choice.samples.tolist(), "held_out": self.choice.held_out.tolist()}
        notes = {**places, "runs": self.runs, "distances": self.missing, "batch_size": self.batch_size}
        return Calibration(model, self.statistics, distances=self.distances, notes=notes, held_out=self.held_out)


def width_of(layer: nn.Module) -> int:
    """in_features of a linear layer, torch's or a host's."""
    return cast(int, layer.in_features)


def empty_statistics(layer: nn.Module, space: StatisticsPlan) -> LayerStatistics:
    width = width_of(layer)
    return LayerStatistics.empty(width, space.hessian(width), space.inputs(width), space.held_out)


def resumed(found: Calibration, layers: Mapping[str, nn.Module], space: StatisticsPlan) -> CalibrationState:
    """The state of an interrupted calibration, with room for more statistics."""
    statistics = {}
    for name in list(found.statistics):
        # Taken out one by one: all of them twice would not fit the budget.
        layer, room = found.statistics.pop(name), empty_statistics(layers[name], space)
        if (layer.low.shape, layer.hessian is None) != (room.low.shape, room.hessian is None):
            raise ValueError(f"the statistics of {name} are of another layer")
        if layer.inputs is not None:
            room.keep_inputs(layer.inputs)
        if layer.held_out is not None:
            room.keep_held_out(layer.held_out)
        statistics[name] = replace(layer, inputs=room.inputs, held_out=room.held_out)
    samples, held_out = (torch.tensor(found.notes[key]).long().reshape(-1, 4) for key in ("samples", "held_out"))
    kept = (found.notes[key] for key in ("runs", "distances", "batch_size"))
    return CalibrationState(Choice(samples, held_out), found.distances, statistics, found.held_out, *kept)


def leave_out_unseen(statistics: dict[str, LayerStatistics], all_run: bool) -> None:
    """Takes out layers without inputs: experts to which no token went, and what a network runs once and remembers.

    Raises ValueError where none is left, or on any in a network whose calls run all of its layers.
    """
    unseen = [name for name, layer in statistics.items() if layer.count == 0]
    if unseen and (all_run or len(unseen) == len(statistics)):
        raise ValueError(
            f"None of the selected samples falls on a step that computes {unseen[0]} (and {len(unseen) - 1} other "
            "layers); increase samples."
        )
    if unseen:
        log.warning(
            "Q&C calibration: the selected samples give %s no input; %d such layers get no statistics.",
            unseen[0],
            len(unseen),
        )
    for name in unseen:
        del statistics[name]
