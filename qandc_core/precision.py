"""Floating point that a device has: Apple's and some Intel GPUs lack float64."""

from __future__ import annotations

from functools import cache

import torch


@cache
def _has_float64(device_type: str, index: int | None) -> bool:
    try:
        torch.ones((), dtype=torch.float64, device=torch.device(device_type, index) if index else device_type).sum()
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float64 if _has_float64(device.type, device.index) else torch.float32


def with_float64(device: torch.device) -> torch.device:
    """The device, or the CPU for one without float64."""
    return device if widest_float(device) == torch.float64 else torch.device("cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """True for what Python, torch's CPU allocator and its accelerators raise when memory runs out."""
    known = (MemoryError, torch.cuda.OutOfMemoryError)
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, known) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )
