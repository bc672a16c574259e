"""Weights of a MODEL as its patcher means them, whether or not they are loaded and patched just now."""

from __future__ import annotations

import comfy.lora
from torch import Tensor

from ...qandc_core.calibration.file import FINGERPRINT, fingerprint_tensors


def base_tensors(patcher) -> dict[str, Tensor]:
    """The diffusion model's weights without any patch."""
    tensors = {}
    for name, value in patcher.model.diffusion_model.state_dict().items():
        backup = patcher.backup.get(f"diffusion_model.{name}")
        tensors[name] = (value if backup is None else backup.weight).detach()
    return tensors


def patched_tensors(patcher) -> dict[str, Tensor]:
    """The diffusion model's weights with the patcher's LoRAs in them, on CPU."""
    tensors = {}
    for name, value in base_tensors(patcher).items():
        patches = patcher.patches.get(f"diffusion_model.{name}")
        if patches is not None:
            value = comfy.lora.calculate_weight(patches, value.float().clone(), name).to(value.dtype)
        tensors[name] = value.cpu()
    return tensors


def fingerprint_of(patcher) -> str:
    """What a calibration of this model is known by: its weights without patches."""
    remembered = getattr(patcher.model.diffusion_model, FINGERPRINT, None)
    return fingerprint_tensors(base_tensors(patcher)) if remembered is None else remembered
