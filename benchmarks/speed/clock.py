"""Seconds of one call on CPU or CUDA."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qandc_core.sampling.clock import Stopwatch, mark, span, synchronize

CPU_CACHE = 2**26  # bytes
SPIN_CYCLES = 3e9  # of torch.cuda._sleep for each second that issuing the call takes; GPUs run below 3 GHz


def median_seconds(
    function: Callable[[], Any], device: torch.device | str, repeats: int = 20, cold: bool = False
) -> float:
    """Median seconds of a call after warm-up; by events on CUDA. `cold` empties the caches before
    every call, as the rest of a model does between two uses of a weight.
    """
    return statistics.median(call_seconds(function, torch.device(device), repeats, cold))


def best_seconds(function: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """The fastest call on the CPU, which other programs slow down; the median on CUDA, whose first calls are the
    fastest, before the clock falls.
    """
    seconds = call_seconds(function, device, repeats)
    return statistics.median(seconds) if device.type == "cuda" else min(seconds)


@torch.no_grad()
def call_seconds(function: Callable[[], Any], device: torch.device, repeats: int, cold: bool = False) -> list[float]:
    evict = cache_sized(device).zero_ if cold else nothing
    if device.type != "cuda":
        return cpu_seconds(function, repeats, evict)
    with torch.cuda.device(device):
        return cuda_seconds(function, device, repeats, evict)


@torch.no_grad()
def wall_seconds(function: Callable[[], Any], device: torch.device | str, repeats: int = 5) -> float:
    """Median seconds from issuing a call to its end, with whatever the device waits for Python."""
    device = torch.device(device)

    def finished() -> None:
        function()
        synchronize(device)

    return statistics.median(cpu_seconds(finished, repeats, nothing))


def nothing() -> None:
    pass


def cache_sized(device: torch.device) -> Tensor:
    """A buffer that replaces everything in the last cache."""
    size = CPU_CACHE
    if device.type == "cuda":
        size = max(size, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.empty(size, dtype=torch.int8, device=device)


def cpu_seconds(function: Callable[[], Any], repeats: int, evict: Callable[[], Any]) -> list[float]:
    function()
    seconds = []
    for _ in range(repeats):
        evict()
        watch = Stopwatch()
        function()
        seconds.append(watch.seconds())
    return seconds


def cuda_seconds(
    function: Callable[[], Any], device: torch.device, repeats: int, evict: Callable[[], Any]
) -> list[float]:
    """The device spins while a call is queued: its kernels follow each other however slowly Python issues them."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    watch = Stopwatch()
    function()
    cycles = int(SPIN_CYCLES * watch.seconds()) + 100_000
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        evict()
        begun = mark(device)
        function()
        seconds.append(span(begun, mark(device)))
    return seconds
