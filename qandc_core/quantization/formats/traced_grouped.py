"""Grouped weights that torch.compile can trace: a layout of our own beside comfy-kitchen's, for our own models.

comfy-kitchen's AsymW4A8Int8Layout picks a backend in Python, which torch.compile cannot follow with fake tensors.
TracedGrouped stores the same tensors and runs the same kernels, each behind one operator of torch with a shape rule.
It is added to comfy-kitchen's table of layouts under a name of its own, and nothing that is there is replaced: a weight
belongs to it only after `traced`.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUT, STOCK_LAYOUT = "QandCTracedGroupedLayout", "AsymW4A8Int8Layout"


def traced(weight: Any) -> Any:
    """The same grouped weight, a QuantizedTensor of comfy-kitchen's, in the layout that torch.compile can trace."""
    from comfy_kitchen.tensor import QuantizedTensor

    register()
    return QuantizedTensor(weight._qdata, LAYOUT, weight._params)


@cache
def operators() -> tuple[Any, Any]:
    """qandc::w4a8_linear, x (..., K) -> (..., N), and qandc::w4a8_weight, the decoded weight (N, K)."""
    from comfy_kitchen.tensor.w4a8_int8 import dequantize_w4a8_int8_weight

    linear = torch.library.custom_op("qandc::w4a8_linear", multiplied, mutates_args=())

    @linear.register_fake
    def _(x, codes, relative, channel, codebook, bias, group, rotation, packed, dtype):
        return x.new_empty(*x.shape[:-1], len(channel), dtype=dtype)

    @torch.library.custom_op("qandc::w4a8_weight", mutates_args=())
    def weight(
        codes: Tensor,
        relative: Tensor,
        channel: Tensor,
        codebook: Tensor | None,
        group: int,
        rotation: int,
        dtype: torch.dtype,
    ) -> Tensor:
        return dequantize_w4a8_int8_weight(codes, relative, channel, codebook, None, group, rotation, dtype)

    @weight.register_fake
    def _(codes, relative, channel, codebook, group, rotation, dtype):
        return codes.new_empty(len(channel), relative.shape[1] * group, dtype=dtype)

    return linear, weight


def multiplied(
    x: Tensor,
    codes: Tensor,
    relative: Tensor,
    channel: Tensor,
    codebook: Tensor | None,
    bias: Tensor | None,
    group: int,
    rotation: int,
    packed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """comfy-kitchen's product."""
    from comfy_kitchen.tensor.w4a8_int8 import w4a8_int8_linear

    later = {"mma_packed": True} if packed else {}  # since comfy-kitchen 0.2.38
    return w4a8_int8_linear(x, codes, relative, channel, codebook, None, bias, group, rotation, dtype, **later)


def runs(weight: Any, transposed: bool) -> bool:
    """True if the operators take this weight."""
    from comfy_kitchen.tensor import QuantizedTensor

    return (
        isinstance(weight, QuantizedTensor)
        and weight._layout_cls == LAYOUT
        and weight._params.correction is None
        and weight._params.transposed == transposed
    )


def grid_of(params: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    return params.scale, params.s_channel, params.codebook


@cache
def register() -> None:
    """Adds the layout and what it does for F.linear, mm, addmm and t to comfy-kitchen's tables."""
    from comfy_kitchen import tensor as kitchen

    linear, decoded = operators()
    aten = torch.ops.aten

    class TracedGrouped(kitchen.AsymW4A8Int8Layout):
        @classmethod
        def dequantize(cls, qdata, params):
            if params.correction is not None or getattr(params, "mma_packed", False):
                return super().dequantize(qdata, params)
            return decoded(qdata, *grid_of(params), params.group_size, params.convrot_groupsize, params.orig_dtype)

        @classmethod
        def linear_input_act(cls, weight, x, bias=None, input_act=None, *args, **kwargs):
            # The caller then does the activation itself.
            return NotImplemented

    def product(x: Tensor, weight: Any, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        params, x = weight._params, kitchen.dequantize_args(x)
        layout = params.group_size, params.convrot_groupsize, getattr(params, "mma_packed", False)
        # An operator of ours costs time at every call, and only torch.compile, whose tensors are fake, needs it.
        run = multiplied if type(weight._qdata) is Tensor else linear
        return run(x, weight._qdata, *grid_of(params), bias, *layout, dtype or params.orig_dtype)

    @kitchen.register_layout_op(aten.linear.default, TracedGrouped)
    def _(_, args, kwargs):
        x, weight, bias = (*args, None)[:3]
        if not runs(weight, transposed=False):
            return F.linear(*kitchen.dequantize_args((x, weight, bias)))
        return product(x, weight, bias, kwargs.get("out_dtype"))

    @kitchen.register_layout_op(aten.t.default, TracedGrouped)
    def _(weight, args, kwargs):
        old = weight._params
        new = dataclasses.replace(old, orig_shape=tuple(reversed(old.orig_shape)), transposed=not old.transposed)
        return kitchen.QuantizedTensor(weight._qdata, LAYOUT, new)

    @kitchen.register_layout_op(aten.mm.default, TracedGrouped)
    def _(_, args, kwargs):
        x, weight = args
        return product(x, weight, None) if runs(weight, transposed=True) else torch.mm(*kitchen.dequantize_args(args))

    @kitchen.register_layout_op(aten.addmm.default, TracedGrouped)
    def _(_, args, kwargs):
        bias, x, weight = args
        plain = kwargs.get("beta", 1) == kwargs.get("alpha", 1) == 1 and bias.dim() == 1
        if plain and runs(weight, transposed=True):
            return product(x, weight, bias)
        return torch.addmm(*kitchen.dequantize_args(args), **kitchen.dequantize_args(kwargs))

    kitchen.register_layout_class(LAYOUT, TracedGrouped)
