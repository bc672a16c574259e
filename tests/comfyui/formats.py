"""Which integer formats a ComfyUI with its comfy-kitchen has."""

from __future__ import annotations

import os
import subprocess
from functools import cache

import pytest

from tests import kitchens

from .checkouts import Checkout

SINCE = {"W8A8": (0, 27), "W6A8": (0, 31), "W4A8": (0, 31)}
KITCHEN = {"W6A8": (0, 2, 36)}  # comfy-kitchen, where it has to be newer than what those ComfyUI versions pin


@cache
def kitchen(python: str) -> tuple[int, ...]:
    """The version of comfy-kitchen that programs run with."""
    command = [python, "-c", "from importlib.metadata import version; print(version('comfy-kitchen'))"]
    environment = os.environ if kitchens.wanted() is None else {**os.environ, "PYTHONPATH": str(kitchens.wanted())}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    return tuple(int(part) for part in found.split(".")[:3])


def lacks(checkout: Checkout, format: str) -> str:
    """Why there is no such format, or ""."""
    if checkout.version < SINCE[format]:
        return f"ComfyUI {checkout.name} has no {format}"
    if format in KITCHEN and kitchen(checkout.python) < KITCHEN[format]:
        return f"comfy-kitchen of ComfyUI {checkout.name} has no {format}"
    return ""


def require(checkout: Checkout, format: str) -> None:
    if reason := lacks(checkout, format):
        pytest.skip(reason)


def require_any(checkout: Checkout) -> None:
    if all(lacks(checkout, format) for format in SINCE):
        pytest.skip(f"ComfyUI {checkout.name} has none of {', '.join(SINCE)}")


def formats_of(checkout: Checkout) -> list[str]:
    return [format for format in SINCE if not lacks(checkout, format)]
