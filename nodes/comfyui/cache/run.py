"""The settings of Apply Cache, and a run of a ComfyUI model with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ....qandc_core.caching.blocks import CachedBlocks
from ....qandc_core.caching.policies import CachePolicy
from ....qandc_core.caching.run import COMPUTED, SamplingRun
from ....qandc_core.sampling.clock import CallTimes
from ..wrappers import declares_noise, sampler_function_name

AUTOMATIC, PREDICTION, BLOCKS, BRANCHES = "automatic", "whole prediction", "blocks", "attention and MLP"
LAST_BLOCK = "last block"
FEWEST_VALUES = 64  # values of a sample that show whether noise was added
REUSE_OPTIONS = (AUTOMATIC, PREDICTION, BLOCKS, BRANCHES, LAST_BLOCK)


@dataclass(frozen=True)
class CacheSettings:
    """Settings of Apply Cache: when to reuse, what, where features are kept, warnings for every run, the node's id."""

    policy: CachePolicy
    reuse: str = AUTOMATIC
    offload: bool = False
    warnings: tuple[str, ...] = ()
    node: str | None = None

    def describe(self) -> str:
        return self.policy.describe()

    def detail(self) -> str:
        """All settings that change an image, in one line."""
        return self.policy.detail() + ("" if self.reuse == AUTOMATIC else f" {self.reuse}")


class ModelRun(SamplingRun):
    """A run on a model of ComfyUI: what of the model is reused, and how long its calls took."""

    def __init__(
        self,
        settings: CacheSettings,
        sigmas: Tensor,
        sampler: Any,
        flow: bool,
        mask: Tensor | None,
        cfg: float | None = None,
    ):
        name, levels = sampler_function_name(sampler), sigmas.tolist()
        self.noisy, self.mask = declares_noise(sampler), mask
        known = name.removeprefix("sample_")
        guided = None if cfg is None else cfg != 1
        facts: dict[str, Any] = {"sigmas": levels, "noisy": self.noisy, "sampler": known, "guided": guided}
        plan = settings.policy.plan(max(len(levels) - 1, 0), flow, **facts)
        super().__init__(plan, levels, known, name == "sample_heun", settings.offload)
        self.blocks: dict[int, CachedBlocks] = {}
        self.times = CallTimes()
        self.reuse, self.reason, self.tested, self.keeps_tokens = "", "", False, False
        self.forecasts = settings.reuse not in (BLOCKS, LAST_BLOCK, BRANCHES)
        self.unconditional: Tensor | None = None

    def begin(self, reuse: str, reason: str, cost: float = 0.0) -> None:
        """Sets what is reused, with the reason, and the cost relative to a computed step.

        Only extrapolated predictions suffer from noise that a sampler adds.
        """
        self.reuse, self.reason = reuse, reason
        self.plan.charge(cost)
        self.keeps_tokens = self.keeps_tokens or reuse != PREDICTION
        self.forecasts = reuse == PREDICTION
        if not self.forecasts:
            self.watch = None

    def look(self, x: Tensor) -> None:
        """Watches the sampler for noise where that matters; values that a mask sets by half say nothing of it."""
        if self.watch is not None or not self.forecasts or not self.plan.order:
            return
        free = None if self.mask is None else (self.mask.to(x.device) >= 1).expand(x.shape)
        if x.numel() < FEWEST_VALUES or (free is not None and int(free.sum()) < FEWEST_VALUES):
            self.forecasts = False
            if self.noisy:
                self.plan.order, self.plan.noisy = 0, True
            return
        self.watch_noise(x, free)

    def finish(self) -> None:
        """Warnings that only the whole run knows."""
        actions = self.actions()
        computed = {step for (_, step), column in self.columns.items() if actions[column] == COMPUTED}
        for text in self.plan.review(computed):
            self.warn(text)
        if self.lines and not self.reused_any and not self.plan.idle:
            self.warn(f"no effect: all {actions.count(COMPUTED)} steps were computed")

    def summary(self) -> str:
        speedup = self.times.speedup()
        fast = "" if speedup is None else f", model calls {speedup:.2f}x faster"
        return (
            f"Q&C cache ({self.reuse or 'no model call'}): {self.counts()}{fast}, {self.peak_bytes / 2**20:.1f} MiB"
            + "".join(f"; {text}" for text in self.warnings)
        )
