"""comfy-kitchen's int8 layout under a second name, for weights that only their own layer may multiply.

ComfyUI recognizes int8 weights by the name of their layout and may then run their kernel itself, without the layer that
holds them. A weight under this name has the same codes, file and kernels.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

LAYOUT, STOCK_LAYOUT = "QandCInt8Layout", "TensorWiseINT8Layout"


def from_stock(weight: Any) -> Any:
    """The same weight under the second name; any other layout's as it is."""
    if getattr(weight, "_layout_cls", None) != STOCK_LAYOUT:
        return weight
    register()
    return renamed(weight, LAYOUT)


def to_stock(weight: Any) -> Any:
    """The same weight under comfy-kitchen's name; any other layout's as it is."""
    return renamed(weight, STOCK_LAYOUT) if getattr(weight, "_layout_cls", None) == LAYOUT else weight


def renamed(weight: Any, layout: str) -> Any:
    from comfy_kitchen.tensor import QuantizedTensor

    return QuantizedTensor(weight._qdata, layout, weight._params)


@cache
def register() -> None:
    """Adds the layout, and comfy-kitchen's own operations for it, to comfy-kitchen's tables."""
    from comfy_kitchen import tensor as kitchen

    aten = torch.ops.aten

    class PlainInt8(kitchen.TensorWiseINT8Layout):
        pass

    for operator in (aten.linear.default, aten.mm.default, aten.addmm.default):

        @kitchen.register_layout_op(operator, PlainInt8)
        def _(_, args, kwargs, operator=operator):
            return operator(*map(to_stock, args), **kwargs)

    @kitchen.register_layout_op(aten.t.default, PlainInt8)
    def _(_, args, kwargs):
        return renamed(aten.t.default(to_stock(args[0])), LAYOUT)

    kitchen.register_layout_class(LAYOUT, PlainInt8)
