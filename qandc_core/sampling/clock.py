"""The one clock: moments that a device passes, read only when someone asks for the seconds between them.

An accelerator runs behind the host, so the host's clock tells when work was queued, and waiting for the device to make
it tell more stops the queue at every step. A moment is therefore an event in the device's own queue where it has any
(CUDA, ROCm, XPU, MPS), and the host's time on a CPU. Only `span`, which reads two of them, waits.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch


def device_module(device: torch.device) -> Any:
    """torch.cuda, torch.xpu, torch.mps and so on; None for a device without a queue or unknown to torch."""
    return None if device.type in ("cpu", "meta") else getattr(torch, device.type, None)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that was queued."""
    wait = getattr(device_module(device), "synchronize", None)
    if wait is not None:
        wait() if device.type == "mps" else wait(device)


def mark(device: torch.device) -> Any:
    """A moment of the device, which `span` reads; None on a device that has no clock here."""
    if device.type == "cpu":
        return time.perf_counter()
    module = device_module(device)
    if not hasattr(module, "Event"):
        return None
    moment = module.Event(enable_timing=True)
    stream = getattr(module, "current_stream", None)
    moment.record() if stream is None else moment.record(stream(device))
    return moment


def host_mark(device: torch.device) -> float:
    """The host's time after the device has caught up: the moment of a device without events."""
    synchronize(device)
    return time.perf_counter()


def span(begun: Any, ended: Any) -> float:
    """Seconds between two moments of one device; waits for the second."""
    if isinstance(begun, float):
        return ended - begun
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000


class Stopwatch:
    """Seconds since it was made, of the host and all that a device was given to do meanwhile."""

    def __init__(self, device: torch.device | None = None):
        self.device = device or torch.device("cpu")
        self.begun = host_mark(self.device)

    def seconds(self) -> float:
        return host_mark(self.device) - self.begun


class StepClock:
    """Seconds of the steps of a run, each from where the last ended, or from where `begin` was called since."""

    def __init__(self, device: torch.device):
        self.device = device
        self.spans: list[tuple[Any, Any]] = []
        self.begin()

    def now(self) -> Any:
        moment = mark(self.device)
        return host_mark(self.device) if moment is None else moment

    def begin(self) -> None:
        """Excludes what was done since the last step from the next."""
        self.begun = self.now()

    def end(self) -> None:
        ended = self.now()
        self.spans.append((self.begun, ended))
        self.begun = ended

    @property
    def latest(self) -> float:
        """Seconds of the last step; waits for it."""
        return span(*self.spans[-1])

    def seconds(self) -> list[float]:
        """Seconds of every step; waits once, for the last."""
        return [span(*pair) for pair in reversed(self.spans)][::-1]


class CallTimes:
    """Seconds of computed and of reused calls, without waiting for any before they are asked for."""

    def __init__(self) -> None:
        self.spans: dict[bool, list[tuple]] = {False: [], True: []}

    def add(self, begun: Any, ended: Any, reused: bool) -> None:
        if begun is not None:
            self.spans[reused].append((begun, ended))

    @property
    def known(self) -> bool:
        """True if both kinds were seen."""
        return all(self.spans.values())

    def seconds(self, reused: bool) -> list[float]:
        return [span(begun, ended) for begun, ended in self.spans[reused]]

    def speedup(self) -> float | None:
        """Time of all calls had each been computed, over the time they take, by the median call of either kind; None
        before both were seen.
        """
        if not self.known:
            return None
        computed, reused = self.seconds(False), self.seconds(True)
        each, cheap = median(computed), median(reused)
        return each * len(computed + reused) / (each * len(computed) + cheap * len(reused))
