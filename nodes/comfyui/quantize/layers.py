"""The layers of a network that Quantize and TAP Calibrate work on."""

from __future__ import annotations

from typing import Any

from torch import nn

from ....qandc_core.caching.families import block_lists
from ....qandc_core.models.dit import DiT
from ....qandc_core.models.layers import named_linears
from ....qandc_core.quantization.formats import LAYOUTS, Format, packed_format
from ....qandc_core.quantization.model import NATIVE_SKIP, quantized_layers
from ....qandc_core.quantization.selection import block_linears, matching

INTEGERS = (*LAYOUTS, "TensorCoreConvRotW4A4Layout")  # comfy-kitchen's names; the last is not one of our formats


def quantizable(network: nn.Module, include: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """ComfyUI's linear layers of the network's blocks, and those outside whose names contain a part of `include`."""
    chosen = dict(block_linears(network, list(block_lists(network)), is_linear))
    named = all_linears(network)
    more = set(matching(list(named), include))
    return [(name, module) for name, module in named.items() if name in chosen or name in more]


def calibrated(network: nn.Module) -> list[tuple[str, Any]]:
    """The layers whose inputs TAP Calibrate observes: of our DiT also the last ones, which the method paper takes."""
    return list(named_linears(network, NATIVE_SKIP)) if isinstance(network, DiT) else quantizable(network)


def all_linears(network: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if is_linear(module)}


def check_not_paper(network: nn.Module) -> None:
    """Raises ValueError on a network with the layers of the method paper, which have no weights to go on from."""
    if quantized_layers(network):
        raise ValueError("This model is quantized already, by the method paper; wire the one of its original file.")


def check_not_quantized(network: nn.Module) -> None:
    """Raises ValueError on a network with integer weights, ours or ComfyUI's; float8 may be quantized further."""
    check_not_paper(network)
    weights = (getattr(module, "weight", None) for module in network.modules())
    if any(getattr(weight, "_layout_cls", None) in INTEGERS for weight in weights):
        raise ValueError("This model is quantized already; wire the one of its original file, in full precision.")


def narrower(layers: list[tuple[str, nn.Module]], format: Format) -> list[tuple[str, nn.Module]]:
    """The layers without those whose weights are as narrow already. Raises ValueError where those are all."""
    held = {name: packed_format(module.weight) for name, module in layers}
    found = [(name, m) for name, m in layers if (own := held[name]) is None or own.weight_bits > format.weight_bits]
    if layers and not found:
        formats = ", ".join(dict.fromkeys(own.name for own in held.values() if own is not None))
        raise ValueError(
            f"This model is quantized already: its layers are in {formats}, which {format.name} does not make smaller; "
            "choose a format of fewer bits, or wire the model of its original file of 16 bits."
        )
    return found


def packed_name(module: nn.Module) -> str | None:
    """The storage type of a layer's weight where that is no floating point of 16 bits or more."""
    weight = module.weight
    if hasattr(weight, "_layout_cls"):
        format = packed_format(weight)
        return str(getattr(module, "quant_format", weight._layout_cls)) if format is None else format.name
    return str(weight.dtype).removeprefix("torch.") if weight.dtype.itemsize == 1 else None


def check_loras(patcher) -> None:
    """Raises ValueError on LoRAs that are no part of the weights while the model runs."""
    if patcher.injections or patcher.weight_wrapper_patches:
        raise ValueError("A LoRA in bypass mode cannot become part of the weights; load it without bypass.")


def is_linear(module: nn.Module) -> bool:
    """Layers of plain torch, which some networks have a few of, cannot hold ComfyUI's quantized weights."""
    return hasattr(module, "comfy_cast_weights") and hasattr(module, "in_features")
