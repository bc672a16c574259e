"""Policies by intent instead of by number: how fast it should be, and the rest by what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from .plans import Plan, PresetPlan
from .policies import Placed
from .runs import RunFacts
from .samplers import SamplerFacts
from .schedule import SPACING, affordable

LEVELS = {"auto": 2.0, "safe": 1.5, "balanced": 2.0, "fast": 3.0}  # target speedups
DISTILLED = 12  # steps up to which a run without guidance is that of a distilled model
# So few computed steps are too far apart for a dense end: they have this exponent of the spacing instead.
FEW_COMPUTED = 12
EVEN = 0.8


@dataclass(frozen=True)
class Preset(Placed):
    """A target speedup that chooses order and steps by itself, and computes more where so few would be no better than
    a run of fewer steps. `level` is one of LEVELS; "auto" also leaves runs of few steps without guidance as they are,
    which are those of distilled models. The order follows from the sampler and the calibration, whatever `order` says.
    """

    level: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {self.level!r}.")

    def planned(self, run: RunFacts, inside: range) -> Plan:
        sampler, speedup = SamplerFacts.named(run.sampler, run.noisy, run.flow), LEVELS[self.level]
        if self.level == "auto" and run.guided is False and run.total <= DISTILLED:
            plan = Plan(run.total, 0, set(range(run.total)))
            plan.warnings.append(f"{run.total} steps without guidance: taken for a distilled model, nothing is reused")
            plan.idle = True
            return plan
        num_computed = sampler.enough(run.total, affordable(run.total, speedup, 0.0))
        exponent = SPACING if sampler.noisy or num_computed > FEW_COMPUTED else EVEN
        # Curvature helps where the steps were chosen for it, and not at the default spacing.
        order = 0 if sampler.noisy else 2 if self.fitting(run) else 1
        place = self.place(run, order, exponent)
        return PresetPlan(run.total, order, inside, speedup, place, run.cost, sampler)

    def phrase(self) -> str:
        return self.level

    def detail(self) -> str:
        return self.line(rest=f"{self.optimum()} {self.level}")
