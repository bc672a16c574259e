"""The configuration of a DiT, read off the shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .dit import DiT, DiTConfig
from .layouts import count_blocks
from .presets import HEADS

# What a DiTConfig holds and tensor shapes do not tell.
METADATA = ("num_heads", "norm2_eps", "frequency_shift", "prediction")


def detect_config(
    state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None, num_heads: int | None = None
) -> DiTConfig:
    """Configuration of a state dict in our layout: every size from shapes, the rest from `metadata` (see METADATA).

    Heads: `num_heads`, else metadata, else the table `HEADS`. Raises ValueError where a shape is not a DiT's.
    """
    metadata = metadata or {}
    hidden, in_channels, _, patch = shape(state_dict, "x_embedder.proj.weight", 4)
    rows, _ = shape(state_dict, "final_layer.linear.weight", 2)
    if rows not in (patch**2 * in_channels, 2 * patch**2 * in_channels):
        raise ValueError(
            f"final_layer.linear.weight has {rows} rows, expected {patch**2 * in_channels} for patches of "
            f"{patch}x{patch}x{in_channels}, or twice that with a learned variance"
        )
    return DiTConfig(
        input_size=patch * grid_side(state_dict),
        patch_size=patch,
        in_channels=in_channels,
        hidden_size=hidden,
        depth=count_blocks(state_dict, "blocks"),
        num_heads=detect_heads(hidden, metadata, num_heads),
        mlp_ratio=shape(state_dict, "blocks.0.mlp.fc1.weight", 2)[0] / hidden,
        num_classes=shape(state_dict, "y_embedder.embedding_table.weight", 2)[0] - 1,
        learn_sigma=rows == 2 * patch**2 * in_channels,
        norm2_eps=float(metadata.get("norm2_eps", 1e-6)),
        frequency_shift=int(metadata.get("frequency_shift", 0)),
        prediction=str(metadata.get("prediction", "epsilon")),
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


def detect_heads(hidden: int, metadata: Mapping[str, Any], num_heads: int | None) -> int:
    heads = int(num_heads or metadata.get("num_heads") or HEADS.get(hidden, 0))
    if not heads:
        raise ValueError(f"the number of attention heads is not known for width {hidden}; give it as num_heads")
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
