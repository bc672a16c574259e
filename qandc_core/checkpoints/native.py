"""Files whose linear layers are in ComfyUI's quantized formats, as tensors of full precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..files import SAFETENSORS, parse_json, read_header
from ..quantization.formats import ALL, STORED
from ..quantization.native import dequantize

MARK = ".comfy_quant"
PARTS = (*dict.fromkeys(part for format in ALL for part in format.parts), "comfy_quant")


def quantized_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Layers that a file holds in a quantized format of ComfyUI's."""
    return [key.removesuffix(MARK) for key in tensors if key.endswith(MARK)]


def holds_quantized(path: Path) -> bool:
    """True if a file has quantized layers; reads no tensor."""
    if path.suffix not in SAFETENSORS:
        return False
    return any(key.endswith(MARK) for key in read_header(path)[0])


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with a float32 weight for each quantized layer. Raises ValueError on other formats than ours."""
    plain = dict(tensors)
    for name in quantized_names(tensors):
        parts = {part: plain.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in plain}
        format = named_format(name, parts["comfy_quant"])
        if format not in STORED:
            raise ValueError(f"{name} is in the format {format}, expected one of {', '.join(STORED)}")
        try:
            plain[f"{name}.weight"] = dequantize(parts)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, ZeroDivisionError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{name} is damaged, its tensors are no layer in the format {format} ({reason})"
            ) from error
    return plain


def named_format(name: str, mark: Tensor) -> str:
    """The format that a comfy_quant tensor names. Raises ValueError where it is none."""
    if mark.dtype != torch.uint8 or mark.numel() > 2**16:
        raise ValueError(f"{name}{MARK} is {tuple(mark.shape)} of {mark.dtype}, expected a few bytes of JSON")
    try:
        return str(parse_json(bytes(mark.flatten().tolist()))["format"])[:50]
    except KeyError as error:
        raise ValueError(f"{name}{MARK} names no format; the file is damaged") from error
    except ValueError as error:
        raise ValueError(f"{name}{MARK} is damaged ({error})") from error
