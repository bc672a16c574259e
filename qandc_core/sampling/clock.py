"""Times of model calls that do not make the device wait."""

from __future__ import annotations

import time

import torch


class CallTimes:
    """Seconds of computed and of reused calls on CPU and CUDA; there by events that are read when asked for."""

    def __init__(self) -> None:
        self.spans: dict[bool, list[tuple]] = {False: [], True: []}

    def mark(self, device: torch.device):
        """A moment; None on a device that has no clock here."""
        if device.type == "cpu":
            return time.perf_counter()
        if device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def add(self, begun, ended, reused: bool) -> None:
        if begun is not None:
            self.spans[reused].append((begun, ended))

    @property
    def known(self) -> bool:
        """Whether both kinds were seen."""
        return all(self.spans.values())

    def seconds(self, reused: bool) -> list[float]:
        return [span(begun, ended) for begun, ended in self.spans[reused]]

    def speedup(self) -> float | None:
        """How much longer all calls would have taken had each computed; None before both kinds were seen."""
        computed, reused = self.seconds(False), self.seconds(True)
        if not self.known:
            return None
        median = sorted(computed)[len(computed) // 2]
        return median * len(computed + reused) / sum(computed + reused)


def span(begun, ended) -> float:
    if isinstance(begun, float):
        return ended - begun
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000
