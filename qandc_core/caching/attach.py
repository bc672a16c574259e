"""Attaches a feature cache to a DiT, ours or diffusers', and takes it off again without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .features import CachedBranch, FeatureCache
from .schedule import CacheConfig, step_set

ATTRIBUTE = "feature_cache"


def branches(model: nn.Module, mode: str) -> list[tuple[Any, str, str]]:
    """(owner, attribute, name) of each callable that the mode caches."""
    blocks = getattr(model, "blocks", None)
    ours = blocks is not None
    blocks = blocks if ours else getattr(model, "transformer_blocks", None)
    if blocks is None:
        raise ValueError(
            f"{type(model).__name__} has neither blocks nor transformer_blocks; expected this package's DiT or "
            "diffusers' DiTTransformer2DModel."
        )
    found: list[tuple[Any, str, str]] = []
    for i, block in enumerate(blocks):
        if mode == "block":
            found.append((block, "forward", f"{i}.block"))
        elif ours:
            found += [(block, "attention_branch", f"{i}.attention"), (block, "mlp_branch", f"{i}.mlp")]
        else:
            found += [(block.attn1, "forward", f"{i}.attention"), (block.ff, "forward", f"{i}.mlp")]
    return found


def apply_cache_to_dit(
    model: nn.Module,
    cache_interval: int = 3,
    *,
    steps: Iterable[int] | None = None,
    mode: str = "branch",
    order: int = 0,
) -> nn.Module:
    """Caches features over timesteps (FORA, arXiv 2407.01425), in place; replaces a cache already there.

    `steps` lists the computed steps instead of every `cache_interval`-th; see CacheConfig for `mode` and `order`.
    """
    config = CacheConfig(cache_interval, step_set(steps), mode, order)
    own: Any = getattr(model, "set_cache", None)
    if own is not None:  # a FusedDiT, whose loop follows the configuration itself
        own(config)
        return model
    if mode == "prediction":
        raise ValueError("mode='prediction' needs our own DiT made ready by fuse_dit(); use 'branch' or 'block' here.")
    remove_cache(model)
    cache = FeatureCache(config, mode)
    wrap_branches(model, cache)
    cache.hook = model.register_forward_pre_hook(cache.before_forward, with_kwargs=True)
    setattr(model, ATTRIBUTE, cache)
    return model


def wrap_branches(model: nn.Module, cache: FeatureCache) -> None:
    for owner, attribute, name in branches(model, cache.mode):
        cache.attached.append((owner, attribute, vars(owner).get(attribute)))
        branch = CachedBranch(getattr(owner, attribute), name, cache, residual=cache.mode == "block")
        setattr(owner, attribute, branch)


def unwrap_branches(cache: FeatureCache) -> None:
    for owner, attribute, own in cache.attached:
        delattr(owner, attribute)
        if own is not None:
            setattr(owner, attribute, own)
    cache.attached.clear()


@contextmanager
def cached_call(model: nn.Module, cache: FeatureCache) -> Iterator[None]:
    """Caches for as long as the context lasts, for a host that shares the model: it calls cache.place() itself."""
    wrap_branches(model, cache)
    try:
        yield
    finally:
        unwrap_branches(cache)


def feature_cache(model: nn.Module) -> FeatureCache | None:
    return getattr(model, ATTRIBUTE, None)


def reset_all_caches(model: nn.Module) -> None:
    """Forgets the stored features of every cache in the model; call between runs of a hand-written loop."""
    for module in model.modules():
        cache = feature_cache(module)
        if cache is not None:
            cache.reset()


def remove_cache(model: nn.Module) -> nn.Module:
    """Takes the cache off; the model computes exactly what it did before."""
    own: Any = getattr(model, "set_cache", None)
    if own is not None:
        own(None)
    cache = feature_cache(model)
    if cache is not None:
        unwrap_branches(cache)
        cache.hook.remove()
        delattr(model, ATTRIBUTE)
    return model


@contextmanager
def cache_bypassed(model: nn.Module) -> Iterator[None]:
    """Every call computes everything and stores nothing, for as long as the context lasts."""
    cache = feature_cache(model)
    if cache is None:
        yield
        return
    enabled, cache.enabled = cache.enabled, False
    try:
        yield
    finally:
        cache.enabled = enabled
