"""W8A8, ComfyUI's int8_tensorwise with ConvRot: one scale for each row of int8 weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...numerics import widest_float
from ..gptq import Hessian, gptq_codes
from ..grids import Grid, quantize, symmetric_grid
from .base import Format
from .plain_int8 import LAYOUT, STOCK_LAYOUT

# Rounding costs a row K (absmax / 127)^2 / 12: cutting its one outlier pays up to K / (12 * 127^2), 6 % at K = 12288.
CPU_BLOCK = 2**18  # values
CLIPS = tuple(1 - step / 100 for step in range(1, 11))


class Int8(Format):
    def bytes(self, outputs: int, inputs: int) -> int:
        return outputs * (inputs + 4)

    def config(self, group: int) -> dict[str, Any]:
        return {"format": self.stored, "convrot": True, "convrot_groupsize": group}

    def encode(
        self, weight: Tensor, rotated: Tensor, group: int, hessian: Hessian | None, clip_search: bool, damping: float
    ) -> dict[str, Tensor]:
        channels = int8_grid(rotated, clip_search)
        return {"weight": int8_codes(rotated, channels, hessian, damping), "weight_scale": channels.scale}

    def int8(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        codes, scale = tensors["weight"], tensors["weight_scale"]
        return codes, scale.flatten().expand(len(codes))  # one scale for all rows in files by others

    def linear(
        self, x: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any], bias: Tensor | None, dtype, **act
    ) -> Tensor:
        import comfy_kitchen

        group = self.rotation(config)
        rotation = {"convrot": group is not None, "convrot_groupsize": group or 256}
        return comfy_kitchen.int8_linear(x, tensors["weight"], tensors["weight_scale"], bias, dtype, **rotation, **act)

    def rotation(self, config: Mapping[str, Any]) -> int | None:
        return config["convrot_groupsize"] if config.get("convrot") else None


def int8_grid(rotated: Tensor, clip_search: bool) -> Grid:
    """One symmetric grid for each row of (N, K), up to absmax or, by search, to where its squared error is least."""
    if not clip_search:
        return symmetric_grid(rotated.abs().amax(dim=1, keepdim=True), 8)
    # A CPU keeps as many rows in its cache while it goes through them once for each clip.
    rows = max(1, CPU_BLOCK // rotated.shape[1]) if rotated.device.type == "cpu" else len(rotated)
    found = [searched_grid(part) for part in rotated.split(rows)]
    scale, zero = (torch.cat(parts) for parts in zip(*((grid.scale, grid.zero) for grid in found)))
    return Grid(scale, zero, found[0].low, found[0].high)


def searched_grid(rows: Tensor) -> Grid:
    absmax = rows.abs().amax(dim=1, keepdim=True)
    best = symmetric_grid(absmax, 8)
    least = row_errors(rows, best)
    for clip in CLIPS:
        grid = symmetric_grid(clip * absmax, 8)
        error = row_errors(rows, grid)
        best = Grid(torch.where(error < least, grid.scale, best.scale), best.zero, best.low, best.high)
        least = torch.minimum(error, least)
    return best


def row_errors(weight: Tensor, grid: Grid) -> Tensor:
    """Squared error of each row (N, 1) on a grid whose zero point is 0."""
    exact = weight / grid.scale
    lost = exact.round().clamp_(grid.low, grid.high).sub_(exact).mul_(grid.scale).square_()
    return lost.sum(1, keepdim=True, dtype=widest_float(weight.device))


def int8_codes(rotated: Tensor, grid: Grid, hessian: Hessian | None, damping: float) -> Tensor:
    """int8 (N, K), by gptq where the rotated inputs' Hessian is given."""
    return quantize(rotated, grid) if hessian is None else gptq_codes(rotated, hessian, grid, damping)


W8A8 = Int8(
    name="W8A8",
    stored="int8_tensorwise",
    weight_bits=8,
    since="0.27",
    kernel="int8_linear",
    layouts=(STOCK_LAYOUT, LAYOUT),
    parts=("weight", "weight_scale"),
)
