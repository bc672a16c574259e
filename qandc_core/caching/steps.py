"""Which step of a schedule a noise level belongs to."""

from __future__ import annotations

from collections.abc import Sequence

LEVEL_TOLERANCE = 1e-4  # relative, between a noise level of the schedule and the same level as a sampler computes it


def same_level(first: float, second: float) -> bool:
    return abs(first - second) <= LEVEL_TOLERANCE * max(abs(first), abs(second))


def step_at(sigmas: Sequence[float], sigma: float) -> int:
    """The step of a falling schedule that a model call at `sigma` belongs to: the last that begins at or above it."""
    begun = [i for i, start in enumerate(sigmas[:-1]) if start >= sigma * (1 - LEVEL_TOLERANCE)]
    return begun[-1] if begun else 0


class Steps:
    """Locates noise levels in a schedule (T + 1,) that falls, rises or does both, in the order in which they come.

    A level belongs to the step that begins at it or passes it, the present one or the next after it. Where only an
    earlier step does, or the level turns back, a new pass begins.
    """

    def __init__(self, sigmas: Sequence[float]):
        self.sigmas = list(sigmas)
        self.total = max(len(self.sigmas) - 1, 0)
        self.at = 0
        self.level: float | None = None
        self.rises: bool | None = None  # direction of the present pass

    def locate(self, sigma: float) -> bool:
        """Sets `at` to the step of an evaluation at noise level sigma; returns whether it begins a new pass."""
        if not self.total:
            return False
        level = min(max(sigma, min(self.sigmas)), max(self.sigmas))
        before, found = self.at, self.find(level)
        back = found < before or (found > before and self.turns(level))
        moved = self.level is not None and not same_level(level, self.level)
        if back:
            self.rises = None
        elif moved and self.level is not None and found > before:
            self.rises = level > self.level
        self.at, self.level = found, level
        return back

    def find(self, level: float) -> int:
        ahead = (i for i in range(self.at, self.total) if self.holds(i, level) and not self.is_over(i, level))
        behind = (i for i in reversed(range(self.at)) if self.holds(i, level))
        return next(ahead, next(behind, self.total - 1))

    def holds(self, i: int, level: float) -> bool:
        begin, end = self.sigmas[i], self.sigmas[i + 1]
        if same_level(begin, level):
            return True
        return not same_level(end, level) and min(begin, end) < level < max(begin, end)

    def is_over(self, i: int, level: float) -> bool:
        """A step of no length is evaluated once."""
        zero = same_level(self.sigmas[i], self.sigmas[i + 1])
        return zero and i == self.at and self.level is not None and same_level(self.level, level) and i + 1 < self.total

    def turns(self, level: float) -> bool:
        if self.level is None or self.rises is None or same_level(level, self.level):
            return False
        return (level > self.level) != self.rises

    def fraction(self, sigma: float) -> float:
        """Position of an evaluation between the present step and the next, 0..1, by noise level."""
        if not self.total:
            return 0.0
        begin, end = self.sigmas[self.at], self.sigmas[self.at + 1]
        return 0.0 if begin == end else min(max((begin - sigma) / (begin - end), 0.0), 1.0)
