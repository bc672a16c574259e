"""Linear layers that take over the work around them: normalisation and modulation before, gate and residual after.

All are called as layer(x, before, gelu, after), x (B, T, K) -> (B, T, N): `before` is done to x, then GELU where asked
for, then the product, then `after`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.dit import modulate
from ..quantization.formats import BY_NAME, Format
from ..quantization.formats.w8a8 import W8A8
from ..quantization.grids import Grid
from ..quantization.linear import QuantizedLinear
from ..quantization.native import NativeLayer

KERNELS = ("reference", "kitchen", "triton")


@dataclass(frozen=True)
class Modulation:
    """LayerNorm of each token, then x * (1 + scale) + shift for each image (adaLN); shift and scale (B, K)."""

    shift: Tensor
    scale: Tensor
    eps: float


@dataclass(frozen=True)
class GatedResidual:
    """x + gate * y for each image; x (B, T, N), gate (B, N)."""

    x: Tensor
    gate: Tensor


def modulated(x: Tensor, by: Modulation) -> Tensor:
    return modulate(F.layer_norm(x, x.shape[-1:], eps=by.eps), by.shift, by.scale)


def gated(y: Tensor, after: GatedResidual | None) -> Tensor:
    return y if after is None else torch.addcmul(after.x, after.gate[:, None], y)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class FloatLinear(nn.Module):
    """Plain operations; torch.compile fuses them."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(
        self, x: Tensor, before: Modulation | None = None, gelu: bool = False, after: GatedResidual | None = None
    ) -> Tensor:
        if before is not None:
            x = modulated(x, before)
        return gated(F.linear(tanh_gelu(x) if gelu else x, self.weight, self.bias), after)


class StaticGrid(nn.Module):
    """A fixed grid of activations that moves with the model."""

    def __init__(self, grid: Grid):
        super().__init__()
        self.low, self.high = grid.low, grid.high
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("scale", grid.scale.float())
        self.register_buffer("zero", grid.zero.float())

    def forward(self) -> Grid:
        return Grid(self.scale, self.zero, self.low, self.high)


class Kernels(NamedTuple):
    """The functions of a module such as kernels.reference, which, unlike a module, can be copied and pickled."""

    quantize_rows: Callable
    quantize_modulated: Callable
    int8_matmul: Callable


class Int8Linear(nn.Module):
    """An int8 matmul between a quantizer and an epilogue of `kernels`, a module such as kernels.reference.

    Codes (N, K) int8; column_scale and bias (N,) float32 hold a static input grid's scale and zero point. `feeds` is
    the static grid of the layer that takes GELU of this one's output, which then comes as codes.
    """

    def __init__(
        self,
        codes: Tensor,
        column_scale: Tensor,
        bias: Tensor | None,
        kernels: ModuleType | Kernels,
        dtype: torch.dtype,
        group: int | None = None,
        inputs: Grid | None = None,
    ):
        super().__init__()
        self.kernels = Kernels(*(getattr(kernels, name) for name in Kernels._fields))
        self.dtype, self.group = dtype, group
        self.inputs = None if inputs is None else StaticGrid(inputs)
        self.feeds: StaticGrid | None = None
        self.codes: Tensor
        self.column_scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("column_scale", column_scale.float().flatten().contiguous())
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(
        self, x: Tensor, before: Modulation | None = None, gelu: bool = False, after: GatedResidual | None = None
    ) -> Tensor:
        codes, row_scale = self.quantize(x, before, gelu)
        gate, residual = (None, None) if after is None else (after.gate, after.x.flatten(0, -2))
        y = self.kernels.int8_matmul(
            codes,
            row_scale,
            self.codes,
            self.column_scale,
            self.bias,
            self.dtype,
            gelu=self.feeds is not None,
            grid=self.feeds and self.feeds(),
            gate=gate,
            residual=residual,
        )
        return y.unflatten(0, x.shape[:-1])

    def quantize(self, x: Tensor, before: Modulation | None, gelu: bool) -> tuple[Tensor, Tensor | None]:
        if x.dtype == torch.int8:  # the layer before has applied GELU and this one's grid
            return x.flatten(0, -2), None
        grid = self.inputs and self.inputs()
        if before is None:
            return self.kernels.quantize_rows(x.flatten(0, -2), self.group, gelu, grid)
        return self.kernels.quantize_modulated(x, before.shift, before.scale, before.eps, self.group, grid)


class KitchenLinear(nn.Module):
    """comfy-kitchen's kernels on a layer in one of ComfyUI's formats, rotated or not."""

    def __init__(
        self,
        format: Format,
        tensors: dict[str, Tensor],
        config: dict[str, Any],
        bias: Tensor | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.format, self.config, self.dtype, self.group = format.name, config, dtype, format.rotation(config)
        for name in format.parts:
            self.register_buffer(name, tensors[name].contiguous())
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    def forward(
        self, x: Tensor, before: Modulation | None = None, gelu: bool = False, after: GatedResidual | None = None
    ) -> Tensor:
        if before is not None:
            import comfy_kitchen

            x = comfy_kitchen.adaln(x, before.scale[:, None], before.shift[:, None], before.eps)
        return gated(self.product(x, gelu), after)

    def product(self, x: Tensor, gelu: bool) -> Tensor:
        import comfy_kitchen

        format = BY_NAME[self.format]
        act = {}
        if gelu and takes_activation(getattr(comfy_kitchen, format.kernel)):
            act = {"input_act": "gelu_tanh"}
        elif gelu:
            x = tanh_gelu(x)
        held = dict(self.named_buffers())
        return format.linear(x, held, self.config, held.get("bias"), self.dtype, **act)


@cache
def takes_activation(function: Callable) -> bool:
    """True if this version of comfy-kitchen applies GELU to the inputs of the layer itself (W4A8: since 0.2.38)."""
    return "input_act" in inspect.signature(function).parameters


def fused_linear(layer: nn.Linear | QuantizedLinear | NativeLayer, kernels: str, dtype: torch.dtype) -> nn.Module:
    """The layer on `kernels`; narrow codes stay packed in kitchen only. Raises ValueError where they cannot run it."""
    if isinstance(layer, nn.Linear):
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        return FloatLinear(layer.weight.detach().to(dtype), bias)
    if isinstance(layer, NativeLayer):
        return native_linear(layer, kernels, dtype)
    if layer.weight_zero is not None:
        raise ValueError("Weights with a zero point have no fused layer; quantize with symmetric_weights=True.")
    if layer.format.static:
        return static_linear(layer, kernels, dtype)
    if layer.format.a_bits != 8:
        raise ValueError(f"Fused layers round inputs to 8 bits, not {layer.format.a_bits}; quantize with a_bits=8.")
    codes, scale = layer.weight_codes(), layer.weight_scale
    if kernels == "kitchen":
        tensors = {"weight": codes, "weight_scale": scale[:, None]}
        return KitchenLinear(W8A8, tensors, {"format": W8A8.stored, "convrot": False}, layer.bias, dtype)
    return Int8Linear(codes, scale, layer.bias, kernel_module(kernels), dtype)


def stacked(layers: Sequence[nn.Module]) -> nn.ModuleList:
    """Layers of one input, as a single one with all their outputs where all are int8 with a scale for each token."""
    able = [layer for layer in layers if isinstance(layer, Int8Linear) and layer.inputs is None]
    if len(able) < len(layers) or len({layer.group for layer in able}) > 1 or any(layer.bias is None for layer in able):
        return nn.ModuleList(layers)
    codes, scale, bias = (
        torch.cat([getattr(layer, part) for layer in able]) for part in ("codes", "column_scale", "bias")
    )
    return nn.ModuleList([Int8Linear(codes, scale, bias, able[0].kernels, able[0].dtype, able[0].group)])


def native_linear(layer: NativeLayer, kernels: str, dtype: torch.dtype) -> nn.Module:
    format, bias = BY_NAME[layer.format], layer.tensors.get("bias")
    if kernels == "kitchen":
        return KitchenLinear(format, layer.tensors, layer.config, bias, dtype)
    codes, scale = format.int8(layer.tensors)
    return Int8Linear(codes, scale, bias, kernel_module(kernels), dtype, format.rotation(layer.config))


def static_linear(layer: QuantizedLinear, kernels: str, dtype: torch.dtype) -> Int8Linear:
    """s_x s_w (q_x - z) q_w^T + bias written as s q_x q_w^T + bias': the zero point goes into the bias."""
    if kernels == "kitchen":
        raise ValueError("comfy-kitchen has no static activations; use kernels='triton' or 'reference'.")
    scale = layer.input_scale * layer.weight_scale
    bias = -layer.input_zero * layer.row_sums * scale
    if layer.bias is not None:
        bias = bias + layer.bias.float()
    return Int8Linear(layer.weight_codes(), scale, bias, kernel_module(kernels), dtype, inputs=layer.input_grid(scale))


def kernel_module(name: str) -> ModuleType:
    if name == "reference":
        from .kernels import reference

        reference.prepare()
        return reference
    from .kernels import triton_ops

    return triton_ops
