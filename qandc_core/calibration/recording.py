"""The part of a calibration of runs that lets further runs be added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..caching.runs import schedule_mismatch
from ..numerics import ratios
from .distances import FARTHEST
from .gain import ENOUGH, left_to_gain


@dataclass(eq=False)
class ScheduleSums:
    """Squared differences (T, T) between the predictions of steps i < j and squared norms (T,), summed over the runs at
    these noise levels; `noisy`: their sampler adds noise.
    """

    sigmas: list[float]
    sampler: str
    noisy: bool
    runs: int
    differences: Tensor
    norms: Tensor

    @classmethod
    def of(cls, sigmas: list[float], sampler: str, noisy: bool, predictions: list[Tensor]) -> ScheduleSums:
        values = torch.stack(predictions).double()
        differences = torch.cdist(values, values).square().fill_diagonal_(0.0)
        return cls(sigmas, sampler, noisy, 1, differences, values.square().sum(1))

    def like(self, other: ScheduleSums) -> bool:
        levels = len(self.sigmas) - 1, self.sigmas, len(other.sigmas) - 1, other.sigmas
        return self.noisy == other.noisy and not schedule_mismatch(*levels)

    def plus(self, other: ScheduleSums) -> ScheduleSums:
        """The sums of both, with the newer one's sampler."""
        sums = self.differences + other.differences, self.norms + other.norms
        return ScheduleSums(self.sigmas, other.sampler, self.noisy, self.runs + other.runs, *sums)

    def copied(self) -> ScheduleSums:
        return replace(self, differences=self.differences.clone(), norms=self.norms.clone())

    def distances(self) -> Tensor:
        """(T, T), as prediction_distances of all runs' predictions side by side."""
        sigmas = torch.tensor(self.sigmas, dtype=torch.float64)
        relative = ratios(self.differences.sqrt(), self.norms.sqrt()[None]).clamp(max=FARTHEST)
        return relative * (1 - sigmas[1:] / sigmas[:-1])[None]


@dataclass
class Recording:
    """State of a calibration of runs, to add further ones: keys of kept inputs and of held-out calls, schedules, and by
    how much each run lowered the layer error. `plan` is what it was begun with.
    """

    runs: int = 0
    samples: int = 0
    plan: dict[str, Any] = field(default_factory=dict)
    history: list[float] = field(default_factory=list)
    schedules: list[ScheduleSums] = field(default_factory=list)
    call_keys: list[float] = field(default_factory=list)
    keys: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"recording/keys/{name}": keys for name, keys in self.keys.items()}
        for i, schedule in enumerate(self.schedules):
            found[f"recording/schedules/{i}/differences"] = schedule.differences
            found[f"recording/schedules/{i}/norms"] = schedule.norms
        return found

    def header(self) -> dict[str, Any]:
        schedules = [[s.sigmas, s.sampler, s.noisy, s.runs] for s in self.schedules]
        plain = {"runs": self.runs, "samples": self.samples, "plan": self.plan, "history": self.history}
        return {**plain, "schedules": schedules, "call_keys": self.call_keys}

    def describe(self) -> str:
        return describe(self.header())


def describe(header: Mapping[str, Any]) -> str:
    """A recording's header in words: the number of runs, and whether they are enough."""
    held = f"{counted(header['runs'], 'run')}, {counted(header['samples'], 'sample')}"
    if not header["plan"].get("hessians", True):
        return held  # without GPTQ there is no error that runs lower
    left = left_to_gain(header["history"], header["runs"])
    return f"{held}: {'too few to tell whether they are enough' if left is None else gain_text(left)}"


def gain_text(left: float) -> str:
    amount = f"more runs would lower the error of GPTQ's rounding by about {100 * left:.0f} %"
    return f"enough, {amount}" if left < ENOUGH else amount


def counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def read_recording(tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None) -> Recording | None:
    """Raises KeyError or ValueError on parts that do not belong together."""
    if header is None:
        return None
    schedules = []
    for i, (sigmas, sampler, noisy, runs) in enumerate(header["schedules"]):
        parts = [tensors[f"recording/schedules/{i}/{name}"] for name in ("differences", "norms")]
        steps = len(sigmas) - 1
        if [tuple(part.shape) for part in parts] != [(steps, steps), (steps,)]:
            raise ValueError("its schedules do not fit their distances")
        schedules.append(ScheduleSums([float(s) for s in sigmas], str(sampler), bool(noisy), int(runs), *parts))
    prefix = "recording/keys/"
    keys = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    history, call_keys = ([float(value) for value in header[name]] for name in ("history", "call_keys"))
    return Recording(
        int(header["runs"]), int(header["samples"]), dict(header["plan"]), history, schedules, call_keys, keys
    )
