"""Floating point: which a device has, when its memory is out, and relative errors, defined once."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


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


# Relative errors: |found - reference| / |reference|, 0 where nothing differs, infinite from zero.


def ratio(error: float, size: float) -> float:
    """error / size of two norms: 0 for no error at all, infinite for an error of something that is zero."""
    return error / size if size else math.inf if error else 0.0


def ratios(errors: Tensor, sizes: Tensor) -> Tensor:
    """The ratio of every element."""
    return torch.where((errors == 0) & (sizes == 0), torch.zeros_like(errors), errors / sizes)


def relative_error(found: Tensor, reference: Tensor) -> float:
    """|found - reference| / |reference| over all elements, computed in float64 where the device has it."""
    wide = widest_float(found.device)
    found, reference = found.to(wide), reference.to(found.device, wide)
    return ratio(float((found - reference).norm()), float(reference.norm()))
