"""A model's linear layers by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from .layouts import diffusers_names

DIT_SKIP = ("pos_embed", "norm")  # diffusers' names of a DiT's layers that stay in full precision


def named_linears(model: nn.Module, skip_patterns: Iterable[str] = ()) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers whose name, in diffusers' terms, contains none of the patterns."""
    patterns = tuple(skip_patterns)
    for name, module in model.named_modules():
        skipped = any(p in known for p in patterns for known in (name, *diffusers_names(name)))
        if isinstance(module, nn.Linear) and not skipped:
            yield name, module
