"""The time of a sampling run, step by step, measured by wrappers on the model; see `reporting`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...qandc_core.sampling.clock import StepClock

CLOCK = "qandc_clock"  # where the options of a run hold its clock


class RunClock:
    """Seconds of the steps of a run, from its first prediction to the end of the sampler. Waits at the end only."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clock: StepClock | None = None
        self.predicted, self.depth = False, 0

    def begin(self) -> None:
        self.depth += 1
        if self.depth == 1:  # a sampler may be made of samplers
            self.clock, self.predicted = StepClock(self.device), False

    def predict(self) -> None:
        """Excludes what was done before the first prediction from the run."""
        if not self.predicted:
            self.clock, self.predicted = StepClock(self.device), True

    def timed(self, callback: Callable | None) -> Callable:
        """The sampler's callback, which ends a step, and whose own time does not count."""

        def ended(*args, **kwargs):
            if self.clock is not None:
                self.clock.end()
            try:
                return None if callback is None else callback(*args, **kwargs)
            finally:
                if self.clock is not None:
                    self.clock.begin()

        return ended

    def end(self) -> None:
        """Counts what follows the last callback to the last step."""
        self.depth -= 1
        if self.clock is not None and not self.depth:
            self.clock.end()

    @property
    def seconds(self) -> list[float]:
        found = [] if self.clock is None else self.clock.seconds()
        return [*found[:-2], sum(found[-2:])] if found else []


def time_sampler(executor, model_wrap, sigmas, extra_args, *args, **kwargs):
    """SAMPLER_SAMPLE: a sampler without callbacks or predictions, such as one of another pack, is timed whole."""
    clocks = clocks_of(extra_args["model_options"])
    for clock in clocks:
        clock.begin()
    try:
        return executor(model_wrap, sigmas, extra_args, *args, **kwargs)
    finally:
        for clock in clocks:
            clock.end()


def time_prediction(executor, x, timestep, model_options, seed):
    """PREDICT_NOISE: the first one begins the time."""
    for clock in clocks_of(model_options):
        clock.predict()
    return executor(x, timestep, model_options, seed)


def clocks_of(model_options: Mapping[str, Any]) -> tuple[RunClock, ...]:
    return model_options["transformer_options"].get(CLOCK, ())
