"""Reading and writing DiT checkpoints: the published layout, diffusers folders and our own files."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import is_text, pop_metadata, read_json, read_tensors, reading, save_tensors, shard_files
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
from ..values import check_finite, real_number, whole_number
from .native import dequantized
from .prefixes import strip_prefix
from .quantized import is_quantized, load_quantized

DEMO = Path(__file__).parents[1] / "demo" / "pictures_dit.safetensors"
FOLDER_WEIGHTS = tuple(
    f"diffusion_pytorch_model.{ending}" for ending in ("safetensors", "safetensors.index.json", "bin", "bin.index.json")
)
MAX_SIDE = 256  # patches; published models have at most 32


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
    if is_quantized(locate(source)):
        quantized = load_quantized(locate(source), dtype, device)
        with reading(source):
            check_asked(quantized.config, num_heads)
        return quantized
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

    `input_size` is needed for a diffusers file without the config.json of its folder. What the file says goes before
    it and `num_heads`: ValueError where they differ. Layers in ComfyUI's quantized formats come in full precision.
    """
    path = locate(source)
    tensors, metadata = read_tensors(path)
    if path == DEMO:  # kept in half precision to be small
        tensors = {key: tensor.float() for key, tensor in tensors.items()}
    with reading(path):
        metadata = {**metadata, **pop_metadata(tensors)}
        tensors = dequantized(strip_prefix(tensors))
        known = read_json(path.parent / "config.json") if has_config(path, tensors) else {}
        if input_size is not None:
            known = {"sample_size": input_size, **known}
        state_dict, metadata = to_published_layout(tensors, metadata, known)
        config = detect_config(state_dict, metadata, num_heads)
        check_asked(config, num_heads, input_size)
        check_shapes(state_dict, config)
        check_finite(state_dict)
    return state_dict, config


def check_asked(config: DiTConfig, num_heads: int | None, input_size: int | None = None) -> None:
    """Raises ValueError where the caller says of a model what its file says otherwise."""
    for name, asked in (("num_heads", num_heads), ("input_size", input_size)):
        found = getattr(config, name)
        if asked not in (None, found):
            raise ValueError(f"its {name} is {found}, not {asked}; leave that to the file")


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


def has_config(path: Path, tensors: Collection[str]) -> bool:
    """True if the config.json beside a file describes it; one of another layout belongs to another model."""
    return is_diffusers(tensors) and (path.parent / "config.json").is_file()


def source_files(source: str | os.PathLike[str]) -> list[Path]:
    """The files that `load_dit` would read, absent ones included."""
    path = locate(source)
    try:
        shards = shard_files(path) if path.name.endswith(".index.json") else []
    except ValueError:  # said when the file is loaded
        shards = []
    return [path, *shards, path.parent / "config.json"]


def dit_folders(root: str | os.PathLike[str]) -> list[Path]:
    """diffusers pipelines directly below `root` that hold a class-conditional transformer.

    Looks at names and the start of each config.json; leaves out whatever cannot be read.
    """
    try:
        folders = sorted(Path(root).iterdir())
    except OSError:
        return []
    return [folder for folder in folders if is_text(folder.name) and is_class_conditional(folder)]


def is_class_conditional(folder: Path) -> bool:
    config = folder / "transformer" / "config.json"
    try:
        if not config.is_file():
            return False
        with config.open("rb") as file:
            return b"num_embeds_ada_norm" in file.read(2**20)
    except OSError:
        return False


def to_published_layout(
    tensors: dict[str, Tensor], metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under our names, and the metadata completed by what diffusers keeps in its config.json."""
    if not is_diffusers(tensors):
        depth = max(1, count_blocks(tensors, "blocks"))
        check_keys(tensors, [*parameter_names(depth), "pos_embed"])
        return dict(tensors), dict(metadata)
    depth = count_blocks(tensors, BLOCKS)
    keys = [source for key in parameter_names(depth) for source in diffusers_keys(key)]
    check_keys(tensors, keys, optional=[POSITIONS, *repeated_keys(depth)])
    state_dict = from_diffusers(tensors)
    if "pos_embed" not in state_dict:
        state_dict["pos_embed"] = diffusers_positions(state_dict["x_embedder.proj.weight"], config)
    return state_dict, {**diffusers_metadata(config), **metadata}


def diffusers_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """The DiT that a diffusers config.json describes, in our terms."""
    known: dict[str, Any] = {
        "frequency_shift": 1,
        "norm2_eps": real_number({"norm_eps": 1e-5, **config}, "norm_eps", 0, 1),
    }
    for name, theirs, most in (
        ("num_heads", "num_attention_heads", 2**12),
        ("num_classes", "num_embeds_ada_norm", 2**24),
    ):
        if config.get(theirs) is not None:
            known[name] = whole_number(config, theirs, 1, most)
    return known


def diffusers_positions(projection: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The position embedding diffusers makes for the patch projection (D, C, p, p) and `sample_size`."""
    if "sample_size" not in config:
        raise ValueError(
            "the input size is neither in the tensors nor in a config.json beside the file; "
            "load the diffusers folder that holds both, or give the size of the images the model was trained for"
        )
    if projection.ndim != 4 or not projection.shape[-1]:
        raise ValueError(f"the patch projection has the shape {tuple(projection.shape)}, expected 4 dimensions")
    patch = projection.shape[-1]
    side = whole_number(config, "sample_size", patch, MAX_SIDE * patch) // patch
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
