"""Class-conditional diffusion transformers."""

from .dit import DiT, DiTConfig
from .presets import PRESETS, preset

__all__ = ["PRESETS", "DiT", "DiTConfig", "preset"]
