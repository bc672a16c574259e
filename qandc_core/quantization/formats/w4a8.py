"""W4A8: 4-bit codes of a codebook of 16 values, those of a normal distribution unless the weights are heavy-tailed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..grids import pack_int4, unpack_int4
from .grouped import GROUP, Grouped
from .traced_grouped import LAYOUT, STOCK_LAYOUT
from .w8a8 import W8A8


class Codebook(Grouped):
    def bytes(self, outputs: int, inputs: int) -> int:
        return super().bytes(outputs, inputs) + 4 * 16

    def values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight_codebook"]

    def pack(self, codes: Tensor) -> Tensor:
        return pack_int4(codes - 8).view(torch.int8)

    def unpack(self, packed: Tensor) -> Tensor:
        return unpack_int4(packed.view(torch.uint8)) + 8

    def stock(self, weight: Tensor, group: int) -> dict[str, Tensor]:
        from comfy_kitchen import quantize_w4a8_int8_weight

        packed, relative, channel, _, codebook = quantize_w4a8_int8_weight(weight, GROUP, group)
        return dict(zip(self.parts, (packed, relative, channel, codebook), strict=True))


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
    patched=W8A8,
    kitchen="0.2.31",
)
