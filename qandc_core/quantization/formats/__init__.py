"""The quantized formats that Quantize makes, coarsest last; every table of formats is read from `ALL`."""

from __future__ import annotations

from .base import Format
from .w4a8 import W4A8
from .w8a8 import W8A8

ALL: tuple[Format, ...] = (W8A8, W4A8)
BY_NAME = {format.name: format for format in ALL}
BY_STORED = {format.stored: format for format in ALL}
BY_LAYOUT = {layout: format for format in ALL for layout in format.layouts}


def fitting(format: Format | None, outputs: int, inputs: int, keeps_shape: bool = False) -> Format | None:
    """The format itself for a layer of this size, or the next finer one that takes it; None: it stays float."""
    while format is not None and not (format.takes(outputs, inputs) and (format.keeps_shape or not keeps_shape)):
        format = format.finer
    return format
