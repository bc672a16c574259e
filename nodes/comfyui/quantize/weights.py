"""Weights of a MODEL as its patcher means them, whether or not they are loaded and patched just now."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import comfy.lora
import torch
from torch import Tensor, nn

from ....qandc_core.calibration.file import FINGERPRINT, fingerprint_tensors
from ....qandc_core.quantization.formats import packed_format
from .finer import file_mark

DIFFUSION = "diffusion_model"  # a MODEL's network; those of a CLIP have other paths


class SourceWeights:
    """A patcher's weights: with `bake` its LoRAs and merges are part of them, else they are left out.

    LoRAs are added to decoded weights in float32, before anything is rounded again: float8 steps over a weak one.
    `stored` is the dtype for what can no longer stay in float8, `root` the network's path within the patcher's model.
    """

    def __init__(self, patcher, bake: bool, stored: torch.dtype | None = None, root: str = DIFFUSION):
        self.patcher, self.bake, self.stored, self.root = patcher, bake, stored, root
        self.tensors = base_tensors(patcher, root)

    def bytes(self, names: Collection[str]) -> dict[str, int]:
        """Size of each of these layers in the source."""
        found = dict.fromkeys(names, 0)
        for key, value in self.tensors.items():
            owner = key.rpartition(".")[0]
            if owner in found:
                found[owner] += value.nbytes
        return found

    def layer(self, name: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Weight (N, K) in floating point and bias (N,) or None of a linear layer."""
        module = network_of(self.patcher, self.root).get_submodule(name)
        weight = self.value(f"{name}.weight").to(device)
        smoothing = getattr(module, "pre_quant_scale", None)
        if smoothing is not None:  # the layer multiplies its inputs by it; the quantized one will not
            weight = weight.float() * smoothing.to(device, torch.float32)
        if module.bias is None:
            return weight, None
        bias = self.value(f"{name}.bias")
        return weight, bias.to(device, self.kept_dtype(self.plain(f"{name}.bias").dtype))

    def value(self, name: str) -> Tensor:
        """One weight or bias; float32 where a LoRA is in it."""
        value = self.plain(name)
        return patched(self.patcher, name, value, self.root) if self.bake else value

    def plain(self, name: str) -> Tensor:
        return base_weight(self.patcher, name, self.root)

    def without(self, layers: Collection[str]) -> dict[str, Tensor]:
        """Every tensor of a file but those of `layers`, on the CPU.

        A layer in scaled float8 (or another packed format) with a LoRA in it is stored in floating point: rounding it
        to float8 again would lose a weak LoRA.
        """
        changed = self.changed(layers)
        owners = {name.rpartition(".")[0] for name in changed if is_packed(self.held(name))}
        tensors = {
            name: value.cpu()
            for name, value in self.tensors.items()
            if (owner := name.rpartition(".")[0]) not in layers and not (owner in owners and name != f"{owner}.bias")
        }
        for name in changed:
            owner = name.rpartition(".")[0]
            value = self.layer(owner, torch.device("cpu"))[0] if owner in owners and name.endswith(".weight") else None
            value = self.value(name) if value is None else value
            tensors[name] = value.to("cpu", self.kept_dtype(self.plain(name).dtype))
        return tensors

    def changed(self, layers: Collection[str]) -> list[str]:
        """Weights and biases outside `layers` that a LoRA is in."""
        if not self.bake:
            return []
        prefix = f"{self.root}."
        names = [key.removeprefix(prefix) for key in self.patcher.patches if key.startswith(prefix)]
        return [name for name in names if name in self.tensors and name.rpartition(".")[0] not in layers]

    def held(self, name: str) -> Tensor:
        return held_weight(self.patcher, name, self.root)

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.stored if dtype.itemsize == 1 and self.stored is not None else dtype


def network_of(patcher, root: str = DIFFUSION) -> nn.Module:
    return patcher.model.get_submodule(root)


def base_tensors(patcher, root: str = DIFFUSION) -> dict[str, Tensor]:
    """The network's weights without any patch, under the names that a file has."""
    network, tensors = network_of(patcher, root), {}
    for name, value in network.state_dict().items():
        tensors[name] = value.detach()
    for name in list(tensors):
        backup = patcher.backup.get(f"{root}.{name}")
        if backup is not None:
            # A quantized weight is several tensors of a file, and the patched one may be in another format or in none.
            now: Any = network.get_parameter(name)
            format = packed_format(backup.weight)
            if format is not None and not is_packed(now):
                owner = name.rpartition(".")[0]
                module = network.get_submodule(owner)
                tensors[f"{owner}.comfy_quant"] = file_mark(module, backup.weight, format)
            for key in now.state_dict(name) if is_packed(now) else ():
                del tensors[key]
            parts = {name: backup.weight} if not is_packed(backup.weight) else backup.weight.state_dict(name)
            tensors.update({key: part.detach() for key, part in parts.items()})
    return tensors


def is_packed(value: object) -> bool:
    """True for comfy-kitchen's tensors of codes and scales."""
    return hasattr(value, "dequantize") and hasattr(value, "_layout_cls")


def held_weight(patcher, name: str, root: str = DIFFUSION) -> Tensor:
    """One parameter without patches, packed where it is packed; name is that within the network."""
    backup = patcher.backup.get(f"{root}.{name}")
    if backup is not None:
        return backup.weight
    owner, _, attribute = name.rpartition(".")
    return getattr(network_of(patcher, root).get_submodule(owner), attribute)


def base_weight(patcher, name: str, root: str = DIFFUSION) -> Tensor:
    """One weight or bias in floating point and without patches."""
    value = held_weight(patcher, name, root)
    return value.dequantize() if is_packed(value) else value.detach()


def patched(patcher, name: str, value: Tensor, root: str = DIFFUSION) -> Tensor:
    """The value with the patcher's LoRAs in it, in float32; the value itself where there are none."""
    patches = patcher.patches.get(f"{root}.{name}")
    if patches is None:
        return value
    return comfy.lora.calculate_weight(patches, value.float().clone(), name)


def patched_tensors(patcher) -> dict[str, Tensor]:
    """The diffusion model's weights with the patcher's LoRAs in them, in float32 where there are any, on the CPU."""
    return {name: patched(patcher, name, value).cpu() for name, value in base_tensors(patcher).items()}


def fingerprint_of(patcher) -> str:
    """Fingerprint of this model's weights without patches, by which its calibrations are recognized."""
    remembered = getattr(patcher.model.diffusion_model, FINGERPRINT, None)
    return fingerprint_tensors(base_tensors(patcher)) if remembered is None else remembered
