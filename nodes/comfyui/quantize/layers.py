"""Which layers of a network Quantize and TAP Calibrate are about."""

from __future__ import annotations

from torch import nn

from ....qandc_core.models.dit import DiT
from ....qandc_core.quantization.model import NATIVE_SKIP, named_linears, quantized_layers

INTEGERS = ("TensorWiseINT8Layout", "AsymW4A8Int8Layout", "TensorCoreConvRotW4A4Layout")  # comfy-kitchen's names


def quantizable(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """ComfyUI's linear layers within the network's lists of blocks, not what embeds and what ends the network.

    Of our DiT all but the timestep's embedding: rounding its modulations, a third of the weights, costs 1 to 3 % more
    error after GPTQ (benchmarks/results/quantization-modulation.md).
    """
    if isinstance(network, DiT):
        return list(named_linears(network, NATIVE_SKIP))
    return [(name, module) for name, module in network.named_modules() if is_linear(module) and in_blocks(name)]


def check_not_quantized(network: nn.Module) -> None:
    """Raises ValueError on a network with integer weights, ours or ComfyUI's; float8 may be rounded once more."""
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


def in_blocks(name: str) -> bool:
    """Whether a part of the name counts the entries of a list, as in double_blocks.3.img_attn.qkv."""
    first, *rest = name.split(".")
    return any(part.isdecimal() for part in rest[:-1])
