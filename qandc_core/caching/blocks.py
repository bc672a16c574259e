"""Reuse at the level of transformer blocks: what the blocks of a list add to their streams is kept and added again.

A block takes a stream of tokens, or one for text and one for the image, and returns them changed. Consecutive steps
change them alike, so on a reused step the first block of a list adds what the whole list added, and the others hand
their streams on; embeddings, modulation of the output and the output layer compute with the present input. That is
closer to the present step than a reused prediction, and costs more: the layers outside the lists run at every step.

While the network is called, `forward` of each block is replaced and then put back, so nothing stays on the module and
compiled blocks stay compiled. What is kept is one tensor for each stream of a list (in the network's type, per
condition), where blocks of their own parts (`each`) keep one for each block. The sums are taken in float32: in half
precision the sum of 60 small differences would be rounded 60 times.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from .families import READ_BETWEEN, Streams, block_lists
from .features import FeatureCache


@lru_cache(maxsize=256)
def parameter_positions(block: type[nn.Module]) -> dict[str, int]:
    names = list(inspect.signature(block.forward).parameters)[1:]
    return {name: position for position, name in enumerate(names)}


def stream_arguments(block: type[nn.Module], streams: Streams, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    positions = parameter_positions(cast(Any, block))
    return [
        args[name] if isinstance(name, int) else kwargs[name] if name in kwargs else args[positions[name]]
        for name in streams
    ]


@dataclass
class BlockCall:
    """One call of the network: what its blocks add, summed, or which sums were added already."""

    cache: FeatureCache
    last: bool = False  # keeps what the last block returns, whatever the stream was before
    sums: dict[str, list[Tensor | None]] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)
    unlike: str = ""  # the block whose outputs are not its streams

    def accumulate(self, part: str, before: list[Tensor | None], after: list[Tensor | None]) -> None:
        """Sums over the blocks in float32: what they add together is what the list adds, whatever a ControlNet adds."""
        if [shape(stream) for stream in before] != [shape(a) or shape(b) for a, b in zip(after, before)]:
            self.unlike = part
            return
        if self.last:
            self.sums[part] = [None if a is None else a.float().clone() for a in after]
            return
        deltas = [None if a is None or b is None else a.float() - b for a, b in zip(after, before)]
        sums = self.sums.get(part)
        self.sums[part] = (
            deltas
            if sums is None
            else [s if d is None else d if s is None else s.add_(d) for s, d in zip(sums, deltas)]
        )

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
        kept = self.cache.recall(name).to(stream.dtype)
        return kept.clone() if self.last else stream + kept  # what follows may work in place


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
        values = stream_arguments(
            cast(Any, type(getattr(self.block, "_orig_mod", self.block))), self.streams, args, kwargs
        )
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
    """The blocks of one network. With `each`, every block keeps its own part instead of one for each list; with `last`
    what the last block returns is kept instead of the sum of what all add.
    """

    def __init__(self, network: nn.Module, each: bool, last: bool = False):
        self.last = last
        self.blocks = [
            CachedBlock(block, f"{path}.{i}" if each else path, streams)
            for path, streams in block_lists(network).items()
            for i, block in enumerate(blocks_at(network, path))
        ]

    @contextmanager
    def called(self, cache: FeatureCache) -> Iterator[BlockCall]:
        """For one call of the network."""
        call = BlockCall(cache, self.last)
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
    found: Any = network.get_submodule(path)
    return list(found.values() if isinstance(found, nn.ModuleDict) else found)


def read_between(network: nn.Module, transformer_options: dict[str, Any]) -> bool:
    """True if something reads the streams between blocks, so that the sum of a list may not be added at once."""
    patched = any("block" in kind for kind in transformer_options.get("patches", {}))
    return patched or any(base.__name__ in READ_BETWEEN for base in type(network).__mro__)


class CachedStreams:
    """The forward of one block whose streams are `streams`; on a reused step it adds what it added when it ran."""

    def __init__(self, function: Any, block: type[nn.Module], name: str, cache: FeatureCache, streams: Streams):
        self.function, self.block, self.name, self.cache, self.streams = function, block, name, cache, streams

    def __call__(self, *args, **kwargs):
        cache = self.cache
        if not cache.enabled:
            return self.function(*args, **kwargs)
        before = stream_arguments(self.block, self.streams, args, kwargs)
        if cache.run.reusing:
            after = [self.moved(i, stream) for i, stream in enumerate(before)]
            return after[0] if len(after) == 1 else tuple(after)
        kept = [None if stream is None else stream.clone() for stream in before] if cache.needs(cache.run.step) else []
        out = self.function(*args, **kwargs)
        for i, (new, old) in enumerate(zip(out if isinstance(out, tuple) else (out,), kept)):
            if new is not None and old is not None:
                cache.store(f"{self.name}/{i}", new - old)
        return out

    def moved(self, i: int, stream: Tensor | None) -> Tensor | None:
        """A stream that the block did not return is none."""
        name = f"{self.name}/{i}"
        return stream + self.cache.recall(name) if stream is not None and self.cache.holds(name) else None
