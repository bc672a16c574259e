"""The grids of ComfyUI's quantized formats and the choice of codes on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import widest_float
from .gptq import gptq, gptq_codes
from .grids import Grid, quantize, symmetric_grid
from .grids import dequantize as grid_values

GROUP = 16  # W4A8: weights that share a relative scale
# Rounding costs a row K (absmax / 127)^2 / 12: cutting its one outlier pays up to K / (12 * 127^2), 6 % at K = 12288.
CLIPS = tuple(1 - step / 100 for step in range(1, 11))


@dataclass(frozen=True)
class CodebookGrid:
    """The values round(clamp(codebook[c] * relative, +-127)) * channel of W4A8: codebook (16,), relative (N, K / 16)
    e4m3, channel (N,).
    """

    codebook: Tensor
    relative: Tensor
    channel: Tensor

    def levels(self) -> Tensor:
        """The int8 weights that codes stand for, (K / 16, N, 16)."""
        scales = self.relative.float().T.contiguous()
        return (scales[..., None] * self.codebook).round_().clamp_(-127, 127)


def nearest_level(levels: Tensor, x: Tensor) -> Tensor:
    """Index into ascending levels (..., 16) that is nearest to x (..., M); the lower one of two, as comfy-kitchen's."""
    above = torch.searchsorted(levels, x)
    below = (above - 1).clamp_(min=0)
    above.clamp_(max=levels.shape[-1] - 1)
    closer = (x - levels.gather(-1, above)).abs() < (x - levels.gather(-1, below)).abs()
    return torch.where(closer, above, below)


def stock_grid(weight: Tensor, group: int) -> CodebookGrid:
    """The grid that comfy-kitchen's own quantizer gives weight (N, K). Raises ValueError where it has none."""
    try:
        from comfy_kitchen import quantize_w4a8_int8_weight
    except ImportError as error:
        raise ValueError(
            "This version of comfy-kitchen has no W4A8; update it (ComfyUI 0.31 or newer brings one), or choose W8A8."
        ) from error
    _, relative, channel, _, codebook = quantize_w4a8_int8_weight(weight, GROUP, group)
    return CodebookGrid(codebook, relative, channel)


def int8_grid(rotated: Tensor, clip_search: bool) -> Grid:
    """One symmetric grid for each row of (N, K), up to absmax or, by search, to where its squared error is least."""
    absmax = rotated.abs().amax(dim=1, keepdim=True)
    best = symmetric_grid(absmax, 8)
    if not clip_search:
        return best
    least = row_errors(rotated, best)
    for clip in CLIPS:
        grid = symmetric_grid(clip * absmax, 8)
        error = row_errors(rotated, grid)
        best = Grid(torch.where(error < least, grid.scale, best.scale), best.zero, best.low, best.high)
        least = torch.minimum(error, least)
    return best


def row_errors(weight: Tensor, grid: Grid) -> Tensor:
    squares = (grid_values(quantize(weight, grid), grid) - weight).square_()
    return squares.sum(1, keepdim=True, dtype=widest_float(weight.device))


# The codes.


def int8_codes(rotated: Tensor, grid: Grid, hessian: Tensor | None, damping: float) -> Tensor:
    """int8 (N, K), by gptq where the rotated inputs' Hessian is given."""
    return quantize(rotated, grid) if hessian is None else gptq_codes(rotated, hessian, grid, damping)


def codebook_codes(rotated: Tensor, grid: CodebookGrid, hessian: Tensor | None, damping: float) -> Tensor:
    """int8 (N, K) from 0 to 15, by gptq where the rotated inputs' Hessian is given."""
    levels = grid.levels()
    if hessian is None:
        target = (rotated / grid.channel[:, None]).view(len(rotated), -1, GROUP).transpose(0, 1).contiguous()
        return nearest_level(levels, target).transpose(0, 1).flatten(1).to(torch.int8)

    between = (levels[..., :-1] + levels[..., 1:]) / 2

    def round_column(index: int, column: Tensor) -> tuple[Tensor, Tensor]:
        group = index // GROUP
        codes = torch.searchsorted(between[group], (column / grid.channel)[:, None])
        return codes[:, 0], levels[group].gather(1, codes)[:, 0] * grid.channel

    return gptq(rotated, hessian, round_column, damping)
