"""Reading and writing DiT checkpoints: the published layout, diffusers folders and our own files."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import pop_metadata, read_json, read_tensors, save_tensors
from ..models.detection import METADATA, check_shapes, detect_config
from ..models.dit import DiT, DiTConfig, sincos_positions
from ..models.layouts import (
    BLOCKS,
    POSITIONS,
    count_blocks,
    diffusers_keys,
    from_diffusers,
    is_diffusers,
    parameter_names,
    repeated_keys,
)

DEMO = Path(__file__).parents[1] / "demo" / "digits_dit.safetensors"
FOLDER_WEIGHTS = tuple(
    f"diffusion_pytorch_model.{ending}" for ending in ("safetensors", "safetensors.index.json", "bin", "bin.index.json")
)
PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def load_dit(
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    num_heads: int | None = None,
) -> DiT:
    """Loads a DiT from "demo", a checkpoint file, or a diffusers transformer or pipeline folder.

    `dtype` None keeps the file's. `num_heads` is needed for a width not in `HEADS` whose file does not tell it.
    A file that `save_quantized` wrote gives its quantized model. Raises FileNotFoundError or ValueError with one
    sentence that says what is wrong.
    """
    from .quantized import is_quantized, load_quantized

    if is_quantized(locate(source)):
        return load_quantized(locate(source), dtype, device)
    state_dict, config = read_dit(source, num_heads)
    model = DiT(config, device="meta")
    tensors = {key: tensor.to(device=device, dtype=dtype) for key, tensor in state_dict.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def save_dit(model: DiT, path: str | os.PathLike[str]) -> None:
    """Writes a safetensors file that `load_dit` reads back exactly; an interrupted write leaves no file behind."""
    save_tensors(model.state_dict(), path, {"format": "pt", **dit_metadata(model.config)})


def dit_metadata(config: DiTConfig) -> dict[str, str]:
    return {name: str(getattr(config, name)) for name in METADATA}


def read_dit(
    source: str | os.PathLike[str], num_heads: int | None = None, input_size: int | None = None
) -> tuple[dict[str, Tensor], DiTConfig]:
    """Tensors in our layout and configuration of any source `load_dit` accepts, checked against each other.

    `input_size` is needed for a diffusers file without the config.json of its folder. Layers in ComfyUI's quantized
    formats come in full precision.
    """
    from .native import dequantized

    path = locate(source)
    tensors, metadata = read_tensors(path)
    try:
        metadata = {**metadata, **pop_metadata(tensors)}
        known = read_json(path.parent / "config.json") if (path.parent / "config.json").is_file() else {}
        if input_size is not None:
            known = {**known, "sample_size": input_size}
        state_dict, metadata = to_published_layout(dequantized(strip_prefix(tensors)), metadata, known)
        config = detect_config(state_dict, metadata, num_heads)
        check_shapes(state_dict, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return state_dict, config


def locate(source: str | os.PathLike[str]) -> Path:
    """The file that holds the weights, or the index of the files that do."""
    path = DEMO if source == "demo" else Path(source)
    if not path.exists():
        hint = "; install the package again" if source == "demo" else ""
        raise FileNotFoundError(f"no DiT checkpoint at {path}{hint}")
    if path.is_file():
        return path
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    for name in FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no DiT in the folder {path}: expected one of {', '.join(FOLDER_WEIGHTS)} in {folder}")


def strip_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The diffusion model alone, if the file keeps it under a prefix."""
    for prefix in PREFIXES:
        inner = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if inner:
            return inner
    return tensors


def to_published_layout(
    tensors: dict[str, Tensor], metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under our names, and the metadata completed by what diffusers keeps in its config.json."""
    if not is_diffusers(tensors):
        depth = max(1, count_blocks(tensors, "blocks"))
        check_keys(tensors, [*parameter_names(depth), "pos_embed"])
        return tensors, dict(metadata)
    depth = count_blocks(tensors, BLOCKS)
    keys = [source for key in parameter_names(depth) for source in diffusers_keys(key)]
    check_keys(tensors, keys, optional=[POSITIONS, *repeated_keys(depth)])
    state_dict = from_diffusers(tensors)
    if "pos_embed" not in state_dict:
        state_dict["pos_embed"] = diffusers_positions(state_dict["x_embedder.proj.weight"], config)
    known = {"norm2_eps": config.get("norm_eps", 1e-5), "frequency_shift": 1}
    if "num_attention_heads" in config:
        known["num_heads"] = config["num_attention_heads"]
    return state_dict, {**known, **metadata}


def diffusers_positions(projection: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The position embedding diffusers makes for the patch projection (D, C, p, p) and `sample_size`."""
    if "sample_size" not in config:
        raise ValueError(
            "the input size is neither in the tensors nor in a config.json beside the file; "
            "load the diffusers folder that holds both, or give the size of the images the model was trained for"
        )
    side = config["sample_size"] // projection.shape[-1]
    return sincos_positions(projection.shape[0], side, side, side).to(projection.dtype)


def check_keys(found: Collection[str], expected: Collection[str], optional: Collection[str] = ()) -> None:
    missing = [key for key in expected if key not in found]
    if len(missing) == len(expected):
        raise ValueError(
            "this is not a DiT: no key of the original or the diffusers layout is in it; choose a class-conditional DiT"
        )
    if missing:
        raise ValueError(f"{len(missing)} of {len(expected)} DiT keys are missing, first {', '.join(missing[:3])}")
    extra = sorted(set(found) - set(expected) - set(optional))
    if extra:
        raise ValueError(
            f"{len(extra)} of {len(found)} keys are not those of a class-conditional DiT, first {', '.join(extra[:3])}"
        )
