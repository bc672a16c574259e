"""The DiT configurations of the paper (arXiv 2212.09748, table 1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .dit import DiTConfig

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # width, depth, heads

# Weights do not tell the number of heads, so a checkpoint without metadata is looked up by its width.
HEADS = {width: heads for width, _, heads in SIZES.values()}

PRESETS = {
    f"DiT-{size}/{patch}": DiTConfig(patch_size=patch, hidden_size=width, depth=depth, num_heads=heads)
    for size, (width, depth, heads) in SIZES.items()
    for patch in (2, 4, 8)
}


def preset(name: str, **overrides: Any) -> DiTConfig:
    """Configuration `name`, for example "DiT-XL/2", with fields replaced by `overrides`."""
    if name not in PRESETS:
        raise ValueError(f"unknown DiT preset {name!r}; expected one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **overrides)
