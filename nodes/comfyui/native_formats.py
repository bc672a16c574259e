"""ComfyUI's quantized formats on this installation: which it loads, what runs them, and W4A8 under torch.compile."""

from __future__ import annotations

from functools import cache

import comfy.model_management as mm
import torch
from torch import Tensor

from ...qandc_core.quantization.native import FORMATS, W4A8

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


@cache
def compile_w4a8() -> None:
    """Gives comfy-kitchen's W4A8 product an operator of torch, without which torch.compile cannot trace it."""
    from comfy_kitchen.tensor import w4a8_int8
    from comfy_kitchen.tensor.base import _LAYOUT_DISPATCH_TABLE, QuantizedTensor, register_layout_op

    linear, layout = torch.ops.aten.linear.default, w4a8_int8.AsymW4A8Int8Layout
    stock = _LAYOUT_DISPATCH_TABLE[linear][layout]

    @torch.library.custom_op("qandc::w4a8_int8_linear", mutates_args=())
    def product(
        x: Tensor, qdata: Tensor, s_rel: Tensor, s_channel: Tensor, codebook: Tensor | None, bias: Tensor | None,
        group_size: int, convrot_groupsize: int, out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        return w4a8_int8.w4a8_int8_linear(
            x, qdata, s_rel, s_channel, codebook=codebook, bias=bias, group_size=group_size,
            convrot_groupsize=convrot_groupsize, out_dtype=out_dtype,
        )  # fmt: skip

    @product.register_fake
    def _(x, qdata, s_rel, s_channel, codebook, bias, group_size, convrot_groupsize, out_dtype):
        return x.new_empty(*x.shape[:-1], len(qdata), dtype=out_dtype)

    @register_layout_op(linear, layout)
    def linear_of(qt, args, kwargs):
        x, weight, bias = (*args, None)[:3]
        held = weight._params if isinstance(weight, QuantizedTensor) else None
        if held is None or held.transposed or held.correction is not None or isinstance(x, QuantizedTensor):
            return stock(qt, args, kwargs)
        return product(
            x, weight._qdata, held.scale, held.s_channel, held.codebook, bias, held.group_size,
            held.convrot_groupsize, kwargs.get("out_dtype", held.orig_dtype),
        )  # fmt: skip


def prepare(formats: set[str]) -> None:
    """What a model with these formats of the checkpoint needs before it runs."""
    if W4A8 in formats:
        compile_w4a8()
