"""The GPU of this machine where the fake one was: QANDC_GPU=1 runs the tests of this folder on real kernels.

What the fake device alone can show (garbage in freed memory, a device without float64, refused pages) is left out, and
what it counts is torch's own: a wait is an operation that torch warns of as synchronizing.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator

import torch

WANTED = bool(os.environ.get("QANDC_GPU"))
SYNCHRONIZING = "synchronizing CUDA operation"


class Waits(Counter):
    """Of the warnings so far, by the line that waited."""

    def __init__(self, said: list[warnings.WarningMessage]):
        found = [warning for warning in said if SYNCHRONIZING in str(warning.message)]
        super().__init__(("wait", f"{warning.filename}:{warning.lineno}") for warning in found)
        self.said = said

    def clear(self) -> None:
        self.said.clear()


class RealDevice:
    """What tests ask of FakeDevice."""

    def __init__(self, said: list[warnings.WarningMessage]):
        self.said = said

    waits = property(lambda self: Waits(self.said))
    held = property(lambda self: torch.cuda.memory_allocated())
    peak = property(lambda self: torch.cuda.max_memory_allocated())

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def device() -> Iterator[RealDevice]:
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield RealDevice(said)
        finally:
            torch.cuda.set_sync_debug_mode("default")
