"""Numbers that come out of files or arguments: finite and within bounds, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor


def whole_number(values: Mapping[str, Any], name: str, low: int, high: int, text: bool = False) -> int:
    """values[name] if it is an integer between low and high; with `text` also one in digits, as in safetensors'
    metadata. Raises ValueError on all else.
    """
    value: Any = values.get(name)
    with suppress(TypeError, ValueError):
        number = int(value) if is_number(value, int, text) else None
        if number is not None and low <= number <= high:
            return number
    raise ValueError(f"{name} is {str(value)[:50]!r}, expected a whole number between {low} and {high}.")


def real_number(values: Mapping[str, Any], name: str, low: float, high: float, text: bool = False) -> float:
    """values[name] if it is a number between low and high, which NaN is not; with `text` also one written in a string.
    Raises ValueError on all else.
    """
    value: Any = values.get(name)
    with suppress(TypeError, ValueError, OverflowError):
        number = float(value) if is_number(value, (int, float), text) else math.nan
        if low <= number <= high:
            return number
    raise ValueError(f"{name} is {str(value)[:50]!r}, expected a number between {low:g} and {high:g}.")


def is_number(value: Any, kind: Any, text: bool) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) or text and isinstance(value, str)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError on NaN and infinity in floating-point tensors."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"{name} holds values that are not finite; the file is damaged.")
