"""The quantized formats that Quantize makes: every table of formats is read from `ALL`, the finest first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .base import Format
from .w4a8 import W4A8
from .w6a8 import W6A8
from .w8a8 import W8A8

ALL: tuple[Format, ...] = (W8A8, W6A8, W4A8)
BY_NAME = {format.name: format for format in ALL}
STORED = tuple(dict.fromkeys(format.stored for format in ALL))
LAYOUTS = tuple(dict.fromkeys(layout for format in ALL for layout in format.layouts))


def finer(format: Format) -> tuple[Format, ...]:
    """The finer formats that the installed comfy-kitchen has, the next one first."""
    return tuple(other for other in reversed(ALL[: ALL.index(format)]) if other.available())


def check_available(format: Format) -> None:
    """Raises ValueError where the installed comfy-kitchen lacks the format."""
    if not format.available():
        other = "".join(f", or choose {other.name}" for other in finer(format)[:1])
        raise ValueError(
            f"{format.name} needs comfy-kitchen {format.kitchen} or newer, this is {kitchen_version()}; update ComfyUI "
            f"with its requirements{other}."
        )


def kitchen_version() -> str:
    try:
        return version("comfy-kitchen")
    except PackageNotFoundError:
        return "an unknown version"


def fitting(format: Format, outputs: int, inputs: int, keeps_shape: bool = False) -> tuple[Format, ...]:
    """The formats for a layer of this size, from this one on to the finest; empty: it stays float."""
    return tuple(
        able
        for able in (format, *finer(format))
        if able.takes(outputs, inputs) and (able.keeps_shape or not keeps_shape)
    )


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
