"""ComfyUI's quantized formats on this installation: which it loads and what runs them."""

from __future__ import annotations

import comfy.model_management as mm
import torch
from torch import nn

from ....qandc_core.quantization.native import FORMATS
from ....qandc_core.quantization.w4a8_layout import is_stock, traced

SINCE = {"W8A8": "0.27", "W4A8": "0.31"}
KERNELS = {"W8A8": "int8_linear", "W4A8": "w4a8_int8_linear"}


def supported(format: str) -> bool:
    try:
        from comfy.quant_ops import QUANT_ALGOS
    except ImportError:
        return False
    return FORMATS[format] in QUANT_ALGOS


def check_supported(format: str) -> None:
    if supported(format):
        return
    import comfyui_version

    other = ", or choose W8A8" if format == "W4A8" and supported("W8A8") else ""
    raise ValueError(
        f"{format} needs ComfyUI {SINCE[format]} or newer, this is {comfyui_version.__version__}; update "
        f"ComfyUI{other}. "
        "The method paper works here for class-conditional DiTs."
    )


def backend(format: str, device: torch.device) -> str:
    """Which of comfy-kitchen's backends multiplies the format here, in words that say what to do about a slow one."""
    import comfy_kitchen

    if mm.is_device_cpu(device):
        return "eager on the CPU"
    able = [
        name
        for name, state in comfy_kitchen.list_backends().items()
        if state["available"] and not state["disabled"] and KERNELS[format] in state["capabilities"] and name != "eager"
    ]
    if able:
        return able[0]
    return (
        "eager, which is slower than 16 bits: ComfyUI's fast kernels need PyTorch built for CUDA 13 or newer, "
        "or --enable-triton-backend"
    )


def compilable(network: nn.Module) -> None:
    """Gives W4A8 weights of the network the layout that torch.compile can trace."""
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if is_stock(weight):
            module.weight = nn.Parameter(traced(weight), requires_grad=False)
