"""Reuse at the level of transformer blocks: what a block adds to its streams, kept for the networks of ComfyUI."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ....qandc_core.caching.features import FeatureCache

Streams = tuple["str | int", ...]  # arguments of a block, by name or position, in the order in which it returns them

# Network class -> its lists of blocks. A subclass is looked up by its own name first. The first dimension of a stream
# holds the conditions of the batch, which GeneralDIT (Cosmos 1) keeps in its fourth.
BLOCKS: dict[str, dict[str, Streams]] = {
    "Flux": {"double_blocks": ("img", "txt"), "single_blocks": ("x",)},
    "Chroma": {"double_blocks": ("img", "txt"), "single_blocks": ("x",)},
    "HunyuanVideo": {"double_blocks": ("img", "txt"), "single_blocks": ("x",)},
    "Hunyuan3Dv2": {"double_blocks": ("img", "txt"), "single_blocks": ("x",)},
    "OpenAISignatureMMDITWrapper": {"joint_blocks": (0, 1)},
    "MMDiT": {"double_layers": ("c", "x"), "single_layers": ("cx",)},
    "PixArtMS": {"blocks": ("x",)},
    "AsymmDiTJoint": {"blocks": ("x", "y")},
    "LTXVModel": {"transformer_blocks": ("x",)},
    "WanModel": {"blocks": ("x",)},
    "CausalWanModel": {},  # its blocks write a cache of their own
    "WanAnimate2Model": {},
    "CogVideoXTransformer3DModel": {"blocks": ("hidden_states", "encoder_hidden_states")},
    "MiniTrainDIT": {"blocks": ("x_B_T_H_W_D",)},
    "NextDiT": {"layers": ("x",)},
    "HiDreamImageTransformer2DModel": {
        "double_stream_blocks": ("image_tokens", "text_tokens"),
        "single_stream_blocks": ("image_tokens",),
    },
    "QwenImageTransformer2DModel": {"transformer_blocks": ("encoder_hidden_states", "hidden_states")},
    "MageFlowTransformer2DModel": {"transformer_blocks": ("encoder_hidden_states", "hidden_states")},
    "LensTransformer2DModel": {"transformer_blocks": ("encoder_hidden_states", "hidden_states")},
    "JoyImageTransformer3DModel": {"double_blocks": ("hidden_states", "encoder_hidden_states")},
    "Kandinsky5": {"visual_transformer_blocks": ("visual_embed",)},
    "SingleStreamDiT": {"blocks": ("x",)},
    "Ideogram4Transformer2DModel": {"layers": ("x",)},
    "ErnieImageModel": {"layers": ("x",)},
    "OmniGen2Transformer2DModel": {"layers": ("hidden_states",)},
    "AudioDiffusionTransformer": {"transformer.layers": ("x",)},
    "ACEStepTransformer2DModel": {"transformer_blocks": ("hidden_states",)},
    "MiniMaxH3Model": {"blocks": ("x",)},
    "PixDiT_T2I": {"patch_blocks": (0, 1), "pixel_blocks": (0,)},
    "PidNet": {},  # weighs the low-resolution image by the stream before each block
    "DiT": {"blocks": ("x",)},
}
# Networks that read a stream between blocks, for audio or faces: there every block keeps its own part. WanDancerModel
# attends to one token of music, which adds the same whatever the stream holds.
READ_BETWEEN = {"WanModel_S2V", "AnimateWanModel"}


def block_lists(network: nn.Module) -> dict[str, Streams]:
    """The lists of blocks of a network, by the path of the list; empty for a network that is not known."""
    known = (BLOCKS[base.__name__] for base in type(network).__mro__ if base.__name__ in BLOCKS)
    return next(known, {})


@lru_cache(maxsize=256)
def parameter_positions(block: type[nn.Module]) -> dict[str, int]:
    names = list(inspect.signature(block.forward).parameters)[1:]
    return {name: position for position, name in enumerate(names)}


@dataclass
class BlockCall:
    """One call of the network: what its blocks add, summed, or which sums were added already."""

    cache: FeatureCache
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)
    unlike: str = ""  # the block whose outputs are not its streams

    def accumulate(self, part: str, before: list[Tensor | None], after: list[Tensor | None]) -> None:
        """Sums over the blocks in float32: what they add together is what the list adds, whatever a ControlNet adds."""
        if [shape(stream) for stream in before] != [shape(a) or shape(b) for a, b in zip(after, before)]:
            self.unlike = part
            return
        deltas = [None if a is None or b is None else a.float() - b for a, b in zip(after, before)]
        sums = self.sums.get(part)
        self.sums[part] = deltas if sums is None else [
            s if d is None else d if s is None else s.add_(d) for s, d in zip(sums, deltas)
        ]  # fmt: skip

    def store(self, dtype: torch.dtype) -> None:
        for part, sums in self.sums.items():
            for i, total in enumerate(sums):
                if total is not None:
                    self.cache.store(f"{part}/{i}", total.to(dtype))

    def add(self, part: str, streams: list[Tensor | None]) -> list[Tensor | None]:
        """The streams after the whole list at its first block, as they come at the others."""
        if part in self.added:
            return streams
        self.added.add(part)
        return [self.moved(f"{part}/{i}", stream) for i, stream in enumerate(streams)]

    def moved(self, name: str, stream: Tensor | None) -> Tensor | None:
        """A stream that no block gave back stays."""
        if stream is None or not self.cache.holds(name):
            return stream
        return stream + self.cache.recall(name).to(stream.dtype)


def shape(stream: Tensor | None) -> torch.Size | None:
    return None if stream is None else stream.shape


class CachedBlock:
    """Stands in for the forward of one block while the network is called."""

    def __init__(self, block: nn.Module, part: str, streams: Streams):
        self.block, self.part, self.streams = block, part, streams
        self.own = vars(block).get("forward")
        self.forward = block.forward
        self.single, self.returned = len(streams) == 1, [True] * len(streams)
        self.call: BlockCall

    def enter(self) -> None:
        self.block.forward = self

    def leave(self) -> None:
        if self.own is None:
            del self.block.forward
        else:
            self.block.forward = self.own

    def read(self, args: tuple, kwargs: dict[str, Any]) -> list[Tensor | None]:
        positions = parameter_positions(type(getattr(self.block, "_orig_mod", self.block)))
        values = [
            args[name] if isinstance(name, int) else kwargs[name] if name in kwargs else args[positions[name]]
            for name in self.streams
        ]
        return list(values[0]) if isinstance(values[0], tuple) else values  # video and audio come as one

    def __call__(self, *args, **kwargs):
        streams = self.read(args, kwargs)
        if self.call.cache.run.reusing:
            return self.packed(self.call.add(self.part, streams))
        before = [None if stream is None else stream.clone() for stream in streams]  # blocks work in place
        out = self.forward(*args, **kwargs)
        after = list(out) if isinstance(out, tuple) else [out]
        self.single, self.returned = not isinstance(out, tuple), [value is not None for value in after]
        self.call.accumulate(self.part, before, after)
        return out

    def packed(self, streams: list[Tensor | None]):
        kept = [stream if returned else None for stream, returned in zip(streams, self.returned)]
        return kept[0] if self.single else tuple(kept)


class CachedBlocks:
    """The blocks of one network. With `each`, every block keeps its own part instead of one sum for each list."""

    def __init__(self, network: nn.Module, each: bool):
        self.blocks = [
            CachedBlock(block, f"{path}.{i}" if each else path, streams)
            for path, streams in block_lists(network).items()
            for i, block in enumerate(blocks_at(network, path))
        ]

    @contextmanager
    def called(self, cache: FeatureCache) -> Iterator[BlockCall]:
        """For one call of the network."""
        call = BlockCall(cache)
        entered: list[CachedBlock] = []
        try:
            for block in self.blocks:
                block.call = call
                block.enter()
                entered.append(block)
            yield call
        finally:
            for block in entered:
                block.leave()


def blocks_at(network: nn.Module, path: str) -> list[nn.Module]:
    found = network.get_submodule(path)
    return list(found.values() if isinstance(found, nn.ModuleDict) else found)


def read_between(network: nn.Module, transformer_options: dict[str, Any]) -> bool:
    """Whether something reads the streams between blocks, so that the sum of a list may not be added at once."""
    patched = any("block" in kind for kind in transformer_options.get("patches", {}))
    return patched or any(base.__name__ in READ_BETWEEN for base in type(network).__mro__)
