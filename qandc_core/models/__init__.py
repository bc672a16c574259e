"""Class-conditional diffusion transformers and their checkpoints."""

from .checkpoints import load_dit, save_dit
from .dit import DiT, DiTConfig
from .presets import PRESETS, preset

__all__ = ["PRESETS", "DiT", "DiTConfig", "load_dit", "preset", "save_dit"]
