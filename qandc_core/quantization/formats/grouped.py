"""Grouped codes, ComfyUI's asym_w4a8_int8: a float8 scale for every 16 codes of a row and a float32 one for the row.

A code c of group g in row n decodes to the int8 weight round(clamp(values[c] * relative[n, g], +-127)) of a row with
the scale channel[n], and int8 weights are multiplied as W8A8's are. Formats differ in their width: the checkpoint has
one name for all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..gptq import Hessian, gptq
from .base import Format
from .traced_grouped import STOCK_LAYOUT, traced

GROUP = 16  # weights that share a relative scale
ROTATED = 256  # inputs: the only group that comfy-kitchen's CUDA kernels of these formats rotate


@dataclass(frozen=True)
class GroupedGrid:
    """Ascending values (L,), relative (N, K / 16) e4m3, channel (N,)."""

    values: Tensor
    relative: Tensor
    channel: Tensor

    def levels(self, group: int) -> Tensor:
        """The int8 weights that the values stand for in one group, (N, L)."""
        return (self.relative[:, group, None].float() * self.values).round_().clamp_(-127, 127)


class Grouped(Format):
    @abstractmethod
    def values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Values of the codes, (2^bits,) ascending."""

    @abstractmethod
    def pack(self, codes: Tensor) -> Tensor:
        """int8 codes (N, K) from 0 on -> the bytes of a file, int8."""

    @abstractmethod
    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of pack."""

    @abstractmethod
    def stock(self, weight: Tensor, group: int) -> dict[str, Tensor]:
        """The tensors `parts` that comfy-kitchen's own quantizer makes of weight (N, K), to nearest."""

    lowest = 0  # the first code in use

    def takes(self, outputs: int, inputs: int) -> bool:
        return super().takes(outputs, inputs) and (inputs % ROTATED == 0 or not has_cuda_kernels())

    def available(self) -> bool:
        import comfy_kitchen

        return hasattr(comfy_kitchen, "quantize_w4a8_int8_weight")

    def bytes(self, outputs: int, inputs: int) -> int:
        return outputs * (inputs * self.weight_bits // 8 + inputs // GROUP + 4)

    def config(self, group: int) -> dict[str, Any]:
        return {"format": self.stored, "group_size": GROUP, "convrot_groupsize": group}

    def encode(
        self, weight: Tensor, rotated: Tensor, group: int, hessian: Hessian | None, clip_search: bool, damping: float
    ) -> dict[str, Tensor]:
        tensors = self.stock(weight, group)
        if hessian is not None:
            values = self.values(tensors)[self.lowest :]
            grid = GroupedGrid(values, tensors["weight_s_rel"], tensors["weight_s_channel"])
            tensors["weight"] = self.pack(grouped_codes(rotated, grid, hessian, damping) + self.lowest)
        return tensors

    def int8(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        relative, values = tensors["weight_s_rel"].float(), self.values(tensors)
        chosen = values[self.unpack(tensors["weight"]).int()].view(*relative.shape, GROUP)
        codes = (chosen * relative[..., None]).round_().clamp_(-127, 127)
        return codes.flatten(1).to(torch.int8), tensors["weight_s_channel"]

    def linear(
        self, x: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any], bias: Tensor | None, dtype, **act
    ) -> Tensor:
        import comfy_kitchen

        return comfy_kitchen.w4a8_int8_linear(
            x,
            tensors["weight"],
            tensors["weight_s_rel"],
            tensors["weight_s_channel"],
            tensors.get("weight_codebook"),
            None,
            bias,
            config["group_size"],
            self.rotation(config),
            dtype,
            **act,
        )

    def traced(self, weight: Any) -> Any:
        return traced(weight) if weight._layout_cls == STOCK_LAYOUT else weight


def has_cuda_kernels() -> bool:
    """True if comfy-kitchen multiplies on CUDA here: its kernels raise on layers that are rotated in smaller groups,
    where its other backends take them.
    """
    import comfy_kitchen

    state = comfy_kitchen.list_backends().get("cuda", {"available": False})
    return bool(state["available"]) and not state["disabled"]


def grouped_codes(rotated: Tensor, grid: GroupedGrid, hessian: Hessian, damping: float) -> Tensor:
    """int8 indices (N, K) into the grid's values, by gptq with the rotated inputs' Hessian (K, K)."""

    @lru_cache(maxsize=1)  # columns come one group after the other; all levels at once would outweigh the weight
    def levels(group: int) -> tuple[Tensor, Tensor]:
        found = grid.levels(group)
        return found, (found[:, :-1] + found[:, 1:]) / 2

    def round_column(index: int, column: Tensor) -> tuple[Tensor, Tensor]:
        values, between = levels(index // GROUP)
        codes = torch.searchsorted(between, (column / grid.channel)[:, None])
        return codes[:, 0], values.gather(1, codes)[:, 0] * grid.channel

    return gptq(rotated, hessian, round_column, damping)
