"""One sampling run under a cache: where it stands, whose features are kept, and what was computed or reused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ....qandc_core.caching.features import FeatureCache
from ....qandc_core.caching.policies import CachePolicy
from ....qandc_core.sampling.clock import CallTimes
from ..wrappers import step_at
from .blocks import CachedBlocks

PREDICTION = "whole prediction"
NOISY = ("ddpm", "ancestral", "sde", "lcm", "seeds", "sa_solver")  # in the names of samplers that add noise
COMPUTED, HELD, FORECAST, ABSENT = "C", "R", "F", "."
SIDES = {0: "positive", 1: "negative"}


class CachedRun:
    """Features by condition, for each device; steps by noise level; nothing outlives the run."""

    def __init__(
        self, policy: CachePolicy, sigmas: Tensor, sampler_name: str = "", flow: bool = False, offload: bool = False
    ):
        self.sigmas = sigmas.tolist()
        self.total = len(self.sigmas) - 1
        self.plan = policy.plan(self.total, flow, sigmas=self.sigmas, noisy=adds_noise(sampler_name))
        self.offload = offload
        self.sampler_name, self.corrects = sampler_name, sampler_name == "sample_heun"
        self.caches: dict[torch.device, FeatureCache] = {}
        self.blocks: dict[int, CachedBlocks] = {}
        self.passes: Counter[Hashable] = Counter()
        self.visits: Counter[int] = Counter()
        self.begun: set[int] = set()
        self.timeline: dict[str, list[str]] = {}
        self.names: dict[Hashable, str] = {}
        self.times = CallTimes()
        self.warnings: list[str] = []
        self.tier, self.reason, self.tested, self.keeps_tokens = "", "", False, False
        self.step, self.position, self.peak_bytes = 0, 0.0, 0
        self.reused = self.computed_any = False

    def begin(self, tier: str, reason: str, cost: float = 0.0) -> None:
        """What is reused is known now, and what share of a computed step it costs.

        A forecast of whole predictions does not see the noise that a sampler adds.
        """
        self.tier, self.reason = tier, reason
        self.plan.charge(cost)
        self.keeps_tokens = self.keeps_tokens or tier != PREDICTION
        if tier == PREDICTION and self.plan.order and adds_noise(self.sampler_name):
            self.plan.order = 0
            self.warn(f"held instead of forecast: {self.sampler_name.removeprefix('sample_')} adds noise")

    def begin_prediction(self, sigma: float) -> None:
        """The sampler asks for a prediction at sigma. Heun's first one at a noise level corrects the step before."""
        at = step_at(self.sigmas, sigma)
        self.step = at - 1 if self.corrects and at and not self.visits[at] else at
        self.position = at + fraction(self.sigmas, at, sigma)
        if self.step not in self.begun:
            self.begun.add(self.step)
            self.plan.begin(self.step, self.position, sigma, self.sigmas[min(self.step + 1, self.total)])
        self.visits[at] += 1
        self.passes.clear()
        self.computed_any = False

    def place(self, x: Tensor, transformer_options: dict[str, Any], state: tuple) -> FeatureCache:
        """Begins a model call; the cache answers whether it reuses."""
        home = x.device if self.offload else None
        cache = self.caches.setdefault(x.device, FeatureCache(self.plan, offloaded_from=home))
        conditions = self.conditions(x, transformer_options, state)
        self.reused = cache.place(self.step, conditions, self.position)
        return cache

    def conditions(self, x: Tensor, transformer_options: dict[str, Any], state: tuple) -> tuple[Hashable, ...]:
        """One key for each condition in the batch: which one, on what, and the how-manieth time in this prediction.

        Guidance such as skip-layer evaluates a condition again, and context windows evaluate it on every window.
        """
        window = transformer_options.get("context_window")
        place = (x.device, tuple(x.shape[1:]), () if window is None else tuple(window.index_list), state)
        keys = []
        # Core gives a negative that it makes for an area the uuid of the positive.
        sides = transformer_options.get("cond_or_uncond", (0,))
        for condition in zip(transformer_options.get("uuids", (None,) * len(sides)), sides):
            keys.append((condition, place, self.passes[condition, place[:-1]]))
            self.passes[condition, place[:-1]] += 1
        return tuple(keys)

    def record(self, cache: FeatureCache, begun, ended) -> None:
        """A model call has ended; it may have computed after all what it was to reuse."""
        self.reused = cache.run.reusing
        self.computed_any = self.computed_any or not self.reused
        self.times.add(begun, ended, self.reused)
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        for key in cache.run.conditions:
            line = self.timeline.setdefault(self.name(key), [ABSENT] * self.total)
            if self.step < self.total and line[self.step] != COMPUTED:
                line[self.step] = self.action(cache)

    def action(self, cache: FeatureCache) -> str:
        if not cache.run.reusing:
            return COMPUTED
        return FORECAST if cache.forecasts else HELD

    def name(self, key: Hashable) -> str:
        """positive, negative, or with a number where a side has several areas, windows or passes."""
        (_, side), (_, shape, window, _), ordinal = key
        known = (key[0], shape, window, ordinal)
        if known not in self.names:
            base = SIDES.get(side, f"condition {side + 1}")
            others = sum(name.split(" #")[0] == base for name in self.names.values())
            self.names[known] = base if not others else f"{base} #{others + 1}"
        return self.names[known]

    def end_prediction(self, denoised: Tensor) -> None:
        """What guidance made of the computed predictions."""
        if self.computed_any:
            self.plan.observe(self.position, denoised)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def drop(self) -> None:
        for cache in self.caches.values():
            cache.drop()

    def computed(self) -> list[bool]:
        """Whether a step computed for any condition; a step that the sampler passed over did not reuse."""
        columns = zip(*self.timeline.values()) if self.timeline else (() for _ in range(self.total))
        return [COMPUTED in column or not {HELD, FORECAST} & set(column) for column in columns]

    @property
    def num_bytes(self) -> int:
        return sum(cache.num_bytes for cache in self.caches.values())

    def finish(self) -> None:
        """Warnings that only the whole run knows."""
        columns = enumerate(zip(*self.timeline.values()))
        for text in self.plan.review({step for step, column in columns if COMPUTED in column}):
            self.warn(text)
        if self.timeline and all(self.computed()):
            self.warn(f"no effect: all {self.total} steps were computed")

    def summary(self) -> str:
        computed, speedup = self.computed(), self.times.speedup()
        fast = "" if speedup is None else f", model calls {speedup:.2f}x faster"
        return (
            f"Q&C cache ({self.tier or 'no model call'}): {sum(computed)} of {len(computed)} steps computed, "
            f"{len(computed) - sum(computed)} reused{fast}, {self.peak_bytes / 2**20:.1f} MiB"
            + "".join(f"; {text}" for text in self.warnings)
        )


def adds_noise(sampler_name: str) -> bool:
    return any(part in sampler_name for part in NOISY)


def fraction(sigmas: list[float], at: int, sigma: float) -> float:
    """How far an evaluation within step `at` lies towards the next, by noise level."""
    begin, end = sigmas[at], sigmas[min(at + 1, len(sigmas) - 1)]
    return min(max((begin - sigma) / (begin - end), 0.0), 1.0) if begin > end else 0.0
