"""How a run decides which of its steps compute: fixed in advance, for a speedup, or within an error budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, hypot, log2, prod

from torch import Tensor

from .schedule import CacheConfig, optimal_schedule, spaced_steps

WARM_UP = 3  # steps that an error budget computes first: a curvature needs three
NEGLIGIBLE = 1 / 64  # of a computed step; a reused one below it counts as nothing


@dataclass(frozen=True)
class CachePolicy:
    """When to reuse: as `config` says, or so that `computed` steps compute, or for a `speedup` that the run measures,
    or while the estimated relative error of the image stays within `max_error`. Only in start..end, fractions of the
    run.

    `distances` (T, T) of a calibration place the `computed` steps at their optimum instead of the default spacing.
    """

    config: CacheConfig = CacheConfig()
    computed: int | None = None
    start: float = 0.0
    end: float = 1.0
    speedup: float | None = None
    max_error: float | None = None
    max_reused: int = 4
    distances: Tensor | None = field(default=None, compare=False)

    def plan(self, total: int, flow: bool = False) -> Plan:
        """The plan for a run of `total` steps; `flow` says that noise replaces the image instead of adding to it."""
        inside = range(ceil(self.start * total), ceil(self.end * total))
        order = self.config.order
        if self.speedup is not None:
            return SpeedupPlan(total, order, inside, self.speedup)
        if self.max_error is not None:
            return ErrorBudget(total, order, inside, self.max_error, self.max_reused, flow)
        if self.computed is None:
            return Plan(total, order, {i for i in range(total) if i not in inside or self.config.computes(i)})
        if self.distances is None or len(self.distances) == total:
            return Plan(total, order, spread(total, self.computed, inside, self.distances))
        plan = Plan(total, order, spread(total, self.computed, inside))
        plan.warnings.append(
            f"the calibration is of {len(self.distances)} steps and this run has {total}: default spacing"
        )
        return plan

    def describe(self) -> str:
        if self.speedup is not None:
            steps = f"{self.speedup:g}x"
        elif self.max_error is not None:
            steps = f"error {self.max_error:g}"
        elif self.computed is not None:
            steps = f"{self.computed} steps"
        elif self.config.steps is not None:
            steps = f"{len(self.config.steps)} chosen steps"
        else:
            steps = f"every {self.config.interval} steps"
        part = "" if (self.start, self.end) == (0.0, 1.0) else f" from {self.start:g} to {self.end:g}"
        return f"cache, {steps}{part}"

    def detail(self) -> str:
        """All of it, the same text in every process."""
        config = self.config
        steps = None if config.steps is None else sorted(config.steps)
        fixed = f"{config.interval} {steps} {config.mode} {config.order} {self.computed} {self.start} {self.end}"
        if self.distances is not None:
            fixed += f" optimum {float(self.distances.sum()):.6g}"
        return fixed if self.decided_before else f"{fixed} {self.speedup} {self.max_error} {self.max_reused}"

    @property
    def decided_before(self) -> bool:
        """Whether the steps are known before the run."""
        return self.speedup is None and self.max_error is None

    @property
    def off(self) -> bool:
        fixed = self.decided_before and self.computed is None and self.config.steps is None
        return self.speedup == 1 or self.max_error == 0 or (fixed and self.config.interval == 1)


def spread(total: int, computed: int, inside: range, distances: Tensor | None = None) -> set[int]:
    """All steps outside, and of those inside as many as make up the number: spaced, or where distances are least."""
    outside = set(range(total)) - set(inside)
    if not len(inside):
        return outside
    count = min(max(computed - len(outside), 1), len(inside))
    if distances is None:
        steps = spaced_steps(len(inside), count)
    else:
        steps = optimal_schedule(distances[inside.start : inside.stop, inside.start : inside.stop], count)
    return outside | {inside.start + step for step in steps}


class Plan:
    """The steps of one run that compute; step 0 always does."""

    def __init__(self, total: int, order: int, steps: set[int]):
        self.total, self.order, self.steps = total, order, steps | {0}
        self.warnings: list[str] = []
        self.measures = False  # wants to be told times
        self.noisy = False  # the sampler adds noise

    def computes(self, step: int) -> bool:
        return step in self.steps or step >= self.total

    def keeps(self, step: int) -> bool:
        """Whether a reused step reads what `step` computes: it reads the last order + 1 of them."""
        newer = 0
        for later in range(step + 1, self.total):
            if not self.computes(later):
                return True
            newer += 1
            if newer > self.order:
                return False
        return False

    def begin(self, step: int, position: float, sigma: float, following: float) -> None:
        """The sampler begins a step at noise level sigma; the next step begins at `following`."""

    def observe(self, position: float, denoised: Tensor) -> None:
        """What the guided model computed."""

    def time(self, computed: float, reused: float) -> None:
        """Seconds of a computed and of a reused evaluation, when both are known."""

    def restart(self) -> None:
        """The sampler went back to an earlier noise level: what was observed does not lead there."""


class SpeedupPlan(Plan):
    """As many computed steps as take 1 / speedup of the time of all, given what a reused step costs."""

    def __init__(self, total: int, order: int, inside: range, speedup: float):
        super().__init__(total, order, spread(total, affordable(total, speedup, 0.0), inside))
        self.inside, self.speedup, self.measures, self.step = inside, speedup, True, 0

    def keeps(self, step: int) -> bool:
        return True

    def begin(self, step: int, position: float, sigma: float, following: float) -> None:
        self.step = step

    def time(self, computed: float, reused: float) -> None:
        """Plans the rest anew where reuse is dearer than assumed; in powers of two, so that noise changes no image.

        Out of reach, the plan stays: computing still fewer steps would spoil the image and not be fast enough either.
        """
        self.measures, ratio = False, reused / computed
        if ratio < NEGLIGIBLE:
            return
        cost = min(1.0, 2.0 ** ceil(log2(ratio)))
        if cost >= 1 / self.speedup:
            share = f"a reused step takes {100 * ratio:.0f} % of a computed one"
            self.warnings.append(f"{self.speedup:g}x may be out of reach: {share}")
            return
        planned = spread(self.total, affordable(self.total, self.speedup, cost), self.inside)
        self.steps = {i for i in self.steps if i <= self.step} | {i for i in planned if i > self.step}


def affordable(total: int, speedup: float, cost: float) -> int:
    """The n with n + (total - n) cost <= total / speedup; at least one."""
    return min(total, max(1, int((total / speedup - total * cost) / (1 - cost)))) if cost < 1 else 1


class ErrorBudget(Plan):
    """Reuses while the estimated error of the image stays within its share of the budget.

    The remainder of a forecast of order p is Newton's next term, a divided difference of the computed predictions times
    the product of the distances; the term after it is added, because the next one alone vanishes where its sign turns.
    A step moves the sample by (1 - following / sigma) of an error in the prediction; relative to the sample this is the
    relative error of the final image where image and noise are Gaussian. No coefficient belongs to a model.
    """

    def __init__(self, total: int, order: int, inside: range, max_error: float, max_reused: int, flow: bool):
        super().__init__(total, order, set())
        self.inside, self.max_error, self.max_reused, self.flow = inside, max_error, max_reused, flow
        self.history: list[tuple[float, Tensor]] = []
        self.spent, self.reused = 0.0, 0

    def restart(self) -> None:
        self.history, self.reused, self.steps = [], 0, {0}

    def keeps(self, step: int) -> bool:
        return True

    def begin(self, step: int, position: float, sigma: float, following: float) -> None:
        free = WARM_UP <= step < self.total - 1 and step in self.inside and self.reused < self.max_reused
        error = self.estimate(position, sigma, following) if free else 0.0
        if free and self.spent + error <= self.max_error * (step + 1) / self.total:
            self.spent += error
            self.reused += 1
        else:
            self.steps.add(step)
            self.reused = 0

    def observe(self, position: float, denoised: Tensor) -> None:
        older = [(at, value) for at, value in self.history if position - at > 0.5 and value.shape == denoised.shape]
        self.history = [*older, (position, denoised.float())][-3 - self.order :]

    def estimate(self, position: float, sigma: float, following: float) -> float:
        """Relative error of the final image if this step is forecast; infinite while too few predictions are known."""
        if len(self.history) < self.order + 2:
            return float("inf")
        remainder = sum(
            root_mean_square(newton_term(self.history[-points:], position))
            for points in range(self.order + 2, len(self.history) + 1)
        )
        signal = root_mean_square(self.history[-1][1])
        image = (1 - following) if self.flow else 1.0
        return remainder * (1 - following / sigma) / hypot(image * signal, following)


def root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def newton_term(points: list[tuple[float, Tensor]], position: float) -> Tensor:
    """What the oldest point adds at `position` to the polynomial through the others."""
    return divided_difference(points) * prod(position - at for at, _ in points[1:])


def divided_difference(points: list[tuple[float, Tensor]]) -> Tensor:
    """Newton's divided difference over all points."""
    values = [value for _, value in points]
    for width in range(1, len(points)):
        values = [
            (values[i + 1] - values[i]) / (points[i + width][0] - points[i][0]) for i in range(len(points) - width)
        ]
    return values[0]
