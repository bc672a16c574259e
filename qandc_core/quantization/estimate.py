"""How long several kinds of work still take, each at the pace that it has had so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass
class Share:
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
        self.shares = {kind: Share(total) for kind, total in totals.items()}
        self.clock, self.last, self.spent = clock, clock(), 0.0

    def did(self, kind: str, amount: float) -> None:
        """All that happened since the last call was this."""
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
        return "less than a minute left" if self.left < 50 else f"about {max(1, round(self.left / 60))} min left"
