"""The functions of `reference` on the Triton kernels. They are custom operators: opaque to torch.compile, which would
refuse the pruned tuning of the product. The first call of each shape tunes; do it before a CUDA graph is captured.
The kernels read matrices row by row, so operands of another layout are copied first; rows of shift, scale and gate may
be any distance apart.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...quantization.grids import Grid
from .triton_matmul import int8_matmul_kernel
from .triton_quantize import halves, quantize_kernel

LEVELS = {None: 0, 4: 1, 16: 2, 64: 3, 256: 4}  # the group is 4^levels


def quantize_modulated(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, group: int | None = None, grid: Grid | None = None
) -> tuple[Tensor, Tensor | None]:
    """int8 codes (B T, K) of LayerNorm(x) (1 + scale) + shift, rotated in groups, and the scales (B T,) of the rows.

    x (B, T, K); shift and scale (B, K), rows of any stride. With a static grid there are no scales of rows.
    """
    return quantize(x.contiguous().flatten(0, 1), shift, scale, eps, group, False, grid)


def quantize_rows(
    x: Tensor, group: int | None = None, gelu: bool = False, grid: Grid | None = None
) -> tuple[Tensor, Tensor | None]:
    """int8 codes of x (M, K), after GELU (tanh) if asked and rotation in groups, and the scales (M,) of the rows."""
    return quantize(x.contiguous(), None, None, 0.0, group, gelu, grid)


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
    row_scale, bias, residual = (None if x is None else x.contiguous() for x in (row_scale, bias, residual))
    return int8_matmul_op(
        codes.contiguous(), row_scale, weight.contiguous(), column_scale.contiguous(), bias, out_dtype, gelu,
        *flat(grid), whole_rows(gate), residual,
    )  # fmt: skip


def whole_rows(x: Tensor | None) -> Tensor | None:
    """x (B, N) with the values of each row side by side."""
    return x if x is None or x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def quantize(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, group: int | None, gelu: bool, grid: Grid | None
) -> tuple[Tensor, Tensor | None]:
    codes, rows = quantize_op(x, whole_rows(shift), whole_rows(scale), eps, LEVELS[group], gelu, *flat(grid))
    return codes, rows if grid is None else None


def flat(grid: Grid | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Scale, zero, low and high, as an operator takes them; without a grid those of a symmetric one."""
    return (None, None, -127, 127) if grid is None else (grid.scale, grid.zero, grid.low, grid.high)


@torch.library.custom_op(
    "qandc::quantize",
    mutates_args=(),
    schema="(Tensor x, Tensor? shift, Tensor? scale, float eps, int levels, bool gelu, Tensor? grid_scale,"
    " Tensor? grid_zero, int low, int high) -> (Tensor, Tensor)",
)
def quantize_op(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, levels: int, gelu: bool,
    grid_scale: Tensor | None, grid_zero: Tensor | None, low: int, high: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes (M, K) of x (M, K) and, empty with a grid, the scales (M,) of the rows."""
    rows, width = x.shape
    codes, row_scale = quantize_shapes(x, shift, scale, eps, levels, gelu, grid_scale, grid_zero, low, high)
    shift_stride, scale_stride, images = 0, 0, 1
    if shift is not None and scale is not None:
        shift_stride, scale_stride, images = shift.stride(0), scale.stride(0), len(shift)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        quantize_kernel[(rows,)](
            x, shift, scale, codes, row_scale, grid_scale, grid_zero,
            rows, rows // images, shift_stride, scale_stride, eps,
            width, *halves(width, 4**levels), levels, gelu, low, high,
        )  # fmt: skip
    return codes, row_scale


@quantize_op.register_fake
def quantize_shapes(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, levels: int, gelu: bool,
    grid_scale: Tensor | None, grid_zero: Tensor | None, low: int, high: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = len(x) if grid_scale is None else 0
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op(
    "qandc::int8_matmul",
    mutates_args=(),
    schema="(Tensor codes, Tensor? row_scale, Tensor weight, Tensor column_scale, Tensor? bias, ScalarType out_dtype,"
    " bool gelu, Tensor? grid_scale, Tensor? grid_zero, int low, int high, Tensor? gate, Tensor? residual) -> Tensor",
)
def int8_matmul_op(
    codes: Tensor, row_scale: Tensor | None, weight: Tensor, column_scale: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype, gelu: bool, grid_scale: Tensor | None, grid_zero: Tensor | None, low: int, high: int,
    gate: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    (rows, inner), columns = codes.shape, len(weight)
    out = codes.new_empty(rows, columns, dtype=torch.int8 if grid_scale is not None else out_dtype)
    gate_stride, images = (0, 1) if gate is None else (gate.stride(0), len(gate))

    def programs(sizes: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, sizes["BLOCK_M"]) * triton.cdiv(columns, sizes["BLOCK_N"]),)

    with torch.cuda.device_of(codes):
        int8_matmul_kernel[programs](
            codes, row_scale, weight, column_scale, bias, grid_scale, grid_zero, gate, residual, out,
            rows, columns, inner, rows // images, gate_stride, gelu, low, high,
        )  # fmt: skip
    return out


@int8_matmul_op.register_fake
def int8_matmul_shape(
    codes: Tensor, row_scale: Tensor | None, weight: Tensor, column_scale: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype, gelu: bool, grid_scale: Tensor | None, grid_zero: Tensor | None, low: int, high: int,
    gate: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    return codes.new_empty(len(codes), len(weight), dtype=torch.int8 if grid_scale is not None else out_dtype)
