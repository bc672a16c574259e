"""A quantized DiT as one safetensors file: codes, scales and all other weights, with JSON metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.file import FINGERPRINT, fingerprint
from ..files import SAFETENSORS, parse_json, pop_metadata, read_header, read_safetensors, reading, save_tensors
from ..models.detection import check_sizes
from ..models.dit import DiT, DiTConfig
from ..models.layers import named_linears
from ..quantization.linear import LinearFormat, QuantizedLinear
from ..quantization.model import quantized_layers
from ..values import check_finite, whole_number
from .prefixes import strip_prefix

FORMAT, VERSION = "qandc-quantized-dit", 1
REMEDY = "quantize the model again"


def save_quantized(model: DiT, path: str | os.PathLike[str]) -> None:
    """Writes a file that `load_quantized` and `load_dit` read back exactly; a failed write leaves the old file alone.

    Raises ValueError on a model that is not our DiT or has no quantized layer.
    """
    save_tensors(model.state_dict(), path, {"format": "pt", **quantized_metadata(model)})


def quantized_metadata(model: DiT) -> dict[str, str]:
    """Metadata that the tensors lack: configuration, format of every quantized layer, fingerprint."""
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
    with reading(path, REMEDY):
        model = DiT(DiTConfig(**header["config"]), device="meta")
        load_codes(model, tensors, header, Path(path))
    return model.to(device=device, dtype=dtype).eval()


def read_quantized(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a quantized file, also where ModelSave put the header among the tensors."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no quantized DiT {path}; make one with: python -m qandc_core quantize.")
    tensors, metadata = read_safetensors(path)
    with reading(path, REMEDY):
        header = quantized_header({**metadata, **pop_metadata(tensors)})
        if header is None:
            raise ValueError(f"{path} is not a quantized DiT; expected a file that save_quantized wrote.")
        if header.get("version") != VERSION:
            raise ValueError(f"{path} has format {header.get('version')}, this version reads {VERSION}; {REMEDY}.")
        tensors = strip_prefix(tensors)
        check_header(header, tensors)
        check_finite(tensors)
    return tensors, header


def check_header(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless every field is of its kind; the sizes are checked before a model is made of them."""
    known = {"model": str, "config": dict, "layers": dict}
    for name, kind in known.items():
        if not isinstance(header.get(name), kind):
            raise ValueError(f"its header has no proper {name!r}")
    fields = DiTConfig.__dataclass_fields__
    odd = sorted(header["config"].keys() - fields.keys())
    if odd:
        raise ValueError(f"its header describes a model with {odd[0]!r}, which this version does not know")
    check_sizes(tensors, DiTConfig(**header["config"]))
    for name, format in header["layers"].items():
        if not isinstance(format, dict) or format.keys() != LinearFormat.__dataclass_fields__.keys():
            raise ValueError(f"its header has no proper format for {name}")
        for bits in ("w_bits", "a_bits"):
            whole_number(format, bits, 2, 8)
        if not all(isinstance(format[flag], bool) for flag in ("static", "symmetric", "symmetric_inputs")):
            raise ValueError(f"its header has no proper format for {name}")


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
        if name not in linears:
            raise ValueError(f"the header lists the layer {name}, which the model does not have")
        linear = linears[name]
        layer = QuantizedLinear(
            linear.in_features, linear.out_features, f"{name}.bias" in tensors, LinearFormat(**format), device="meta"
        )
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)


def quantized_header(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Metadata written by `save_quantized`; None in any other file."""
    text = metadata.get("qandc")
    try:
        header = parse_json(text) if isinstance(text, str) else {}
    except ValueError:
        return None
    return header if header.get("format") == FORMAT else None


def is_quantized(path: Path) -> bool:
    """True if the file was written by `save_quantized`; reads no tensor."""
    if path.suffix not in SAFETENSORS:
        return False
    try:
        return quantized_header(read_header(path)[1]) is not None
    except (OSError, ValueError):
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
