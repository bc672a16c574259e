"""Relative errors, defined once: |found - reference| / |reference|, 0 where nothing differs, infinite from zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .precision import widest_float


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
