"""Files whose linear layers are in ComfyUI's quantized formats, as tensors of full precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ..files import SAFETENSORS
from ..quantization.formats import ALL
from ..quantization.native import FORMATS, dequantize, layer_config

MARK = ".comfy_quant"
PARTS = (*dict.fromkeys(part for format in ALL for part in format.parts), "comfy_quant")


def quantized_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Layers that a file holds in a quantized format of ComfyUI's."""
    return [key.removesuffix(MARK) for key in tensors if key.endswith(MARK)]


def holds_quantized(path: Path) -> bool:
    """Whether a file has quantized layers; reads no tensor."""
    if path.suffix not in SAFETENSORS:
        return False
    with safe_open(path, framework="pt") as file:
        return any(key.endswith(MARK) for key in file.keys())


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with a float32 weight for each quantized layer. Raises ValueError on other formats than ours."""
    plain = dict(tensors)
    for name in quantized_names(tensors):
        parts = {part: plain.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in plain}
        format = layer_config(parts)["format"]
        if format not in FORMATS.values():
            raise ValueError(f"{name} is in the format {format}, expected one of {', '.join(FORMATS.values())}")
        plain[f"{name}.weight"] = dequantize(parts)
    return plain
