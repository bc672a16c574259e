"""Attaches a feature cache to a DiT, ours or diffusers', and removes it again without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .blocks import CachedStreams
from .cost import reuse_cost
from .families import BRANCHED, DIFFUSERS, diffusers_lists
from .features import CachedBranch, FeatureCache
from .policies import CachePolicy, ChosenSteps, Interval
from .schedule import CacheConfig, check_reuse

ATTRIBUTE = "feature_cache"


@dataclass(frozen=True)
class PolicyConfig:
    """A policy and what it reuses, for an engine that learns the number of steps with each run.

    `reuse` "branch" keeps attention and MLP outputs before the gate (FORA), "block" what each block adds, "prediction"
    the predicted clean image, which needs a FusedDiT: only its loop sees predictions.
    """

    policy: CachePolicy
    reuse: str = "branch"

    def __post_init__(self) -> None:
        check_reuse(self.reuse)

    @property
    def order(self) -> int:
        return self.policy.order

    def computes(self, step: int) -> bool:
        raise ValueError(
            f"{type(self.policy).__name__} needs the number of steps: sample with generate(), or give num_steps to "
            "apply_cache_to_dit."
        )

    keeps = computes

    def for_run(self, total: int, cost: float = 0.0, sampler: str = "") -> CacheConfig:
        """Raises ValueError where the steps are decided during the run."""
        if not self.policy.decided_before:
            raise ValueError(
                f"{type(self.policy).__name__} decides each step during the run, but this loop fixes all steps before "
                "it; use another policy, such as Speedup."
            )
        plan = self.policy.plan(total, cost=cost, sampler=sampler)
        return CacheConfig(steps=frozenset(plan.steps), reuse=self.reuse, order=plan.order)


def is_ours(blocks: Any) -> bool:
    return all(hasattr(block, "attention_branch") and hasattr(block, "mlp_branch") for block in blocks)


def is_branched(model: nn.Module) -> bool:
    """True if attention and MLP are separate modules of this model of diffusers."""
    return any(base.__name__ in BRANCHED for base in type(model).__mro__)


def default_reuse(model: nn.Module) -> str:
    """Attention and MLP where they are separate modules, else whole blocks."""
    return "branch" if not diffusers_lists(model) or is_branched(model) else "block"


def branches(model: nn.Module, reuse: str) -> list[tuple[Any, str, str]]:
    """(owner, attribute, name) of each callable whose output is reused; raises ValueError on other models."""
    lists, name = diffusers_lists(model), type(model).__name__
    blocks: Any = getattr(model, "blocks", None)
    if not lists and blocks is not None and is_ours(blocks):
        if reuse == "block":
            return [(block, "forward", f"{i}.block") for i, block in enumerate(blocks)]
        kinds = (("attention_branch", "attention"), ("mlp_branch", "mlp"))
        return [(block, at, f"{i}.{kind}") for i, block in enumerate(blocks) for at, kind in kinds]
    if not lists:
        none = blocks is None and getattr(model, "transformer_blocks", None) is None
        wrong = f"{name} has neither blocks nor transformer_blocks" if none else f"The blocks of {name} are not known"
        raise ValueError(f"{wrong}; expected this package's DiT or one of diffusers' {', '.join(DIFFUSERS)}.")
    if reuse == "block":
        found: list[tuple[str, Any]] = [(path, model.get_submodule(path)) for path in lists]
        return [(block, "forward", f"{path}.{i}") for path, list_ in found for i, block in enumerate(list_)]
    if not is_branched(model):
        raise ValueError(f"reuse='branch' cannot tell attention and MLP of {name} apart; use reuse='block'.")
    inside, blocks = (("attn1", "attention"), ("ff", "mlp")), model.transformer_blocks
    return [
        (getattr(block, owner), "forward", f"{i}.{kind}") for i, block in enumerate(blocks) for owner, kind in inside
    ]


def apply_cache_to_dit(
    model: nn.Module,
    cache_interval: int | CachePolicy | None = None,
    *,
    steps: Iterable[int] | None = None,
    reuse: str | None = None,
    order: int | None = None,
    num_steps: int | None = None,
    mode: str | None = None,
) -> nn.Module:
    """Caches features over timesteps (FORA, arXiv 2407.01425), in place; replaces a cache already there.

    `model` is our DiT or a transformer of diffusers (DiT, PixArt, Flux, SD3, Wan, CogVideoX). The second argument is an
    interval (None: that of Interval()) or a policy: apply_cache_to_dit(model, Speedup(2)). `steps`, given in its place,
    lists the computed steps; see PolicyConfig for `reuse` (default "branch" where attention and MLP are separate
    modules, else "block"). A policy holds its `order` itself. `mode` is the former name of `reuse`.
    generate() tells a policy the steps of a run; a loop of your own gives them as `num_steps`.
    A call reuses only what provably belongs to its own run (`calls`); fresh_caches says so outright.
    Raises ValueError, and changes nothing, on other models and settings.
    """
    if reuse is not None and mode is not None:
        raise ValueError("`mode` is the former name of `reuse`; give `reuse` alone.")
    config = PolicyConfig(policy_of(cache_interval, steps, order), reuse or mode or default_reuse(model))
    own: Any = getattr(model, "set_cache", None)
    if own is not None:  # a FusedDiT, whose loop follows the configuration itself
        own(config)
        return model
    if config.reuse == "prediction":
        raise ValueError("reuse='prediction' needs our own DiT made ready by fuse_dit(); use 'branch' or 'block' here.")
    cost = reuse_cost(model, cached_modules(model, config.reuse))
    remove_cache(model)
    cache = FeatureCache(config_of(config, num_steps, cost), config.reuse)
    cache.policy, cache.cost = config.policy, cost
    wrap_branches(model, cache)
    cache.hooks = [
        model.register_forward_pre_hook(cache.before_forward, with_kwargs=True),
        model.register_forward_hook(cache.after_forward, with_kwargs=True),
    ]
    setattr(model, ATTRIBUTE, cache)
    return model


def policy_of(interval: int | CachePolicy | None, steps: Iterable[int] | None, order: int | None) -> CachePolicy:
    """The policy that the arguments of apply_cache_to_dit stand for. Raises ValueError on two that say which steps."""
    if isinstance(interval, CachePolicy):
        if steps is not None or order is not None:
            raise ValueError("A policy holds steps and order itself; omit `steps` and `order`.")
        return interval
    if interval is not None and steps is not None:
        raise ValueError("`cache_interval` and `steps` both say which steps compute; give one of them.")
    if steps is not None:
        return ChosenSteps(frozenset(steps), order=order or 0)
    return Interval(order=order or 0) if interval is None else Interval(interval, order=order or 0)


def config_of(config: PolicyConfig, num_steps: int | None, cost: float) -> CacheConfig | PolicyConfig:
    """The steps where they are known by now; else the policy, which answers once a run has told it its steps."""
    policy = config.policy
    if num_steps is not None:
        return config.for_run(num_steps, cost)
    if (policy.start, policy.end) == (0, 1) and isinstance(policy, Interval):
        return CacheConfig(policy.interval, reuse=config.reuse, order=policy.order)
    if (policy.start, policy.end) == (0, 1) and isinstance(policy, ChosenSteps):
        return CacheConfig(steps=policy.steps, reuse=config.reuse, order=policy.order)
    return config


def cached_modules(model: nn.Module, reuse: str) -> list[nn.Module]:
    """The modules whose work a reused step leaves out."""
    inside = {"attention_branch": "attn", "mlp_branch": "mlp"}
    return [getattr(owner, inside.get(attribute, ""), owner) for owner, attribute, _ in branches(model, reuse)]


def wrap_branches(model: nn.Module, cache: FeatureCache) -> None:
    lists = diffusers_lists(model) if cache.reuse == "block" else {}
    for owner, attribute, name in branches(model, cache.reuse):
        streams = lists.get(name.rpartition(".")[0])
        cache.attached.append((owner, attribute, vars(owner).get(attribute)))
        function: Any = getattr(owner, attribute)
        if streams is None:
            branch: Any = CachedBranch(function, name, cache, residual=cache.reuse == "block")
        else:
            branch = CachedStreams(function, type(owner), name, cache, streams)
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


@contextmanager
def fresh_caches(model: nn.Module) -> Iterator[None]:
    """One run of a hand-written loop: it begins without features, and leaves none, however it ends."""
    reset_all_caches(model)
    try:
        yield
    finally:
        reset_all_caches(model)


def remove_cache(model: nn.Module) -> nn.Module:
    """Removes the cache; the model computes exactly what it did before."""
    own: Any = getattr(model, "set_cache", None)
    if own is not None:
        own(None)
    cache = feature_cache(model)
    if cache is not None:
        unwrap_branches(cache)
        for hook in cache.hooks:
            hook.remove()
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
