"""Files of tensors: safetensors, pickled state dicts, sharded checkpoints, their metadata, and one atomic save."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SAFETENSORS = (".safetensors", ".sft")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
METADATA_KEY = (
    "qandc_metadata"  # a tensor that holds metadata, for savers that write tensors alone (ComfyUI's ModelSave)
)


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file under a temporary name and renames it; a failed write leaves the old file alone."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, dict(metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and string metadata of one file, or of all files of an index."""
    if path.suffix in SAFETENSORS:
        return read_safetensors(path)
    if path.suffix in PICKLES:
        return read_pickle(path), {}
    if path.name.endswith(".index.json"):
        return read_shards(path), {}
    raise ValueError(f"{path} is not a DiT checkpoint: expected a file ending in {', '.join(SAFETENSORS + PICKLES)}")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); download or save it again"
        ) from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a bare state dict, or of the `ema` or `model` entry of a training checkpoint."""
    # Training checkpoints of the original code hold their arguments, a plain record, beside the weights.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds Python objects that weights_only=True refuses; "
            "save its state dict as safetensors and load that"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as it has opcodes
        raise ValueError(f"{path} is truncated or not a PyTorch file") from error
    for name in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def read_shards(path: Path) -> dict[str, Tensor]:
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{path} has no weight_map, expected the index of a sharded checkpoint")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(map(str, shards.values()))):
        shard = path.parent / Path(name).name
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing, but {path.name} lists it")
        tensors.update(read_tensors(shard)[0])
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def metadata_tensor(metadata: Mapping[str, str]) -> Tensor:
    """UTF-8 JSON bytes, uint8 (N,)."""
    return torch.frombuffer(bytearray(json.dumps(dict(metadata)).encode()), dtype=torch.uint8)


def read_metadata_tensor(tensor: Tensor) -> dict[str, Any]:
    """Raises ValueError unless the bytes are a JSON object."""
    try:
        content = json.loads(bytes(tensor.flatten().tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{METADATA_KEY} is damaged ({error}); save the model again") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{METADATA_KEY} holds a {type(content).__name__}, expected a JSON object; save the model again"
        )
    return content


def pop_metadata(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Takes the metadata tensor out of the tensors, wherever its prefix put it."""
    keys = [key for key in tensors if key == METADATA_KEY or key.endswith(f".{METADATA_KEY}")]
    return read_metadata_tensor(tensors.pop(keys[0])) if keys else {}
