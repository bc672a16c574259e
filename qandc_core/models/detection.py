"""The configuration of a DiT, read off the shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..values import real_number, whole_number
from .dit import DiT, DiTConfig
from .layouts import count_blocks
from .presets import HEADS

# What a DiTConfig holds and tensor shapes do not tell.
METADATA = ("num_heads", "num_classes", "norm2_eps", "frequency_shift", "prediction")
IMAGENET_CLASSES = 1000
MAX_HEADS = 2**12


def detect_config(
    state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None, num_heads: int | None = None
) -> DiTConfig:
    """Configuration of a state dict in our layout: every size from shapes, the rest from `metadata` (see METADATA).

    Heads: metadata, else `num_heads`, else the table `HEADS`. Raises ValueError where a shape is not a DiT's.
    """
    metadata = {"norm2_eps": 1e-6, "frequency_shift": 0, **(metadata or {})}
    hidden, in_channels, _, patch = shape(state_dict, "x_embedder.proj.weight", 4)
    rows, _ = shape(state_dict, "final_layer.linear.weight", 2)
    if rows not in (patch**2 * in_channels, 2 * patch**2 * in_channels):
        raise ValueError(
            f"final_layer.linear.weight has {rows} rows, expected {patch**2 * in_channels} for patches of "
            f"{patch}x{patch}x{in_channels}, or twice that with a learned variance"
        )
    num_classes, has_null_class = detect_classes(state_dict, metadata)
    return DiTConfig(
        input_size=patch * grid_side(state_dict),
        patch_size=patch,
        in_channels=in_channels,
        hidden_size=hidden,
        depth=count_blocks(state_dict, "blocks"),
        num_heads=detect_heads(hidden, metadata, num_heads),
        mlp_ratio=shape(state_dict, "blocks.0.mlp.fc1.weight", 2)[0] / hidden,
        num_classes=num_classes,
        learn_sigma=rows == 2 * patch**2 * in_channels,
        norm2_eps=real_number(metadata, "norm2_eps", 0, 1, text=True),
        frequency_shift=whole_number(metadata, "frequency_shift", 0, 1, text=True),
        prediction=str(metadata.get("prediction", "epsilon")),
        has_null_class=has_null_class,
    )


def shape(state_dict: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    found = tuple(state_dict[key].shape)
    if len(found) != dimensions or 0 in found:
        raise ValueError(f"{key} has the shape {found}, expected {dimensions} dimensions")
    return found


def grid_side(state_dict: Mapping[str, Tensor]) -> int:
    patches = shape(state_dict, "pos_embed", 3)[1]
    side = math.isqrt(patches)
    if side**2 != patches:
        raise ValueError(f"pos_embed covers {patches} patches, expected a square grid")
    return side


def detect_classes(state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> tuple[int, bool]:
    """Number of classes, and whether the last row of the class table is that of no class.

    A DiT trained without label dropout has no such row. Shapes do not tell, but 1000 rows are ImageNet's classes.
    """
    rows = shape(state_dict, "y_embedder.embedding_table.weight", 2)[0]
    if "num_classes" not in metadata:
        return (rows, False) if rows == IMAGENET_CLASSES else (rows - 1, True)
    classes = whole_number(metadata, "num_classes", 1, 2**24, text=True)
    if rows not in (classes, classes + 1):
        raise ValueError(
            f"y_embedder.embedding_table.weight has {rows} rows, expected {classes} classes and one for no class"
        )
    return classes, rows > classes


def detect_heads(hidden: int, metadata: Mapping[str, Any], num_heads: int | None) -> int:
    if "num_heads" in metadata:
        num_heads = whole_number(metadata, "num_heads", 1, MAX_HEADS, text=True)
    heads = HEADS.get(hidden) if num_heads is None else num_heads
    if heads is None:
        raise ValueError(f"the number of attention heads is not known for width {hidden}; give it as num_heads")
    if heads < 1:
        raise ValueError(f"num_heads is {heads}, expected 1 or more")
    if hidden % heads:
        raise ValueError(f"width {hidden} is not divisible by {heads} attention heads; give their number as num_heads")
    return heads


def check_shapes(state_dict: Mapping[str, Tensor], config: DiTConfig) -> None:
    for key, expected in DiT(config, device="meta").state_dict().items():
        tensor = state_dict[key]
        if tensor.shape != expected.shape:
            raise ValueError(f"{key} has the shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{key} has the type {tensor.dtype}, expected floating-point weights")


def check_sizes(tensors: Mapping[str, Tensor], config: DiTConfig) -> None:
    """Raises ValueError unless tensors, some of them perhaps quantized, have the sizes of `config`.

    Made before the model is: a header can claim any size, tensors only what the file holds.
    """
    sizes = {
        "pos_embed": (1, config.side**2, config.hidden_size),
        "x_embedder.proj.weight": (config.hidden_size, config.in_channels, config.patch_size, config.patch_size),
        "y_embedder.embedding_table.weight": (config.num_embeddings, config.hidden_size),
    }
    for key, expected in sizes.items():
        if key not in tensors:
            raise ValueError(f"the file lacks {key}")
        if tuple(tensors[key].shape) != expected:
            raise ValueError(f"{key} has the shape {tuple(tensors[key].shape)}, expected {expected}")
    if count_blocks(tensors, "blocks") != config.depth:
        raise ValueError(f"there are {count_blocks(tensors, 'blocks')} blocks, expected {config.depth}")
    detect_heads(config.hidden_size, {}, config.num_heads)
