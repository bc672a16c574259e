"""The feature cache on a MODEL: configuration on the patcher, features in the run, nothing on the module."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ....qandc_core.caching.attach import cached_call, cached_modules
from ....qandc_core.caching.blocks import CachedBlocks, blocks_at, read_between
from ....qandc_core.caching.cost import reuse_cost
from ....qandc_core.caching.families import block_lists
from ....qandc_core.caching.features import FeatureCache
from ....qandc_core.numerics import relative_error
from ....qandc_core.sampling.clock import mark
from ....qandc_core.sampling.report import RunReport
from ..model.dit import DiTModel
from ..status import show
from ..wrappers import PRE_RUN, WRAPPERS, note, options_of_run, reports_of, samples_flow, without
from .calls import CACHE, COMPILE, keep_inside, nothing_between, state_of
from .others import other_caches
from .run import AUTOMATIC, BLOCKS, BRANCHES, LAST_BLOCK, PREDICTION, CacheSettings, ModelRun
from .words import cache_words

SELF_TEST = {2: 3e-2, 4: 1e-3}  # relative difference allowed, by bytes of a value
log = logging.getLogger(__name__)
running: ContextVar[tuple[RunWrapper, ...]] = ContextVar("running", default=())  # runs that have begun


class RunWrapper:
    """OUTER_SAMPLE: the run's features live exactly as long as the run."""

    def __init__(self, settings: CacheSettings):
        self.settings = settings

    def __call__(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider, mask = executor.class_obj, args[0] if args else kwargs.get("denoise_mask")
        flow = samples_flow(guider.model_patcher)
        with options_of_run(guider) as options:
            inside_compile(options)
            run = ModelRun(self.settings, sigmas, sampler, flow, mask, getattr(guider, "cfg", None))
            for text in (*self.settings.warnings, *other_caches(guider.model_patcher, guider.model_options)):
                run.warn(text)
            options[CACHE] = run
            keep_inside(options)
            keep_unconditional(guider.model_options, run)
            begun, ended = running.set((*running.get(), self)), "The run did not end."
            try:
                out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
                run.finish()
                ended = ""
                log.log(logging.WARNING if run.warnings else logging.INFO, run.summary())
                return out
            finally:
                show(self.settings.node, cache_words(run, ended))
                running.reset(begun)
                for report in reports_of(options):
                    fill_report(report, run)
                run.caches.clear()
                run.blocks.clear()


def keep_unconditional(model_options: dict[str, Any], run: ModelRun) -> None:
    """Samplers of the CFG++ kind also step along the unconditional prediction."""

    def look(args: dict[str, Any]) -> Tensor:
        run.unconditional = args.get("uncond_denoised")
        return args["denoised"]

    others = model_options.get("sampler_post_cfg_function", [])
    model_options["sampler_post_cfg_function"] = [look, *others]


def inside_compile(options: dict[str, Any]) -> None:
    """Lets compiled modules be in place when our wrapper runs, whichever node came first."""
    wrappers = options.get("wrappers", {}).get(WRAPPERS.APPLY_MODEL, {})
    if COMPILE in wrappers and CACHE in wrappers:
        wrappers[CACHE] = wrappers.pop(CACHE)


def fill_report(report: RunReport, run: ModelRun) -> None:
    report.computed, report.cache_bytes = run.computed(), run.peak_bytes
    report.timeline, report.not_visited = run.timeline, run.not_visited
    report.reuse = f"{run.reuse}, {run.reason}" if run.reason else run.reuse
    report.cache_speedup = run.times.speedup()
    report.warnings = [*report.warnings, *run.warnings]


def before_run(patcher) -> None:
    """ON_PRE_RUN: tells of a model whose own cache does not run, such as the second one of a guider with two models."""
    active = running.get()
    for wrapper in patcher.get_wrappers(WRAPPERS.OUTER_SAMPLE, CACHE):
        if wrapper not in active:
            own = wrapper.settings.describe()
            how = "with the cache of the guider's main model" if active else "without a cache"
            text = f"a model is sampled {how} instead of its own ({own}); apply the cache to the main model"
            log.warning("Q&C cache: %s", text)
            for report in reports_of(patcher.model_options["transformer_options"]):
                report.warnings = [*report.warnings, text]


@lru_cache(maxsize=1)
def warn_of_no_run() -> None:
    log.warning("Q&C cache: a model call outside a sampling run is computed; nothing is reused for it.")


def prediction_wrapper(executor, x, timestep, model_options, seed):
    """PREDICT_NOISE: every prediction of the sampler evaluates its conditions anew."""
    run = model_options["transformer_options"].get(CACHE)
    if run is None:
        return executor(x, timestep, model_options, seed)
    keep_inside(model_options["transformer_options"])
    run.look(x)
    run.begin_prediction(run.noise_level(timestep, x))
    out = executor(x, timestep, model_options, seed)
    run.end_prediction(out)
    unconditional, run.unconditional = run.unconditional, None
    run.keep_values(out, *(() if unconditional is None else (unconditional,)))
    return out


class ModelWrapper:
    """APPLY_MODEL: each call is computed, or made of what earlier ones kept."""

    def __init__(self, reuse: str):
        self.reuse = reuse

    def __call__(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        def call() -> Tensor:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

        run, model = transformer_options.get(CACHE), executor.class_obj
        if run is None:
            warn_of_no_run()
            return call()
        with run.lock:
            known, cache = self.placed(run, model, x, c_crossattn, control, transformer_options)
        begun = mark(x.device)
        try:
            out = CALLS[run.reuse](run, cache, model, transformer_options, call)
        except comfy.model_management.OOM_EXCEPTION:
            if not run.num_bytes:
                raise
            out = without_features(run, cache, x.device, call)
        with run.lock:
            run.times.add(begun, mark(x.device), cache.run.reusing)
            run.record(cache, known)
        return out

    def placed(self, run: ModelRun, model, x: Tensor, c_crossattn, control, transformer_options):
        """Identity of a call, and the cache of its network."""
        if not run.reuse:
            reuse, reason = choose_reuse(model, self.reuse)
            run.begin(reuse, reason, cost_of(model.diffusion_model, reuse))
        # A batch of two prompts may be padded to the longer, which blocks see and the prediction does not.
        tokens = tuple(c_crossattn.shape[1:]) if run.keeps_tokens and c_crossattn is not None else ()
        state = (*state_of(model, control, transformer_options), tokens)
        known = run.identify(x, conditions_of(transformer_options), state, nothing_between(transformer_options))
        return known, run.place(x, known, id(model))


def conditions_of(transformer_options: dict[str, Any]) -> list[tuple[Hashable, int]]:
    """Id and side of each condition in the batch; without an id where a pack called the model by itself."""
    sides = transformer_options.get("cond_or_uncond") or [0]
    ids = transformer_options.get("uuids") or [None] * len(sides)
    return list(zip(ids, sides))


def without_features(run: ModelRun, cache: FeatureCache, device: torch.device, call) -> Tensor:
    """After memory ran out on a device: frees what was kept there and computes."""
    run.drop(device)
    cache.run.reusing = False
    comfy.model_management.soft_empty_cache()
    run.warn("memory ran out: kept features were dropped and the step was computed")
    return call()


def reuse_prediction(run: ModelRun, cache: FeatureCache, model, transformer_options, call) -> Tensor:
    """Reuses or extrapolates the denoised sample, right for any sampler; with Euler as good as its derivative."""
    if cache.run.reusing and cache.holds("denoised"):
        return cache.recall("denoised").clone()
    cache.run.reusing = False  # features of blocks, kept before another device found that they cannot be reused
    out = call()
    if cache.needs(run.step):
        cache.store("denoised", out.float().clone())
    return out


def reuse_branches(run: ModelRun, cache: FeatureCache, model, transformer_options, call) -> Tensor:
    """Attention and MLP outputs of our DiT are reused before the gate (FORA, arXiv 2407.01425)."""
    with cached_call(model.diffusion_model, cache):
        return call()


def reuse_blocks(run: ModelRun, cache: FeatureCache, model, transformer_options, call) -> Tensor:
    """Reuses what the lists of blocks add to their streams, or what the last block of each returns (Spectrum, arXiv
    2603.01623); embedding and output layers compute.
    """
    network = model.diffusion_model
    if not cache.run.reusing and not cache.needs(run.step):
        return call()
    blocks = run.blocks.get(id(network))
    if blocks is None:
        blocks = run.blocks[id(network)] = CachedBlocks(
            network, read_between(network, transformer_options), last=run.reuse == LAST_BLOCK
        )
    with blocks.called(cache) as kept:
        out = call()
    if cache.run.reusing:
        return out
    kept.store(model.get_dtype_inference())
    if not run.tested:
        run.tested = True
        fault = kept.unlike and f"{kept.unlike} does not return its streams"
        fault = fault or self_test(blocks, cache, model, call, out)
        if fault:
            run.begin(PREDICTION, f"because blocks cannot be reused: {fault}")
            run.warn(run.reason)
            cache.drop()
            cache.store("denoised", out.float().clone())
    return out


def self_test(blocks: CachedBlocks, cache: FeatureCache, model, call, out: Tensor) -> str:
    """Reuses what was just computed on the same input: the result must be the same. Returns what is wrong."""
    cache.run.reusing = True
    try:
        with blocks.called(cache):
            again = call()
    finally:
        cache.run.reusing = False
    difference = relative_error(again, out)
    if difference <= SELF_TEST[min(4, model.get_dtype_inference().itemsize)]:
        return ""
    return f"the first step reused on itself differs by {difference:.2g}"


CALLS = {PREDICTION: reuse_prediction, BRANCHES: reuse_branches, BLOCKS: reuse_blocks, LAST_BLOCK: reuse_blocks}


def choose_reuse(model, wanted: str) -> tuple[str, str]:
    """Chooses what to reuse on this model, with the reason."""
    network: nn.Module = model.diffusion_model
    if hasattr(network, "_orig_mod"):  # torch.compile's wrapper, whose module takes seconds to import
        return PREDICTION, "because the whole model is compiled"
    if wanted == BRANCHES and not isinstance(model, DiTModel):
        return PREDICTION, "because attention and MLP can be reused separately on models of Load DiT only"
    if wanted in (BLOCKS, LAST_BLOCK) and not block_lists(network):
        return PREDICTION, f"because the blocks of {type(network).__name__} are not known"
    if wanted != AUTOMATIC:
        return wanted, "as chosen"
    return PREDICTION, "which measured best"


def cost_of(network: nn.Module, reuse: str) -> float:
    """Share of a computed step that a reused one takes, counted on the network."""
    if reuse == PREDICTION:
        return 0.0
    if reuse == BRANCHES:
        return reuse_cost(network, cached_modules(network, "branch"))
    return reuse_cost(network, [block for path in block_lists(network) for block in blocks_at(network, path)])


def apply_cache(patcher, settings: CacheSettings):
    """A clone of the model that caches; interval 1 attaches nothing and removes a cache that was there."""
    clone = without(patcher, CACHE)
    if settings.policy.off:
        note(clone, "cache", "")
        return clone
    clone.add_wrapper_with_key(WRAPPERS.OUTER_SAMPLE, CACHE, RunWrapper(settings))
    clone.add_wrapper_with_key(WRAPPERS.PREDICT_NOISE, CACHE, prediction_wrapper)
    clone.add_wrapper_with_key(WRAPPERS.APPLY_MODEL, CACHE, ModelWrapper(settings.reuse))
    clone.add_callback_with_key(PRE_RUN, CACHE, before_run)
    note(clone, "cache", settings.describe(), settings.detail())
    return clone


def steps_vary(patcher) -> bool:
    """True if its cache picks other steps for other images."""
    wrappers = patcher.get_wrappers(WRAPPERS.OUTER_SAMPLE, CACHE)
    return any(not wrapper.settings.policy.decided_before for wrapper in wrappers)


def is_reused(transformer_options: dict[str, Any]) -> bool:
    """True if the latest model call of the run came from the cache."""
    run = transformer_options.get(CACHE)
    return run is not None and run.reused
