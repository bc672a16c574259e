"""The text encoders of a CLIP, and which of them ComfyUI's loaders take in a quantized format."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from comfy.sd1_clip import SDClipModel
from torch import nn

from ....qandc_core.quantization.selection import block_linears, matching
from ..quantize.layers import all_linears, is_linear
from ..quantize.patcher import has_parameter

# By a layer of this name the loaders find the file of which they ask whether it is quantized, one of each kind in a
# CLIP: comfy.sd's t5xxl_detect and llama_detect.
ASKED_BY = {
    "t5": (
        "encoder.block.23.layer.1.DenseReluDense.wi_1.weight",
        "encoder.block.23.layer.1.DenseReluDense.wi.weight",
    ),
    "llama": ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.linear_attn.in_proj_a.weight"),
}


@dataclass(frozen=True)
class Encoder:
    """`name` is its place in the CLIP, such as t5xxl; `model` takes tokens; `network` is what a file holds of it."""

    name: str
    model: Any

    @property
    def network(self) -> nn.Module:
        return self.model.transformer

    @property
    def root(self) -> str:
        return f"{self.name}.transformer"

    @property
    def kind(self) -> str | None:
        """t5, llama, or None for one whose files are never asked whether they are quantized, such as clip_l."""
        return next(
            (kind for kind, keys in ASKED_BY.items() if any(has_parameter(self.network, key) for key in keys)), None
        )

    @property
    def bytes(self) -> int:
        """Size in a file."""
        return sum(tensor.nbytes for tensor in self.network.state_dict().values())


def encoders_of(clip) -> list[Encoder]:
    modules = clip.cond_stage_model.named_modules()
    return [Encoder(name, module) for name, module in modules if isinstance(module, SDClipModel)]


def quantizable_encoders(clip) -> list[Encoder]:
    """Encoders that ComfyUI's loaders take in a quantized format."""
    read = kinds_read(clip.cond_stage_model)
    found = encoders_of(clip)
    number = Counter(encoder.kind for encoder in found)
    return [e for e in found if e.kind in read and number[e.kind] == 1]


def kinds_read(model: nn.Module) -> set[str]:
    """Kinds of encoders of which the loader tells this class whether they are quantized.

    ComfyUI makes the class for each loaded CLIP in a function that takes t5_quantization_metadata, llama_..., or none.
    """
    suffix = "_quantization_metadata"
    codes = (getattr(vars(kind).get("__init__"), "__code__", None) for kind in type(model).__mro__)
    names = {name for code in codes if code is not None for name in code.co_freevars}
    return {name.removesuffix(suffix) for name in names if name.endswith(suffix)}


def quantizable_layers(encoder: Encoder, skip: tuple[str, ...], include: tuple[str, ...]) -> dict[str, Any]:
    """The linear layers of the encoder's blocks and those that a part of `include` names, without those of `skip`.

    Parts are of names such as t5xxl.encoder.block.0.layer.0.SelfAttention.q.
    """
    linears = all_linears(encoder.network)
    full = {f"{encoder.name}.{name}": name for name in linears}
    chosen = {name for name, _ in block_linears(encoder.network, [], is_linear)}
    chosen |= {full[name] for name in matching(list(full), include)}
    chosen -= {full[name] for name in matching(list(full), skip)}
    return {name: module for name, module in linears.items() if name in chosen}
