"""A DiT for sampling alone: fused layers, and the modulations of a whole run in one matmul.

A FusedDiT owns a copy of every weight, so the DiT that it was made of may be changed, moved or freed. In exchange it is
closed: it cannot be stepped by hand, calibrated, quantized, saved or loaded into, and says so; do that to the DiT and
fuse it again. It may be moved to another device that its kernels run on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..caching.attach import feature_cache
from ..models.dit import DiT, DiTBlock, PatchGrid
from ..quantization.linear import QuantizedLinear
from .kernels import available
from .linear import KERNELS, GatedResidual, Int8Linear, Modulation, fused_linear, gated, stacked
from .loop import generate_on_device

if TYPE_CHECKING:
    from ..caching.attach import PolicyConfig
    from ..quantization.native import NativeLayer


class FusedBlock(nn.Module):
    def __init__(self, block: DiTBlock, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.num_heads, self.eps = block.attn.num_heads, (block.norm1.eps, block.norm2.eps)
        self.qkv, self.proj = layers["attn.qkv"], layers["attn.proj"]
        self.fc1, self.fc2 = layers["mlp.fc1"], layers["mlp.fc2"]
        if isinstance(self.fc1, Int8Linear) and isinstance(self.fc2, Int8Linear):
            self.fc1.feeds = self.fc2.inputs

    def attention(self, x: Tensor, shift: Tensor, scale: Tensor, after: GatedResidual | None = None) -> Tensor:
        qkv = self.qkv(x, Modulation(shift, scale, self.eps[0])).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2), after=after)

    def mlp(self, x: Tensor, shift: Tensor, scale: Tensor, after: GatedResidual | None = None) -> Tensor:
        return self.fc2(self.fc1(x, Modulation(shift, scale, self.eps[1])), gelu=True, after=after)

    def forward(self, x: Tensor, modulation: Tensor, kept: Tensor | None = None, reused: bool = False) -> Tensor:
        """x (N, T, D), modulation (N, 6, D). FORA's two branches before their gates are written into kept
        (2, N, T, D), or read from there to reuse them.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)
        if kept is None:
            x = self.attention(x, shift_a, scale_a, GatedResidual(x, gate_a))
            return self.mlp(x, shift_m, scale_m, GatedResidual(x, gate_m))
        if not reused:
            kept[0].copy_(self.attention(x, shift_a, scale_a))
        x = gated(kept[0], GatedResidual(x, gate_a))
        if not reused:
            kept[1].copy_(self.mlp(x, shift_m, scale_m))
        return gated(kept[1], GatedResidual(x, gate_m))


class FusedDiT(PatchGrid):
    """Predicts as the DiT it was made of, from weights of its own. `cache` says which steps of a run reuse what."""

    def __init__(self, model: DiT, layers: Mapping[str, nn.Module], dtype: torch.dtype, kernels: str):
        super().__init__()
        self.config, self.dtype, self.kernels = model.config, dtype, kernels
        self.cache: PolicyConfig | None = None
        self.x_embedder, self.t_embedder, self.y_embedder = map(
            copy.deepcopy, (model.x_embedder, model.t_embedder, model.y_embedder)
        )
        self.blocks = nn.ModuleList(
            FusedBlock(block, below(layers, f"blocks.{i}.")) for i, block in enumerate(cast(Any, model.blocks))
        )
        names = [f"blocks.{i}.adaLN_modulation.1" for i in range(model.config.depth)]
        self.adaln = stacked([layers[name] for name in [*names, "final_layer.adaLN_modulation.1"]])
        self.final, self.final_eps = layers["final_layer.linear"], model.final_layer.norm_final.eps
        self.register_buffer("pos_embed", model.pos_embed)
        self.loops: dict[Any, Any] = {}  # the DeviceLoop of the latest run, by what it was made for

    sample = generate_on_device  # a whole run, for generate()

    def refuse(self, what: str) -> NoReturn:
        raise ValueError(f"A FusedDiT only samples, by generate(); {what} the DiT it was made of and fuse it again.")

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.refuse("save")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.refuse("load weights into")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loops": {}}  # a copy captures graphs of its own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedDiT:
        """Moves the weights; float32 scales and the dtype that the layers were made in stay."""
        moved = fn(self.pos_embed)
        if moved.dtype != self.dtype:
            self.refuse(f"convert to {moved.dtype}".replace("torch.", ""))
        if self.kernels == "triton" and not available(moved.device):
            raise ValueError(f"This FusedDiT runs on Triton kernels, which {moved.device} has not; fuse the DiT there.")
        self.loops.clear()
        return super()._apply(lambda tensor: tensor.to(moved.device), recurse)

    def set_cache(self, config: PolicyConfig | None) -> None:
        """Raises ValueError on order 1 for features: only predictions are extrapolated."""
        if config is not None and config.order and config.reuse != "prediction":
            raise ValueError("A FusedDiT extrapolates predictions only; use reuse='prediction' with order 1.")
        self.cache = config

    def reuse_cost(self, reuse: str) -> float:
        """Share of a computed step that a reused one takes: of the matmuls over tokens, those outside the blocks."""
        config, patch = self.config, self.config.patch_size**2
        around = patch * (config.in_channels + config.out_channels)
        blocks = config.depth * (4 + 2 * config.mlp_ratio) * config.hidden_size
        return 0.0 if reuse == "prediction" else around / (around + blocks)

    def modulations(self, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Shifts, scales and gates of R conditions at once: timesteps, labels (R,) -> (R, 6 depth + 2, D)."""
        c = self.t_embedder(timesteps, self.dtype) + self.y_embedder(labels).to(self.dtype)
        c = F.silu(c)[:, None]
        return torch.cat([layer(c).unflatten(-1, (-1, self.config.hidden_size))[:, 0] for layer in self.adaln], dim=1)

    def embed(self, x: Tensor) -> Tensor:
        p = self.config.patch_size
        tokens = self.x_embedder(x)
        return tokens + self.positions(x.shape[-2] // p, x.shape[-1] // p, tokens)

    def output(self, tokens: Tensor, modulation: Tensor, like: Tensor) -> Tensor:
        p = self.config.patch_size
        shift, scale = modulation[:, -2], modulation[:, -1]
        return self.unpatchify(
            self.final(tokens, Modulation(shift, scale, self.final_eps)), like.shape[-2] // p, like.shape[-1] // p
        )

    def forward(self, x: Tensor, modulation: Tensor, kept: Tensor | None = None, reused: bool = False) -> Tensor:
        """x (N, C, H, W), modulation (N, 6 depth + 2, D) -> (N, out_channels, H, W).

        `kept` is written, or read where `reused`: (depth, 2, N, T, D) for branches (FORA), (N, T, D) for what all
        blocks add together. Raises ValueError on the arguments of a DiT.
        """
        if modulation.ndim != 3:
            self.refuse("step, calibrate or compensate")
        start = tokens = self.embed(x)
        parts = modulation[:, :-2].unflatten(1, (-1, 6))
        if kept is not None and kept.ndim == 3 and reused:
            return self.output(start + kept, modulation, x)
        branches = kept if kept is not None and kept.ndim == 5 else None
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, parts[:, i], None if branches is None else branches[i], reused)
        if kept is not None and kept.ndim == 3:
            kept.copy_(tokens - start)
        return self.output(tokens, modulation, x)


def fuse_dit(
    model: DiT,
    kernels: str = "auto",
    native: Mapping[str, NativeLayer | None] | None = None,
    compile: bool = False,
) -> FusedDiT:
    """A DiT for sampling alone, from a float or quantized DiT, or from it and layers in ComfyUI's formats (`native`).

    `kernels`: reference (torch's operations), kitchen (comfy-kitchen) or triton (this package's); auto: triton on GPUs
    that have it. `compile` fuses the operations of each block with torch.compile; blocks share the result.
    The result shares no memory with `model` and `native`. Raises ValueError on other models than our DiT, on one with a
    cache and on layers that the kernels cannot run.
    """
    if not isinstance(model, DiT):
        raise ValueError(f"fuse_dit takes this package's DiT (load_dit), got {type(model).__name__}.")
    if feature_cache(model) is not None:
        raise ValueError("Remove the cache first (remove_cache) and apply one to the fused model.")
    chosen = pick_kernels(kernels, model.pos_embed.device)
    dtype = model.pos_embed.dtype
    layers = {name: fused_linear(layer, chosen, dtype) for name, layer in source_layers(model, native or {}).items()}
    fused = FusedDiT(model, layers, dtype, chosen).to(model.pos_embed.device).eval()
    own_memory(fused, chain(model.parameters(), model.buffers(), *(layer_tensors(n) for n in (native or {}).values())))
    if compile:
        for block in fused.blocks:
            block.compile(dynamic=False)
    return fused


def layer_tensors(layer: NativeLayer | None) -> Iterable[Tensor]:
    return () if layer is None else layer.tensors.values()


def own_memory(fused: nn.Module, others: Iterable[Tensor]) -> None:
    """Replaces buffers that lie in the memory of other tensors by copies."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in others}
    for module in fused.modules():
        for name, tensor in module._buffers.items():
            if tensor is not None and tensor.untyped_storage().data_ptr() in taken:
                module._buffers[name] = tensor.clone()


def pick_kernels(kernels: str, device: torch.device) -> str:
    if kernels == "auto":
        return "triton" if available(device) else "reference"
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be auto or one of {', '.join(KERNELS)}, got {kernels!r}.")
    if kernels == "triton" and not available(device):
        raise ValueError(f"The Triton kernels need Triton and an NVIDIA GPU of capability 8.0, not {device}; use auto.")
    return kernels


def source_layers(model: DiT, native: Mapping[str, NativeLayer | None]) -> dict[str, Any]:
    """The linear layers outside the embedders, in their native format where there is one."""
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, QuantizedLinear)) and not name.startswith("t_embedder")
    }
    unknown = set(native) - set(layers)
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]} is no layer of the blocks or after them; leave it out of `native`.")
    return {name: native.get(name) or layer for name, layer in layers.items()}


def below(layers: Mapping[str, nn.Module], prefix: str) -> dict[str, nn.Module]:
    return {name.removeprefix(prefix): layer for name, layer in layers.items() if name.startswith(prefix)}
