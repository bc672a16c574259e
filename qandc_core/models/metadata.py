"""A checkpoint's metadata as one of its tensors, for savers that write tensors alone (ComfyUI's ModelSave)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KEY = "qandc_metadata"


def metadata_tensor(metadata: Mapping[str, str]) -> Tensor:
    """UTF-8 JSON bytes, uint8 (N,)."""
    return torch.frombuffer(bytearray(json.dumps(dict(metadata)).encode()), dtype=torch.uint8)


def read_metadata_tensor(tensor: Tensor) -> dict[str, Any]:
    """Raises ValueError unless the bytes are a JSON object."""
    try:
        content = json.loads(bytes(tensor.flatten().tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{KEY} is damaged ({error}); save the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{KEY} holds a {type(content).__name__}, expected a JSON object; save the model again")
    return content


def pop_metadata(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Takes the metadata tensor out of the tensors, wherever its prefix put it."""
    keys = [key for key in tensors if key == KEY or key.endswith(f".{KEY}")]
    return read_metadata_tensor(tensors.pop(keys[0])) if keys else {}
