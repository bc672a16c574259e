"""Times of model calls that do not make the device wait."""

from __future__ import annotations

import time

import torch

Mark = "float | torch.cuda.Event"


class CallTimes:
    """Seconds of computed and of reused calls; on a GPU by events that are read when they are asked for."""

    def __init__(self) -> None:
        self.spans: dict[bool, list[tuple]] = {False: [], True: []}

    def mark(self, device: torch.device):
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def add(self, begun, ended, reused: bool) -> None:
        self.spans[reused].append((begun, ended))

    def seconds(self, reused: bool) -> list[float]:
        return [span(begun, ended) for begun, ended in self.spans[reused]]

    def speedup(self) -> float | None:
        """How much longer all calls would have taken had each computed; None before both kinds were seen."""
        computed, reused = self.seconds(False), self.seconds(True)
        if not computed or not reused:
            return None
        median = sorted(computed)[len(computed) // 2]
        return median * len(computed + reused) / sum(computed + reused)


def span(begun, ended) -> float:
    if isinstance(begun, float):
        return ended - begun
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000
