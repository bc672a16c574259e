"""The feature cache on a MODEL: configuration on the patcher, features in the run, nothing on the module."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ...qandc_core.caching.attach import cached_call
from ...qandc_core.caching.schedules import CachePolicy
from ...qandc_core.caching.state import FeatureCache
from .dit_model import is_dit
from .runs import REPORT, WRAPPERS, note, options_of_run, sampler_function_name, scalar, step_at

KEY = "qandc_cache"
log = logging.getLogger(__name__)


class CachedRun:
    """One sampling run: features by condition, for each device, and which steps computed."""

    def __init__(self, policy: CachePolicy, sigmas: Tensor, sampler_name: str = ""):
        self.sigmas = sigmas.tolist()
        self.config = policy.resolve(len(self.sigmas) - 1)
        self.corrects = sampler_name == "sample_heun"
        self.caches: dict[torch.device, FeatureCache] = {}
        self.passes: Counter[Hashable] = Counter()
        self.visits: Counter[int] = Counter()
        self.steps: dict[int, bool] = {}
        self.step = 0
        self.reused = False

    def begin_prediction(self, sigma: float) -> None:
        """The sampler asks for a prediction at sigma. Heun's first one at a noise level corrects the step before."""
        at = step_at(self.sigmas, sigma)
        self.step = at - 1 if self.corrects and at and not self.visits[at] else at
        self.visits[at] += 1
        self.passes.clear()

    def place(self, x: Tensor, transformer_options: dict[str, Any]) -> FeatureCache:
        """Begins a model call; the cache answers whether it reuses."""
        cache = self.caches.setdefault(x.device, FeatureCache(self.config))
        self.reused = cache.place(self.step, self.conditions(x, transformer_options))
        self.steps[self.step] = self.steps.get(self.step, False) or not self.reused
        return cache

    def conditions(self, x: Tensor, transformer_options: dict[str, Any]) -> tuple[Hashable, ...]:
        """One key for each condition in the batch: which one, on what, and the how-manieth time in this prediction.

        Guidance such as skip-layer evaluates a condition again, and context windows evaluate it on every window.
        """
        window = transformer_options.get("context_window")
        place = (x.device, tuple(x.shape[1:]), () if window is None else tuple(window.index_list))
        keys = []
        # Core gives a negative that it makes for an area the uuid of the positive.
        sides = transformer_options.get("cond_or_uncond", (0,))
        for condition in zip(transformer_options.get("uuids", (None,) * len(sides)), sides):
            keys.append((condition, place, self.passes[condition, place]))
            self.passes[condition, place] += 1
        return tuple(keys)

    def computed(self) -> list[bool]:
        return [self.steps.get(i, True) for i in range(len(self.sigmas) - 1)]

    @property
    def num_bytes(self) -> int:
        return sum(cache.num_bytes for cache in self.caches.values())

    def summary(self) -> str:
        computed = self.computed()
        return (
            f"Q&C cache: {sum(computed)} of {len(computed)} steps computed, {len(computed) - sum(computed)} reused, "
            f"{self.num_bytes / 2**20:.1f} MiB"
        )


class RunWrapper:
    """OUTER_SAMPLE: the run's features live exactly as long as the run."""

    def __init__(self, policy: CachePolicy):
        self.policy = policy

    def __call__(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        saved, options = guider.model_options, options_of_run(guider)
        run = options[KEY] = CachedRun(self.policy, sigmas, sampler_function_name(sampler))
        try:
            out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            log.info(run.summary())
            return out
        finally:
            report = options.get(REPORT)
            if report is not None:
                report.computed, report.cache_bytes = run.computed(), run.num_bytes
            run.caches.clear()
            guider.model_options = saved


def prediction_wrapper(executor, x, timestep, model_options, seed):
    """PREDICT_NOISE: every prediction of the sampler evaluates its conditions anew."""
    model_options["transformer_options"][KEY].begin_prediction(scalar(timestep))
    return executor(x, timestep, model_options, seed)


def branch_wrapper(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
    """APPLY_MODEL for our DiT: attention and MLP outputs are reused before the gate (FORA, arXiv 2407.01425)."""
    cache = transformer_options[KEY].place(x, transformer_options)
    with cached_call(executor.class_obj.diffusion_model, cache):
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def output_wrapper(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
    """APPLY_MODEL for any model: d = (x - denoised) / sigma is reused (Karras et al., arXiv 2206.00364, Alg. 2)."""
    cache = transformer_options[KEY].place(x, transformer_options)
    sigma = t.float().view(-1, *[1] * (x.ndim - 1))
    if cache.run.reusing:
        return x - cache.recall("derivative") * sigma
    out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    if cache.needs(cache.run.step):
        cache.store("derivative", (x - out) / sigma)
    return out


def apply_cache(patcher, policy: CachePolicy):
    """A clone of the model that caches; interval 1 attaches nothing and takes off a cache that was there."""
    clone = patcher.clone()
    for kind in (WRAPPERS.OUTER_SAMPLE, WRAPPERS.PREDICT_NOISE, WRAPPERS.APPLY_MODEL):
        clone.remove_wrappers_with_key(kind, KEY)
    if policy.off:
        note(clone, "cache", "")
        return clone
    clone.add_wrapper_with_key(WRAPPERS.OUTER_SAMPLE, KEY, RunWrapper(policy))
    clone.add_wrapper_with_key(WRAPPERS.PREDICT_NOISE, KEY, prediction_wrapper)
    clone.add_wrapper_with_key(WRAPPERS.APPLY_MODEL, KEY, branch_wrapper if is_dit(patcher) else output_wrapper)
    note(clone, "cache", policy.describe(), policy.detail())
    return clone


def is_reused(transformer_options: dict[str, Any]) -> bool:
    """Whether the latest model call of the run came from the cache."""
    run = transformer_options.get(KEY)
    return run is not None and run.reused
