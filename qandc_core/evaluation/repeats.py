"""Times of runs that are measured again, in turns.

A machine drifts: it warms up, clocks down, or does something else for a while. Runs that follow each other are hit by
different moments of it, runs in turns by the same. Every round samples each run once, in the reverse order of the round
before, so that a steady drift falls on all alike; a first round compiles, tunes and fills caches, and is not counted.
The speedup of a round compares neighbours in time, and the range over the rounds says how far it can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class MeasuredSpeedup:
    """Reference time over a run's: the median over rounds, the least and the largest."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, reference: Sequence[float], run: Sequence[float]) -> MeasuredSpeedup:
        """From the seconds of the same rounds. Raises ValueError on different numbers of rounds."""
        ratios = [first / other for first, other in zip(reference, run, strict=True)]
        return cls(median(ratios), min(ratios), max(ratios), len(ratios))

    def __str__(self) -> str:
        ranged = f" ({self.low:.2f}-{self.high:.2f})" if self.rounds > 1 else ""
        return f"{self.median:.2f}x{ranged}"


def in_turns(runs: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Seconds of each run in each round, as the runs return them; a round before the first is not counted."""
    times: list[list[float]] = [[] for _ in runs]
    order = list(range(len(runs)))
    for number in range(1 + rounds):
        for i in order:
            seconds = runs[i]()
            if number:
                times[i].append(seconds)
        order.reverse()
    return times
