"""Remaining time, estimated for each kind of work from its pace so far, and in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FIRST = 2  # steps after which there is something to go by; a cache may reuse the second
APART = 20.0  # seconds between two estimates


def duration(seconds: float) -> str:
    """Such as 45 s, 4 min 10 s or 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def about(seconds: float) -> str:
    """The same to one unit: about 40 seconds, 6 minutes, 2.5 hours."""
    for unit, size in (("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * size:
            return f"about {round(seconds / size, 1 if unit == 'hour' and seconds < 10 * size else None):g} {unit}s"
    return "about a minute" if seconds >= 50 else f"about {max(10, 10 * round(seconds / 10))} seconds"


@dataclass
class Pace:
    """One kind of work: how much there is, how much is done, and the seconds that took."""

    total: float
    done: float = 0.0
    seconds: float = 0.0

    @property
    def left(self) -> float:
        """Seconds; 0 while the pace is unknown or where more was done than expected."""
        return self.seconds / self.done * max(0.0, self.total - self.done) if self.done else 0.0


class Estimate:
    """`totals` are amounts of each kind of work in units of its own; work of one kind follows upon another."""

    def __init__(self, totals: Mapping[str, float], clock: Callable[[], float] = time.monotonic):
        self.shares = {kind: Pace(total) for kind, total in totals.items()}
        self.clock, self.last, self.spent = clock, clock(), 0.0

    def resume(self) -> None:
        """Excludes the time since the last call."""
        self.last = self.clock()

    def did(self, kind: str, amount: float) -> None:
        """Counts the time since the last call for this kind of work."""
        now, share = self.clock(), self.shares[kind]
        share.done, share.seconds = share.done + amount, share.seconds + now - self.last
        self.spent, self.last = self.spent + now - self.last, now

    @property
    def left(self) -> float:
        """Seconds."""
        return sum(share.left for share in self.shares.values())

    @property
    def fraction(self) -> float:
        """Fraction of the whole time that has passed."""
        whole = self.spent + self.left
        return self.spent / whole if whole else 0.0

    def words(self) -> str:
        """The time left, as roughly as it is known."""
        return f"{about(self.left)} left"


class Remaining(Estimate):
    """Tells after the first steps, and again after runs, now and then, what is left of so many steps of work.

    Only sampling counts: `resume` is called where it begins, after the model is loaded.
    """

    def __init__(self, work: str, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        super().__init__({"steps": 0}, clock)
        self.work, self.tell, self.told = work, tell, self.last

    def step(self, left: int, last: bool) -> None:
        """After a step: so many are left in all, and whether it was the last of its run."""
        self.did("steps", 1)
        steps = self.shares["steps"]
        steps.total = steps.done + left
        if steps.done == FIRST:
            self.told = self.last
            self.tell(f"{about(self.left)} for {self.work}")
        elif last and left and self.last - self.told >= APART:
            self.told = self.last
            self.tell(f"{self.words()} of {self.work}")
