"""Which steps of one run compute. A CachePolicy makes a plan for each run; the run asks it step by step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import hypot, prod

import torch
from torch import Tensor

from .samplers import SamplerFacts
from .schedule import affordable, spread

Place = Callable[
    [int, int, range], Collection[int]
]  # the computed steps: of how many, how many, which of them may reuse

WARM_UP = 3  # steps that an error budget computes first: a curvature needs three
LEAST_GAIN = 1.25  # speedup below which reuse is not worth its error
KEPT = 0.95  # of a promised speedup: what falls short by less is neither corrected nor told
FEW_STEPS = 8  # up to here reuse measured hardly better than a run of as many steps as are computed


class Plan:
    """The steps of one run that compute; step 0 always does. Fixed before the run unless a subclass says otherwise."""

    def __init__(self, total: int, order: int, steps: set[int]):
        self.total, self.order, self.steps = total, order, steps | {0}
        self.warnings: list[str] = []
        self.part, self.noisy = "", False  # in words, and whether the sampler adds noise
        self.idle = False  # computes all steps on purpose, and says so

    def computes(self, step: int) -> bool:
        return step in self.steps or step >= self.total

    def keeps(self, step: int) -> bool:
        """True if a reused step reads what `step` computes: it reads the last order + 1 computed steps."""
        newer = 0
        for later in range(step + 1, self.total):
            if not self.computes(later):
                return True
            newer += 1
            if newer > self.order:
                return False
        return False

    def charge(self, cost: float) -> None:
        """Sets the cost of a reused step relative to a computed one. Only steps to come may change."""

    def restart(self) -> None:
        """The sampler went back to an earlier noise level: what was observed does not lead there."""

    def begin(self, step: int, position: float, sigma: float, following: float) -> None:
        """The sampler begins a step at noise level sigma; the next step begins at `following`."""

    def observe(self, position: float, denoised: Tensor) -> None:
        """Takes the guided prediction of a computed step."""

    def review(self, steps: Collection[int]) -> list[str]:
        """Warnings about a run that computed these steps."""
        few = few_steps(self.total, steps, self.order, self.noisy)
        return [*self.warnings, few] if few else list(self.warnings)


def few_steps(total: int, steps: Collection[int], order: int, noisy: bool) -> str:
    """Says where reuse has too few steps to go by; "" elsewhere.

    Reusing a prediction over Euler's steps is one longer step, and extrapolation needs two computed ones.
    """
    count = len(steps)
    if not 0 < count < total <= FEW_STEPS or (noisy and total > FEW_STEPS // 2):
        return ""
    reused = set(range(total)) - set(steps)
    held = order == 0 or all(sum(step < later for step in steps) < 2 for later in reused)
    return f"{total} steps with {count} computed are {'no' if held else 'hardly'} better than a run of {count}"


class CountedPlan(Plan):
    """A number of computed steps, which `place` lays into the part of the run that may reuse."""

    def __init__(self, total: int, order: int, inside: range, num_computed: int, place: Place = spread):
        super().__init__(total, order, set(place(total, num_computed, inside)))
        self.asked = num_computed

    def review(self, steps: Collection[int]) -> list[str]:
        found, least = super().review(steps), len(self.steps)
        if self.asked < least < self.total:
            found.append(f"{self.asked} computed steps requested, at least {least} are needed{self.part}")
        elif max(least, self.asked) < len(steps) < self.total:
            found.append(f"{self.asked} computed steps requested, {len(steps)} were computed")
        return found


class SpeedupPlan(Plan):
    """As many computed steps as cost 1 / speedup of a run that computes all, given what a reused step costs.

    Where the steps outside start..end or a costly reuse put the speedup out of reach, one warning says what is left.
    Where a reused step costs more than the target allows for any, steps are planned as if it were free: computing
    still fewer would spoil the image and not reach the target either.
    """

    def __init__(self, total: int, order: int, inside: range, speedup: float, place: Place = spread, cost: float = 0.0):
        super().__init__(total, order, set())
        self.inside, self.speedup, self.place, self.count = inside, speedup, place, 0
        self.charge(cost)

    def charge(self, cost: float) -> None:
        self.cost = cost
        count = affordable(self.total, self.speedup, 0.0)
        if cost < 1 / self.speedup and self.reached(count) < KEPT * self.speedup:
            count = affordable(self.total, self.speedup, cost)
        count = self.enough(count)
        if count != self.count:
            self.count, self.steps = count, {0, *self.place(self.total, count, self.inside)}

    def enough(self, num_computed: int) -> int:
        """As many computed steps, or more where so few are known to fail."""
        return num_computed

    def reached(self, num_computed: int) -> float:
        """The speedup of a run that computes as many steps, by the counted cost of the others."""
        return self.total / max(num_computed + (self.total - num_computed) * self.cost, 1e-9)

    def review(self, steps: Collection[int]) -> list[str]:
        found, planned = super().review(steps), self.reached(len(self.steps))
        if 1 < planned < KEPT * self.speedup:
            found.append(f"{self.speedup:g}x requested, {planned:.2g}x possible{self.because()}")
        elif len(self.steps) < len(steps) < self.total and self.reached(len(steps)) < 0.9 * self.speedup:
            reached = self.reached(len(steps))
            found.append(
                f"{self.speedup:g}x requested, {reached:.2g}x reached: {len(steps)} of {self.total} steps were computed"
            )
        return found

    def because(self) -> str:
        if self.cost >= 1 / self.speedup:
            return f": a reused step costs {100 * self.cost:.0f} % of a computed one"
        return self.part or f" with {self.total} steps"


class PresetPlan(SpeedupPlan):
    """A speedup as far as measurements say that it beats a run of fewer steps; where none does, all steps compute."""

    def __init__(
        self, total: int, order: int, inside: range, speedup: float, place: Place, cost: float, sampler: SamplerFacts
    ):
        self.sampler = sampler
        super().__init__(total, order, inside, speedup, place, cost)

    def enough(self, num_computed: int) -> int:
        least = self.sampler.enough(self.total, num_computed)
        self.idle = self.total < LEAST_GAIN * least
        return self.total if self.idle else least

    def review(self, steps: Collection[int]) -> list[str]:
        """In place of what a SpeedupPlan says of few steps."""
        found, count, name = list(self.warnings), len(self.steps), self.sampler.name
        if self.idle and self.inside:
            fewer = affordable(self.total, self.speedup, 0.0)
            found.append(f"{self.total} steps of {name}: nothing to gain; use {fewer} steps")
        elif self.reached(count) < KEPT * self.speedup:
            reached = f"{self.reached(count):.2g}x"
            found.append(f"{self.speedup:g}x would be no better than fewer steps of {name}; {reached} is")
        return found


class BudgetPlan(Plan):
    """Reuses while the estimated error of the image stays within its share of the budget.

    The remainder of an extrapolation of order p is Newton's next term, a divided difference of the computed predictions
    times the product of the distances; the term after it is added, as the next one alone vanishes where its sign turns.
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
        """Relative error of the final image if this step reuses; infinite while too few predictions are known."""
        if len(self.history) < self.order + 2:
            return float("inf")
        terms = [newton_term(self.history[-n:], position) for n in range(self.order + 2, len(self.history) + 1)]
        *remainders, signal = root_mean_squares([*terms, self.history[-1][1]])
        remainder = sum(remainders)
        image = (1 - following) if self.flow else 1.0
        return remainder * (1 - following / sigma) / hypot(image * signal, following)


def root_mean_squares(tensors: Sequence[Tensor]) -> list[float]:
    """The root mean square of each tensor, read in one wait for the device."""
    return torch.stack([values.square().mean().sqrt() for values in tensors]).tolist()


def newton_term(points: list[tuple[float, Tensor]], position: float) -> Tensor:
    """The oldest point's contribution at `position` to the polynomial through the others."""
    return divided_difference(points) * prod(position - at for at, _ in points[1:])


def divided_difference(points: list[tuple[float, Tensor]]) -> Tensor:
    """Newton's divided difference over all points."""
    values = [value for _, value in points]
    for width in range(1, len(points)):
        values = [
            (values[i + 1] - values[i]) / (points[i + width][0] - points[i][0]) for i in range(len(points) - width)
        ]
    return values[0]
