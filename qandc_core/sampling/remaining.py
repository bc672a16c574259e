"""How long long work will take, said in words once the first steps are done."""

from __future__ import annotations

import time
from collections.abc import Callable

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


class Remaining:
    """Tells after the first steps, and again after runs, now and then, what is left of so many steps of work.

    Only sampling counts: `resume` is called where it begins, after the model is loaded.
    """

    def __init__(self, work: str, tell: Callable[[str], None], now: Callable[[], float] = time.perf_counter):
        self.work, self.tell, self.now = work, tell, now
        self.steps, self.seconds, self.since, self.told = 0, 0.0, now(), now()

    def resume(self) -> None:
        self.since = self.now()

    def step(self, left: int, last: bool) -> None:
        """After a step: so many are left in all, and whether it was the last of its run."""
        now = self.now()
        self.steps, self.seconds, self.since = self.steps + 1, self.seconds + now - self.since, now
        remaining = about(self.seconds / self.steps * left)
        if self.steps == FIRST:
            self.told = now
            self.tell(f"{remaining} for {self.work}")
        elif last and left and now - self.told >= APART:
            self.told = now
            self.tell(f"{remaining} left of {self.work}")
