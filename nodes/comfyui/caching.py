"""The feature cache on a MODEL: configuration on the patcher, features in the run, nothing on the module."""

from __future__ import annotations

import logging

from torch import Tensor

from ...qandc_core.caching.attach import cached_call
from ...qandc_core.caching.schedules import CacheConfig
from ...qandc_core.caching.state import FeatureCache
from .dit_model import is_dit
from .runs import REPORT, WRAPPERS, note, options_of_run, replace_wrapper, scalar, step_at

KEY = "qandc_cache"
log = logging.getLogger(__name__)


class CachedRun:
    """One sampling run: features by condition, and which steps computed."""

    def __init__(self, config: CacheConfig, sigmas: Tensor):
        self.cache = FeatureCache(config)
        self.sigmas = sigmas.tolist()
        self.steps: dict[int, bool] = {}

    def place(self, sigma: float, conditions: tuple) -> bool:
        """Begins a model call; returns whether it reuses."""
        step = step_at(self.sigmas, sigma)
        reuses = self.cache.place(step, conditions)
        self.steps[step] = self.steps.get(step, False) or not reuses
        return reuses

    def computed(self) -> list[bool]:
        return [self.steps.get(i, True) for i in range(len(self.sigmas) - 1)]

    def summary(self) -> str:
        computed = self.computed()
        return (
            f"Q&C cache: {sum(computed)} of {len(computed)} steps computed, {len(computed) - sum(computed)} reused, "
            f"{self.cache.num_bytes / 2**20:.1f} MiB"
        )


def conditions_of(transformer_options: dict, x: Tensor) -> tuple:
    """One key for each condition in the batch: what it is and the shape it is evaluated on."""
    return tuple((uuid, tuple(x.shape[1:])) for uuid in transformer_options.get("uuids", (None,)))


class RunWrapper:
    """OUTER_SAMPLE: the run's features live exactly as long as the run."""

    def __init__(self, config: CacheConfig):
        self.config = config

    def __call__(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        saved, options = guider.model_options, options_of_run(guider)
        run = options[KEY] = CachedRun(self.config, sigmas)
        try:
            out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            log.info(run.summary())
            return out
        finally:
            report = options.get(REPORT)
            if report is not None:
                report.computed, report.cache_bytes = run.computed(), run.cache.num_bytes
            run.cache.reset()
            guider.model_options = saved


def branch_wrapper(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
    """APPLY_MODEL for our DiT: attention and MLP outputs are reused before the gate (FORA, arXiv 2407.01425)."""
    run = transformer_options[KEY]
    run.place(scalar(t), conditions_of(transformer_options, x))
    with cached_call(executor.class_obj.diffusion_model, run.cache):
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def output_wrapper(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
    """APPLY_MODEL for any model: d = (x - denoised) / sigma is reused (Karras et al., arXiv 2206.00364, Alg. 2)."""
    run = transformer_options[KEY]
    reuses = run.place(scalar(t), conditions_of(transformer_options, x))
    sigma = t.float().view(-1, *[1] * (x.ndim - 1))
    if reuses:
        return x - run.cache.recall("derivative") * sigma
    out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    if run.cache.needs(run.cache.run.step):
        run.cache.store("derivative", (x - out) / sigma)
    return out


def apply_cache(patcher, config: CacheConfig):
    """A clone of the model that caches; interval 1 attaches nothing and takes off a cache that was there."""
    clone = patcher.clone()
    for kind in (WRAPPERS.OUTER_SAMPLE, WRAPPERS.APPLY_MODEL):
        clone.remove_wrappers_with_key(kind, KEY)
    if config.interval == 1 and config.steps is None:
        note(clone, "cache", "")
        return clone
    replace_wrapper(clone, WRAPPERS.OUTER_SAMPLE, KEY, RunWrapper(config))
    replace_wrapper(clone, WRAPPERS.APPLY_MODEL, KEY, branch_wrapper if is_dit(patcher) else output_wrapper)
    chosen = f"every {config.interval} steps" if config.steps is None else f"{len(config.steps)} chosen steps"
    note(clone, "cache", f"cache, {chosen}")
    return clone


def cache_config(patcher) -> CacheConfig | None:
    wrappers = patcher.get_wrappers(WRAPPERS.OUTER_SAMPLE, KEY)
    return wrappers[0].config if wrappers else None


def is_reused(transformer_options: dict) -> bool:
    """Whether the latest model call of the run came from the cache."""
    run = transformer_options.get(KEY)
    return run is not None and run.cache.run.reusing
