"""W6A8: 6-bit codes on an even grid of 63 values, a third of W4A8's weight error for 6.5 bits instead of 4.5.

A row holds the codes' low four bits as W4A8's row does, then their high two bits, four codes a byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature

import torch
from torch import Tensor

from ..grids import pack_int4, unpack_int4
from .grouped import GROUP, Grouped
from .traced_grouped import LAYOUT, STOCK_LAYOUT
from .w8a8 import W8A8

ZERO = 32  # the code of 0


class SixBits(Grouped):
    lowest = 1

    def available(self) -> bool:
        import comfy_kitchen

        return super().available() and "bits" in signature(comfy_kitchen.quantize_w4a8_int8_weight).parameters

    def values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.arange(-ZERO, ZERO, dtype=torch.float32, device=tensors["weight"].device)

    def pack(self, codes: Tensor) -> Tensor:
        low = pack_int4((codes & 15) - 8)
        high = (codes >> 4).to(torch.uint8).unflatten(1, (-1, 4))
        shifts = torch.tensor([1, 4, 16, 64], dtype=torch.uint8, device=codes.device)
        return torch.cat([low, (high * shifts).sum(2, dtype=torch.uint8)], dim=1).view(torch.int8)

    def unpack(self, packed: Tensor) -> Tensor:
        low, high = packed.view(torch.uint8).split([packed.shape[1] * 2 // 3, packed.shape[1] // 3], dim=1)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
        return (unpack_int4(low) + 8) | (((high[..., None] >> shifts) & 3) << 4).flatten(1).to(torch.int8)

    def stock(self, weight: Tensor, group: int) -> dict[str, Tensor]:
        from comfy_kitchen import quantize_w4a8_int8_weight

        packed, relative, channel, _, _ = quantize_w4a8_int8_weight(weight, GROUP, group, bits=6)
        return dict(zip(self.parts, (packed, relative, channel), strict=True))


W6A8 = SixBits(
    name="W6A8",
    stored="asym_w4a8_int8",
    weight_bits=6,
    since="0.31",
    kernel="w4a8_int8_linear",
    layouts=(STOCK_LAYOUT, LAYOUT),
    parts=("weight", "weight_s_rel", "weight_s_channel"),
    inputs=32,
    keeps_shape=False,
    patched=W8A8,
    kitchen="0.2.36",
)
