"""ComfyUI's quantized formats on this installation: which it loads and what runs them."""

from __future__ import annotations

import comfy.model_management as mm
import torch
from torch import nn

from ....qandc_core.quantization.formats import BY_NAME, check_available, finer, packed_format


def loads(format: str) -> bool:
    """True if this ComfyUI knows the format's name in files."""
    try:
        from comfy.quant_ops import QUANT_ALGOS
    except ImportError:
        return False
    return BY_NAME[format].stored in QUANT_ALGOS


def supported(format: str) -> bool:
    return loads(format) and BY_NAME[format].available()


def check_supported(format: str) -> None:
    if loads(format):
        check_available(BY_NAME[format])
        return
    import comfyui_version

    able = [known.name for known in finer(BY_NAME[format]) if loads(known.name)]
    other = f", or choose {able[0]}" if able else ""
    raise ValueError(
        f"{format} needs ComfyUI {BY_NAME[format].since} or newer, this is {comfyui_version.__version__}; update "
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
        if state["available"]
        and not state["disabled"]
        and BY_NAME[format].kernel in state["capabilities"]
        and name != "eager"
    ]
    if able:
        return able[0]
    return (
        "eager, which is slower than 16 bits: ComfyUI's fast kernels need PyTorch built for CUDA 13 or newer, "
        "or --enable-triton-backend"
    )


def compilable(network: nn.Module) -> None:
    """Gives the network's quantized weights layouts that torch.compile can trace."""
    for module in network.modules():
        weight = getattr(module, "weight", None)
        format = packed_format(weight)
        if format is not None and (traced := format.traced(weight)) is not weight:
            module.weight = nn.Parameter(traced, requires_grad=False)
