"""Model files for the tests, with random weights."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from qandc_core.checkpoints import save_dit
from qandc_core.checkpoints.dit import DEMO
from qandc_core.models import DiT, DiTConfig

from .checkouts import Checkout

__all__ = ["DEMO", "write_dit", "write_vae"]

TINY_VAE = """
import sys
path = sys.argv.pop()
sys.argv.append("--cpu")
import comfy.options
comfy.options.enable_args_parsing()
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file
save_file({key: value.contiguous() for key, value in TAESD(latent_channels=4).state_dict().items()}, path)
"""


def write_dit(path: Path, in_channels: int = 3, num_classes: int = 10) -> None:
    """A small DiT for 32x32 latents in the published layout, as safetensors or as a bare state dict in a .pt file."""
    config = DiTConfig(32, 4, in_channels, hidden_size=384, depth=1, num_heads=6, num_classes=num_classes)
    model, generator = DiT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_dit(model, path)
    else:
        torch.save(model.state_dict(), path)


def write_vae(checkout: Checkout, path: Path) -> None:
    """ComfyUI's own tiny autoencoder: a few megabytes where Stable Diffusion's takes hundreds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [checkout.python, "-c", TINY_VAE, str(path)]
    done = subprocess.run(command, cwd=checkout.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
