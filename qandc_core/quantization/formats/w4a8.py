"""W4A8, ComfyUI's asym_w4a8_int8: 4-bit codes of 16 values, a float8 scale for each group and one for each row.

The weight is decoded to int8 and multiplied as W8A8 is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..gptq import gptq
from ..grids import pack_int4, unpack_int4
from .base import Format
from .traced_w4a8 import LAYOUT, STOCK_LAYOUT, traced
from .w8a8 import W8A8

GROUP = 16  # weights that share a relative scale


class Codebook(Format):
    def config(self, group: int) -> dict[str, Any]:
        return {"format": self.stored, "group_size": GROUP, "convrot_groupsize": group}

    def encode(
        self, weight: Tensor, rotated: Tensor, group: int, hessian: Tensor | None, clip_search: bool, damping: float
    ) -> dict[str, Tensor]:
        grid = stock_grid(weight, group)
        codes = codebook_codes(rotated, grid, hessian, damping)
        return {
            "weight": pack_int4(codes - 8).view(torch.int8),
            "weight_s_rel": grid.relative,
            "weight_s_channel": grid.channel,
            "weight_codebook": grid.codebook,
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        channel = tensors["weight_s_channel"]
        levels = CodebookGrid(tensors["weight_codebook"], tensors["weight_s_rel"], channel).levels()
        codes = (unpack_int4(tensors["weight"].view(torch.uint8)) + 8).long()
        values = levels.gather(2, codes.view(len(codes), -1, GROUP).transpose(0, 1)).transpose(0, 1).flatten(1)
        return values * channel[:, None]

    def traced(self, weight: Any) -> Any:
        return traced(weight) if weight._layout_cls == STOCK_LAYOUT else weight


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


W4A8 = Codebook(
    name="W4A8",
    stored="asym_w4a8_int8",
    weight_bits=4,
    since="0.31",
    kernel="w4a8_int8_linear",
    layouts=(STOCK_LAYOUT, LAYOUT),
    parts=("weight", "weight_s_rel", "weight_s_channel", "weight_codebook"),
    inputs=GROUP,
    keeps_shape=False,
    finer=W8A8,
)
