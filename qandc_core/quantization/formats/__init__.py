"""The quantized formats that Quantize makes, coarsest last; every table of formats is read from `ALL`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .base import Format
from .w4a8 import W4A8
from .w8a8 import W8A8

ALL: tuple[Format, ...] = (W8A8, W4A8)
BY_NAME = {format.name: format for format in ALL}
STORED = tuple(dict.fromkeys(format.stored for format in ALL))
LAYOUTS = tuple(dict.fromkeys(layout for format in ALL for layout in format.layouts))


def fitting(format: Format | None, outputs: int, inputs: int, keeps_shape: bool = False) -> Format | None:
    """The format itself for a layer of this size, or the next finer one that takes it and that comfy-kitchen has; None:
    it stays float.
    """
    while format is not None and not (
        format.takes(outputs, inputs) and (format.keeps_shape or not keeps_shape) and format.available()
    ):
        format = format.finer
    return format


def stored_format(config: Mapping[str, Any], parts: Collection[str]) -> Format | None:
    """The format of a layer of a file, by its comfy_quant and the names of its tensors; None: none of ours."""
    weights = {part for part in parts if part.startswith("weight")}
    named = [format for format in ALL if format.stored == config["format"]]
    return next((format for format in named if weights == set(format.parts)), named[0] if named else None)


def packed_format(weight: Any) -> Format | None:
    """The format of a weight that ComfyUI holds, a QuantizedTensor of comfy-kitchen's; None: none of ours."""
    layout = getattr(weight, "_layout_cls", None)
    named = [format for format in ALL if layout in format.layouts]
    if len(named) > 1:
        bits = 8 * weight._qdata.numel() // weight.numel()  # packed for small inputs, the scales are among the codes
        named = [format for format in named if format.weight_bits == bits]
    return named[0] if named else None
