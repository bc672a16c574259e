"""DiT checkpoints: the published layout, diffusers folders, our own files and ComfyUI's quantized formats."""

from .dit import load_dit, save_dit

__all__ = ["load_dit", "save_dit"]
