"""The operations of an integer DiT block in plain torch, for any device and for torch.compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...quantization.grids import Grid, quantize, token_grid
from ...quantization.matmul import int_mm, int_mm_is_fast, simulated_matmul
from ...quantization.rotation import rotate_fast

CPU = {"int_mm": False}  # what `prepare` found


def quantize_modulated(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, group: int | None = None, grid: Grid | None = None
) -> tuple[Tensor, Tensor | None]:
    """int8 codes (B T, K) of LayerNorm(x) (1 + scale) + shift, rotated in groups, and the scales (B T,) of the rows.

    x (B, T, K); shift and scale (B, K). With a static grid there are no scales of rows.
    """
    y = F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale[:, None].float()) + shift[:, None].float()
    return quantize_rows(y.flatten(0, 1), group, grid=grid)


def quantize_rows(
    x: Tensor, group: int | None = None, gelu: bool = False, grid: Grid | None = None
) -> tuple[Tensor, Tensor | None]:
    """int8 codes of x (M, K), after GELU (tanh) if asked and rotation in groups, and the scales (M,) of the rows."""
    y = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    if group is not None:
        y = rotated(y, group)
    if grid is not None:
        return quantize(y, grid), None
    rows = token_grid(y, 8)
    return quantize(y, rows), rows.scale.flatten()


def int8_matmul(
    codes: Tensor,
    row_scale: Tensor | None,
    weight: Tensor,
    column_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    gelu: bool = False,
    grid: Grid | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y (M, N) = codes (M, K) weight (N, K)^T row_scale column_scale + bias, then GELU (tanh) if asked; then its int8
    codes on a static grid, or residual (M, N) + gate (B, N) y where row m has the gate m // (M / B), or y alone.

    The arithmetic after the exact integer product is in float32, stored as out_dtype unless there is a grid.
    """
    y = integer_product(codes, weight).float()
    if row_scale is not None:
        y = y * row_scale[:, None]
    y = y * column_scale
    if bias is not None:
        y = y + bias.float()
    if gelu:
        y = F.gelu(y, approximate="tanh")
    if grid is not None:
        return quantize(y, grid)
    if residual is not None and gate is not None:
        images = (len(gate), -1, y.shape[1])
        y = (residual.float().reshape(images) + gate[:, None].float() * y.view(images)).flatten(0, 1)
    return y.to(out_dtype)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) int8 times b (N, K) int8 transposed, exact in int32."""
    fast = a.is_cuda or (a.device.type == "cpu" and CPU["int_mm"])
    return int_mm(a, b) if fast else simulated_matmul(a, b)


def prepare() -> None:
    """Tries the CPU's integer product, which torch.compile cannot trace; before the first product."""
    CPU["int_mm"] = int_mm_is_fast()


def rotated(x: Tensor, group: int) -> Tensor:
    """x R (M, K) as rotation.rotate gives it."""
    return rotate_in_stages(x, group) if torch.compiler.is_compiling() else rotate_fast(x, group)


def rotate_in_stages(x: Tensor, group: int) -> Tensor:
    """R is the Kronecker power of one matrix of four: additions alone, that the compiler makes one pass of."""
    levels = (group.bit_length() - 1) // 2
    y = x.unflatten(1, (-1, *[4] * levels))
    for axis in range(2, 2 + levels):
        a, b, c, d = y.unbind(axis)
        half = (a + b + c + d) / 2
        y = torch.stack([half - d, half - c, half - b, half - a], axis)
    return y.flatten(1)
