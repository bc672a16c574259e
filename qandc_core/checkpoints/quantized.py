"""A quantized DiT as one safetensors file: codes, scales and all other weights, with JSON metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..calibration.file import FINGERPRINT, fingerprint
from ..files import METADATA_KEY, SAFETENSORS, pop_metadata, read_metadata_tensor, read_safetensors, save_tensors
from ..models.dit import DiT, DiTConfig
from ..quantization.linear import LinearFormat, QuantizedLinear
from ..quantization.model import named_linears, quantized_layers
from .dit import strip_prefix

FORMAT, VERSION = "qandc-quantized-dit", 1


def save_quantized(model: DiT, path: str | os.PathLike[str]) -> None:
    """Writes a file that `load_quantized` and `load_dit` read back exactly; a failed write leaves the old file alone.

    Raises ValueError on a model that is not our DiT or has no quantized layer.
    """
    save_tensors(model.state_dict(), path, {"format": "pt", **quantized_metadata(model)})


def quantized_metadata(model: DiT) -> dict[str, str]:
    """What the tensors alone do not tell: configuration, format of every quantized layer, fingerprint."""
    layers = quantized_layers(model)
    if not isinstance(model, DiT) or not layers:
        raise ValueError(f"save_quantized needs this package's DiT with quantized layers, got {type(model).__name__}.")
    header = {
        "format": FORMAT,
        "version": VERSION,
        "model": fingerprint(model),
        "config": asdict(model.config),
        "layers": {name: asdict(layer.format) for name, layer in layers.items()},
    }
    return {"qandc": json.dumps(header)}


def load_quantized(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> DiT:
    """Reads a file of `save_quantized`; backends are chosen here, on the machine that runs the model.

    `dtype` casts everything but codes and scales; None keeps the file's. Raises FileNotFoundError or ValueError with
    one sentence that says what is wrong.
    """
    tensors, header = read_quantized(path)
    model = DiT(DiTConfig(**header["config"]), device="meta")
    load_codes(model, tensors, header, Path(path))
    return model.to(device=device, dtype=dtype).eval()


def read_quantized(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a quantized file, also where ModelSave put the header among the tensors."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no quantized DiT {path}; make one with: python -m qandc_core quantize.")
    tensors, metadata = read_safetensors(path)
    header = quantized_header({**metadata, **pop_metadata(tensors)})
    if header is None:
        raise ValueError(f"{path} is not a quantized DiT; expected a file that save_quantized wrote.")
    if header["version"] != VERSION:
        raise ValueError(f"{path} has format {header['version']}, this version reads {VERSION}; quantize again.")
    return strip_prefix(tensors), header


def load_codes(model: DiT, tensors: dict[str, Tensor], header: Mapping[str, Any], path: Path | str) -> None:
    """Gives the model the quantized layers that the header lists, and all tensors, in place."""
    expected = DiT(model.config, device="meta")
    for owner in (expected, model):
        replace_linears(owner, tensors, header["layers"])
    # A host's own layers may hold no tensors before they are loaded, so plain ones say what belongs into the file.
    check_tensors(path, tensors, expected.state_dict())
    model.load_state_dict(tensors, strict=False, assign=True)
    setattr(model, FINGERPRINT, header["model"])


def replace_linears(model: DiT, tensors: Mapping[str, Tensor], layers: Mapping[str, Any]) -> None:
    linears = dict(named_linears(model))
    for name, format in layers.items():
        linear = linears[name]
        layer = QuantizedLinear(
            linear.in_features, linear.out_features, f"{name}.bias" in tensors, LinearFormat(**format), device="meta"
        )
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)


def quantized_header(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `save_quantized` wrote of the model, or None in any other file."""
    try:
        header = json.loads(metadata.get("qandc", "null"))
    except ValueError:
        return None
    return header if isinstance(header, dict) and header.get("format") == FORMAT else None


def is_quantized(path: Path) -> bool:
    """Whether the file says that `save_quantized` wrote it; reads no tensor."""
    if path.suffix not in SAFETENSORS:
        return False
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            for key in file.keys():
                if key.endswith(METADATA_KEY):
                    metadata = {**metadata, **read_metadata_tensor(file.get_tensor(key))}
            return quantized_header(metadata) is not None
    except (SafetensorError, OSError, ValueError):
        return False


def check_tensors(path: Path | str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    odd = sorted(found.keys() ^ expected.keys())
    if odd:
        state = "lacks" if odd[0] in expected else "should not hold"
        raise ValueError(f"{path} {state} {odd[0]} ({len(odd)} such tensors); quantize the model again.")
    for key, tensor in expected.items():
        kinds = tuple("floats" if t.is_floating_point() else str(t.dtype) for t in (found[key], tensor))
        if found[key].shape != tensor.shape or kinds[0] != kinds[1]:
            raise ValueError(
                f"{path}: {key} has the shape {tuple(found[key].shape)} of {kinds[0]}, "
                f"expected {tuple(tensor.shape)} of {kinds[1]}; quantize the model again."
            )
