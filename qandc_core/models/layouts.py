"""Names of diffusers' DiTTransformer2DModel against those of the published DiT checkpoints, which are ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

BLOCKS = "transformer_blocks"
POSITIONS = "pos_embed.pos_embed"

# diffusers gives every block its own copy of the two embedders; the final layer uses those of block 0.
EMBEDDERS = (
    "norm1.emb.timestep_embedder.linear_1",
    "norm1.emb.timestep_embedder.linear_2",
    "norm1.emb.class_embedder.embedding_table",
)
OUTER_MODULES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": f"{BLOCKS}.0.{EMBEDDERS[0]}",
    "t_embedder.mlp.2": f"{BLOCKS}.0.{EMBEDDERS[1]}",
    "y_embedder.embedding_table": f"{BLOCKS}.0.{EMBEDDERS[2]}",
    "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
}
BLOCK_MODULES = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}


def diffusers_names(name: str) -> tuple[str, ...]:
    """diffusers' module names for our module `name`; a name we do not map stands for itself."""
    if name in OUTER_MODULES:
        return (OUTER_MODULES[name],)
    container, _, rest = name.partition(".")
    index, _, module = rest.partition(".")
    if container != "blocks" or module not in BLOCK_MODULES:
        return (name,)
    return tuple(f"{BLOCKS}.{index}.{part}" for part in BLOCK_MODULES[module])


def parameter_names(depth: int) -> list[str]:
    """Our parameter names for `depth` blocks, without the fixed position embedding `pos_embed`."""
    modules = [*OUTER_MODULES, *(f"blocks.{i}.{module}" for i in range(depth) for module in BLOCK_MODULES)]
    return [key for module in modules for key in parameters(module)]


def parameters(module: str) -> list[str]:
    kinds = ("weight",) if module.endswith("embedding_table") else ("weight", "bias")
    return [f"{module}.{kind}" for kind in kinds]


def diffusers_keys(key: str) -> tuple[str, ...]:
    """diffusers' keys whose tensors, stacked along dimension 0, make up our parameter `key`."""
    module, _, kind = key.rpartition(".")
    return tuple(f"{name}.{kind}" for name in diffusers_names(module))


def repeated_keys(depth: int) -> dict[str, str]:
    """Keys of the embedders in blocks 1, 2, ..., each with the key in block 0 that it repeats."""
    suffixes = [key for module in EMBEDDERS for key in parameters(module)]
    return {f"{BLOCKS}.{i}.{s}": f"{BLOCKS}.0.{s}" for i in range(1, depth) for s in suffixes}


def count_blocks(keys: Iterable[str], container: str) -> int:
    return len({key.split(".")[1] for key in keys if key.startswith(f"{container}.")})


def is_diffusers(keys: Iterable[str]) -> bool:
    return count_blocks(keys, BLOCKS) > 0


def from_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of diffusers' DiTTransformer2DModel in our layout.

    `pos_embed` is present only if the file holds it: recent versions of diffusers do not save it.
    Raises ValueError if blocks hold different embedders or q, k and v have different shapes.
    """
    depth = count_blocks(state_dict, BLOCKS)
    for repeated, first in repeated_keys(depth).items():
        if repeated in state_dict and not torch.equal(state_dict[repeated], state_dict[first]):
            raise ValueError(f"{repeated} differs from {first}, but a DiT has one embedder for all blocks")
    converted = {key: stack(state_dict, diffusers_keys(key)) for key in parameter_names(depth)}
    if POSITIONS in state_dict:
        converted["pos_embed"] = state_dict[POSITIONS]
    return converted


def stack(state_dict: Mapping[str, Tensor], keys: tuple[str, ...]) -> Tensor:
    parts = [state_dict[key] for key in keys]
    shapes = [tuple(part.shape) for part in parts]
    if len(set(shapes)) > 1:
        raise ValueError(f"{', '.join(keys)} have different shapes {shapes}, expected one shape")
    return parts[0] if len(parts) == 1 else torch.cat(parts)
