"""Progress of a quantization, as a bar and as words on its node.

Without a picture: Nodes 2.0 keeps that beside the picture which the node has in the end.
"""

from __future__ import annotations

import time

from ....qandc_core.sampling.remaining import Estimate
from ..sampling import Progress
from ..status import show

UNITS = 1000  # of the bar
TELL = 2.0  # seconds between two texts


class Work(Progress):
    """`rounding` is in operations, `calls` in predictions of the whole model."""

    def __init__(self, patcher, rounding: float, calls: int, node_id: str | None = None):
        super().__init__(patcher, UNITS)
        self.work = Estimate({"rounding": rounding, "calls": calls})
        self.node_id, self.told = node_id, 0.0

    def did(self, kind: str, amount: float, text: str) -> None:
        self.work.did(kind, amount)
        self.done = max(self.done, round((UNITS - 1) * self.work.fraction)) - 1  # advance adds one
        self.advance()
        if time.monotonic() - self.told >= TELL:
            self.told = time.monotonic()
            show(self.node_id, f"{text}, {self.work.words()}")

    def called(self) -> None:
        """An answer of the model."""
        self.did("calls", 1, "measuring the model's error")
