"""ComfyUI's quantized formats on this installation: which it loads, what runs them, and W4A8 under torch.compile."""

from __future__ import annotations

from functools import cache

import comfy.model_management as mm
import torch
from torch import Tensor

from ....qandc_core.quantization.native import FORMATS, W4A8

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
    """Makes comfy-kitchen's W4A8 product and decoder operators of torch, without which torch.compile cannot trace them.

    In W4A8 with a correction, which no file of ComfyUI's has, they stay as they are.
    """
    from comfy_kitchen.tensor import w4a8_int8

    linear, dequantize = w4a8_int8.w4a8_int8_linear, w4a8_int8.dequantize_w4a8_int8_weight

    @torch.library.custom_op("qandc::w4a8_int8_linear", mutates_args=())
    def traced_linear(
        x: Tensor, qdata: Tensor, s_rel: Tensor, s_channel: Tensor, codebook: Tensor | None, bias: Tensor | None,
        group_size: int, convrot_groupsize: int, out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        return linear(
            x, qdata, s_rel, s_channel, codebook, None, bias, group_size, convrot_groupsize, out_dtype
        )  # fmt: skip

    @traced_linear.register_fake
    def _(x, qdata, s_rel, s_channel, codebook, bias, group_size, convrot_groupsize, out_dtype):
        return x.new_empty(*x.shape[:-1], len(qdata), dtype=out_dtype)

    @torch.library.custom_op("qandc::dequantize_w4a8_int8_weight", mutates_args=())
    def traced_dequantize(
        qdata: Tensor, s_rel: Tensor, s_channel: Tensor, codebook: Tensor | None, group_size: int,
        convrot_groupsize: int, output_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        return dequantize(qdata, s_rel, s_channel, codebook, None, group_size, convrot_groupsize, output_dtype)

    @traced_dequantize.register_fake
    def _(qdata, s_rel, s_channel, codebook, group_size, convrot_groupsize, output_dtype):
        return qdata.new_empty(len(qdata), 2 * qdata.shape[1], dtype=output_dtype)

    def linear_of(
        x, qdata, s_rel, s_channel, codebook=None, correction=None, bias=None, group_size=16, convrot_groupsize=256,
        out_dtype=torch.bfloat16,
    ):  # fmt: skip
        layout = group_size, convrot_groupsize, out_dtype
        if correction is not None:
            return linear(x, qdata, s_rel, s_channel, codebook, correction, bias, *layout)
        return traced_linear(x, qdata, s_rel, s_channel, codebook, bias, *layout)

    def dequantize_of(
        qdata, s_rel, s_channel, codebook=None, correction=None, group_size=16, convrot_groupsize=256,
        output_dtype=torch.bfloat16,
    ):  # fmt: skip
        layout = group_size, convrot_groupsize, output_dtype
        if correction is not None:
            return dequantize(qdata, s_rel, s_channel, codebook, correction, *layout)
        return traced_dequantize(qdata, s_rel, s_channel, codebook, *layout)

    w4a8_int8.w4a8_int8_linear, w4a8_int8.dequantize_w4a8_int8_weight = linear_of, dequantize_of


def prepare(formats: set[str]) -> None:
    """What a model with these formats of the checkpoint needs before it runs."""
    if W4A8 in formats:
        compile_w4a8()
