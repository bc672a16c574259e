"""The uniform quantizer (Q&C, arXiv 2503.02508, Eq. 1-3). Codes are stored signed: q - 2^(b-1) where q is unsigned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-12


@dataclass(frozen=True)
class Grid:
    """scale and zero point (signed, float) that broadcast over what they quantize; codes lie in [low, high]."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int


def affine_grid(low: Tensor, high: Tensor, bits: int) -> Grid:
    """Eq. 1-2: the grid of 2^bits levels from low to high, widened so that zero is representable."""
    low, high = low.clamp(max=0).float(), high.clamp(min=0).float()
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    scale = ((high - low) / levels).clamp(min=TINY)
    zero = (-low / scale).round().clamp(0, levels) - half
    return Grid(scale, zero, -half, half - 1)


def symmetric_grid(absmax: Tensor, bits: int) -> Grid:
    """The grid of 2^bits - 1 levels from -absmax to absmax, zero point 0."""
    high = 2 ** (bits - 1) - 1
    scale = (absmax.float() / high).clamp(min=TINY)
    return Grid(scale, torch.zeros_like(scale), -high, high)


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Eq. 3: int8 codes of x."""
    return (x / grid.scale).round_().add_(grid.zero).clamp_(grid.low, grid.high).to(torch.int8)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    return grid.scale * (codes.float() - grid.zero)


def weight_grid(weight: Tensor, bits: int, symmetric: bool) -> Grid:
    """One grid for each output channel of weight (N, K); scale and zero (N, 1)."""
    if symmetric:
        return symmetric_grid(weight.abs().amax(dim=1, keepdim=True), bits)
    return affine_grid(weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True), bits)


def token_grid(x: Tensor, bits: int) -> Grid:
    """One symmetric grid for each row of x (M, K)."""
    return symmetric_grid(x.abs().amax(dim=1, keepdim=True), bits)


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes in [-8, 7] (N, K), K even -> uint8 (N, K / 2); even columns in the low nibble."""
    unsigned = (codes + 8).to(torch.uint8)
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    unsigned = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    return unsigned.to(torch.int8) - 8
