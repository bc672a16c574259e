"""Kernels of an integer DiT block: inputs normalised, modulated, rotated and quantized in one pass, and int8 products
that end in GELU, codes or a gated residual. `reference` is plain torch, `triton_ops` the same functions in Triton.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


@cache
def available(device: torch.device | str) -> bool:
    """True if the Triton kernels can run on a device: CUDA of capability 8.0 or newer, and Triton installed."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
