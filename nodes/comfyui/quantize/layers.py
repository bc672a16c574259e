"""Which layers of a network Quantize and TAP Calibrate are about."""

from __future__ import annotations

from typing import Any

from torch import nn

from ....qandc_core.caching.families import block_lists
from ....qandc_core.models.dit import DiT
from ....qandc_core.models.layers import named_linears
from ....qandc_core.quantization.formats import LAYOUTS
from ....qandc_core.quantization.model import NATIVE_SKIP, quantized_layers
from ....qandc_core.quantization.selection import block_linears, matching

INTEGERS = (*LAYOUTS, "TensorCoreConvRotW4A4Layout")  # comfy-kitchen's names; the last is not one of our formats


def quantizable(network: nn.Module, include: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """ComfyUI's linear layers of the network's blocks, and those outside whose names contain a part of `include`."""
    chosen = dict(block_linears(network, list(block_lists(network)), is_linear))
    named = all_linears(network)
    more = set(matching(list(named), include))
    return [(name, module) for name, module in named.items() if name in chosen or name in more]


def calibrated(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers whose inputs TAP Calibrate observes: of our DiT also the last ones, which the method paper takes."""
    return list(named_linears(network, NATIVE_SKIP)) if isinstance(network, DiT) else quantizable(network)


def all_linears(network: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if is_linear(module)}


def check_not_quantized(network: nn.Module) -> None:
    """Raises ValueError on a network with integer weights, ours or ComfyUI's; float8 may be quantized further."""
    weights = (getattr(module, "weight", None) for module in network.modules())
    if quantized_layers(network) or any(getattr(weight, "_layout_cls", None) in INTEGERS for weight in weights):
        raise ValueError("This model is quantized already; wire the one of its original file, in full precision.")


def check_loras(patcher) -> None:
    """Raises ValueError on LoRAs that are no part of the weights while the model runs."""
    if patcher.injections or patcher.weight_wrapper_patches:
        raise ValueError("A LoRA in bypass mode cannot become part of the weights; load it without bypass.")


def is_linear(module: nn.Module) -> bool:
    """Layers of plain torch, which some networks have a few of, cannot hold ComfyUI's quantized weights."""
    return hasattr(module, "comfy_cast_weights") and hasattr(module, "in_features")
