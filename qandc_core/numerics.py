"""Relative errors, defined once."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ratio(error: float, size: float) -> float:
    """error / size of two norms: 0 for no error at all, infinite for an error of something that is zero."""
    return error / size if size else math.inf if error else 0.0


def relative_error(found: Tensor, reference: Tensor) -> float:
    """|found - reference| / |reference| over all elements, computed in float64 where the device has it."""
    wide = torch.float32 if found.device.type == "mps" else torch.float64
    found, reference = found.to(wide), reference.to(found.device, wide)
    return ratio(float((found - reference).norm()), float(reference.norm()))
