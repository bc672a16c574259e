"""Weights of a MODEL as its patcher means them, whether or not they are loaded and patched just now."""

from __future__ import annotations

import comfy.lora
from torch import Tensor

from ....qandc_core.calibration.file import FINGERPRINT, fingerprint_tensors


def base_tensors(patcher) -> dict[str, Tensor]:
    """The diffusion model's weights without any patch, under the names that a file has."""
    tensors = {}
    for name, value in patcher.model.diffusion_model.state_dict().items():
        tensors[name] = value.detach()
    for name in list(tensors):
        backup = patcher.backup.get(f"diffusion_model.{name}")
        if backup is not None:
            # A quantized weight is several tensors of a file.
            parts = {name: backup.weight} if not is_quantized(backup.weight) else backup.weight.state_dict(name)
            tensors.update({key: part.detach() for key, part in parts.items()})
    return tensors


def is_quantized(value: Tensor) -> bool:
    """Whether this is one of comfy-kitchen's tensors of codes and scales."""
    return hasattr(value, "dequantize") and hasattr(value, "_layout_cls")


def base_weight(patcher, name: str) -> Tensor:
    """One weight or bias in floating point and without patches; name is that within the diffusion model."""
    backup = patcher.backup.get(f"diffusion_model.{name}")
    owner, _, attribute = name.rpartition(".")
    value = getattr(patcher.model.diffusion_model.get_submodule(owner), attribute) if backup is None else backup.weight
    return value.dequantize() if is_quantized(value) else value.detach()


def patched(patcher, name: str, value: Tensor) -> Tensor:
    """The value with the patcher's LoRAs in it, in its own precision."""
    patches = patcher.patches.get(f"diffusion_model.{name}")
    if patches is None:
        return value
    return comfy.lora.calculate_weight(patches, value.float().clone(), name).to(value.dtype)


def patched_tensors(patcher) -> dict[str, Tensor]:
    """The diffusion model's weights with the patcher's LoRAs in them, on CPU."""
    return {name: patched(patcher, name, value).cpu() for name, value in base_tensors(patcher).items()}


def fingerprint_of(patcher) -> str:
    """What a calibration of this model is known by: its weights without patches."""
    remembered = getattr(patcher.model.diffusion_model, FINGERPRINT, None)
    return fingerprint_tensors(base_tensors(patcher)) if remembered is None else remembered
