"""The cache policies: one dataclass for each way to say which steps compute and which reuse.

A policy is immutable and knows no run; `plan` makes the steps of one run of it. All but ErrorBudget fix them before the
run from counts alone (how many steps, what a reused one costs), so the same settings compute the same steps everywhere.
A new policy is a subclass with limits, planned, phrase, detail and off; the node and the engine take any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import ceil, isfinite

from .plans import BudgetPlan, CountedPlan, Place, Plan, SpeedupPlan
from .runs import RunFacts, StepDistances
from .schedule import SPACING, check_order, spread


@dataclass(frozen=True)
class CachePolicy:
    """Base of all policies: reuse only between `start` and `end`, fractions of the run, with this order.

    `order` 0 reuses the last computed value, 1 extrapolates linearly from the last two, 2 adds half the curvature of
    the last three.
    """

    order: int = field(default=0, kw_only=True)
    start: float = field(default=0.0, kw_only=True)
    end: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_order(self.order)
        for name, low, high in self.limits():
            value = getattr(self, name)
            if not (low <= value <= high and isfinite(value)):
                span = f"{low:g} or more" if high == float("inf") else f"between {low:g} and {high:g}"
                raise ValueError(f"{name} must be {span}, got {value:g}.")

    def limits(self) -> list[tuple[str, float, float]]:
        """Least and greatest value of every number."""
        return [("start", 0, 1), ("end", 0, 1)]

    def inside(self, total: int) -> range:
        """The steps that may reuse."""
        return range(ceil(self.start * total), ceil(self.end * total))

    def plan(
        self,
        total: int,
        flow: bool = False,
        *,
        cost: float = 0.0,
        sigmas: Sequence[float] | None = None,
        noisy: bool | None = None,
        sampler: str = "",
        guided: bool | None = None,
    ) -> Plan:
        """The plan for a run of `total` steps; for the other arguments see RunFacts."""
        run, inside = RunFacts(total, flow, cost, sigmas, noisy, sampler, guided), self.inside(total)
        plan = self.planned(run, inside)
        plan.part, plan.noisy = self.part, bool(noisy)
        plan.warnings += self.remarks(run)
        if total and not inside:
            plan.warnings.append(f"no step of {total} lies in the part{self.part}")
        return plan

    def planned(self, run: RunFacts, inside: range) -> Plan:
        raise NotImplementedError

    def remarks(self, run: RunFacts) -> list[str]:
        """Warnings that are known before the run."""
        return []

    def phrase(self) -> str:
        """The policy in a few words."""
        raise NotImplementedError

    @property
    def part(self) -> str:
        return "" if (self.start, self.end) == (0.0, 1.0) else f" from {self.start:g} to {self.end:g}"

    def describe(self) -> str:
        return f"cache, {self.phrase()}{self.part}"

    def detail(self) -> str:
        """All of it, the same text in every process. Saved compensations are found by it, so its form stays."""
        return self.line()

    def line(
        self, interval: int = 1, steps: list[int] | None = None, num_computed: int | None = None, rest: str = ""
    ) -> str:
        return f"{interval} {steps} branch {self.order} {num_computed} {self.start} {self.end}{rest}"

    @property
    def decided_before(self) -> bool:
        """True if the steps of a run are known before it."""
        return True

    @property
    def off(self) -> bool:
        """True if nothing is ever reused."""
        return False


@dataclass(frozen=True)
class Interval(CachePolicy):
    """Every `interval`-th step computes, from the first on (FORA, arXiv 2407.01425). 1 reuses nothing."""

    interval: int = 3

    def limits(self) -> list[tuple[str, float, float]]:
        return [("interval", 1, float("inf")), *super().limits()]

    def planned(self, run: RunFacts, inside: range) -> Plan:
        return Plan(run.total, self.order, {i for i in range(run.total) if i not in inside or i % self.interval == 0})

    def phrase(self) -> str:
        return f"every {self.interval} steps"

    def detail(self) -> str:
        return self.line(interval=self.interval)

    @property
    def off(self) -> bool:
        return self.interval == 1


@dataclass(frozen=True)
class ChosenSteps(CachePolicy):
    """Exactly these steps compute, and step 0."""

    steps: frozenset[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "steps", frozenset(map(int, self.steps)))
        if any(step < 0 for step in self.steps):
            raise ValueError(f"Steps are counted from 0, got {min(self.steps)}.")

    def planned(self, run: RunFacts, inside: range) -> Plan:
        return Plan(run.total, self.order, {i for i in range(run.total) if i not in inside or i in self.steps})

    def remarks(self, run: RunFacts) -> list[str]:
        beyond = [step for step in self.steps if step >= run.total]
        return [f"chosen steps from {min(beyond)} on lie past the last step, {run.total - 1}"] if beyond else []

    def phrase(self) -> str:
        return f"{len(self.steps)} chosen steps"

    def detail(self) -> str:
        return self.line(steps=sorted(self.steps))


@dataclass(frozen=True)
class Placed(CachePolicy):
    """A policy whose number of computed steps is known, so that `distances` of a calibration can say which.

    Where these belong to another run, the steps have the default spacing and the plan says so.
    """

    distances: StepDistances | None = field(default=None, compare=False, kw_only=True)

    def place(self, run: RunFacts, order: int, exponent: float = SPACING) -> Place:
        """Lays computed steps where a calibration of this run says, for forecasts of this order, or by the spacing."""
        found = self.fitting(run)
        if found is None:
            return partial(spread, exponent=exponent)
        return partial(calibrated_steps, found, order)

    def fitting(self, run: RunFacts) -> StepDistances | None:
        """The distances, where they are of such a run."""
        return None if self.distances is None or self.distances.mismatch(run) else self.distances

    def executed(self, run: RunFacts) -> int:
        """The order of the forecasts of whole predictions: they are held where the sampler adds noise."""
        return 0 if run.noisy else self.order

    def remarks(self, run: RunFacts) -> list[str]:
        reason = self.distances.mismatch(run) if self.distances is not None else ""
        return [f"the calibration does not place the steps because {reason}; default spacing"] if reason else []

    def optimum(self) -> str:
        if self.distances is None:
            return ""
        return f" optimum {float(self.distances.values.sum()):.6g}" + (" of forecasts" if self.order else "")


@lru_cache(maxsize=32)
def calibrated_steps(
    distances: StepDistances, order: int, total: int, num_computed: int, inside: range
) -> frozenset[int]:
    """The best steps for forecasts of this order; the same runs again, and planning takes part of a second."""
    return frozenset(spread(total, num_computed, inside, distances.values, order, distances.lengths))


@dataclass(frozen=True)
class StepCount(Placed):
    """`num_computed` steps of the run compute, those outside start..end counted."""

    num_computed: int

    def limits(self) -> list[tuple[str, float, float]]:
        return [("num_computed", 1, float("inf")), *super().limits()]

    def planned(self, run: RunFacts, inside: range) -> Plan:
        place = self.place(run, self.executed(run))
        return CountedPlan(run.total, self.order, inside, self.num_computed, place)

    def phrase(self) -> str:
        return f"{self.num_computed} steps"

    def detail(self) -> str:
        return self.line(num_computed=self.num_computed) + self.optimum()


@dataclass(frozen=True)
class Speedup(Placed):
    """As many steps compute as make the model calls `speedup` times faster, by the counted cost of a reused step."""

    speedup: float

    def limits(self) -> list[tuple[str, float, float]]:
        return [("speedup", 1, float("inf")), *super().limits()]

    def planned(self, run: RunFacts, inside: range) -> Plan:
        place = self.place(run, self.executed(run))
        return SpeedupPlan(run.total, self.order, inside, self.speedup, place, run.cost)

    def phrase(self) -> str:
        return f"{self.speedup:g}x"

    def detail(self) -> str:
        return self.line(rest=f"{self.optimum()} {self.speedup} None 4")

    @property
    def off(self) -> bool:
        return self.speedup == 1


@dataclass(frozen=True)
class ErrorBudget(CachePolicy):
    """Steps reuse while the estimated relative error of the image stays within `max_error`, at most `max_reused` in a
    row. Harder images compute more steps.
    """

    max_error: float
    max_reused: int = 4

    def limits(self) -> list[tuple[str, float, float]]:
        return [("max_error", 0, float("inf")), ("max_reused", 0, float("inf")), *super().limits()]

    def planned(self, run: RunFacts, inside: range) -> Plan:
        return BudgetPlan(run.total, self.order, inside, self.max_error, self.max_reused, run.flow)

    def phrase(self) -> str:
        return f"error {self.max_error:g}"

    def detail(self) -> str:
        return self.line(rest=f" None {self.max_error} {self.max_reused}")

    @property
    def decided_before(self) -> bool:
        return False

    @property
    def off(self) -> bool:
        return self.max_error == 0
