"""The two passes of calibration under ComfyUI, as wrappers of a MODEL: every sample of the first is a candidate, and
model calls go through what observes the layers.
"""

from __future__ import annotations

from torch import Tensor

from ....qandc_core.caching.steps import step_at
from ....qandc_core.calibration.choice import Candidates, features_of
from ....qandc_core.calibration.layer_inputs import Watch
from ....qandc_core.compensation.correction import preserved_scale
from ..cache.attach import is_reused
from ..cache.calls import CACHE
from ..wrappers import is_flow, scalar


def condition_count(options: dict) -> int:
    """Number of conditions side by side in the batch of a model call."""
    return len(options.get("uuids", (None,)))


def is_self_test(options: dict) -> bool:
    """True if Apply Cache only repeats a call with its features, to verify that nothing changes."""
    run = options.get(CACHE)
    return run is not None and not run.reused and any(cache.run.reusing for cache in run.caches.values())


def is_reusing(options: dict) -> bool:
    """True while a model call runs that the cache makes of features; a call may be computed after all."""
    run = options.get(CACHE)
    return run is not None and run.reused and any(cache.run.reusing for cache in run.caches.values())


def is_counted(executor, model, options: dict) -> bool:
    """True for a call of the model itself: guiders may have a second model, and caches repeat a call."""
    return executor.class_obj is model and not is_self_test(options)


class Watching:
    """PREDICT_NOISE and APPLY_MODEL of a sampling run whose model calls go through the watch, if there is one."""

    def __init__(self, model, watch: Watch | None):
        self.model, self.watch = model, watch
        self.conditions = 0  # evaluated in the present prediction

    def predict_noise(self, executor, x, timestep, model_options, seed):
        self.conditions = 0
        if self.watch is not None:
            self.watch.next_prediction()
        return executor(x, timestep, model_options, seed)

    def apply_model(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        def call() -> Tensor:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

        if not is_counted(executor, self.model, transformer_options):
            return call()
        count = condition_count(transformer_options)
        self.conditions += count
        if self.watch is None:
            return call()
        given = {"c_concat": c_concat, "c_crossattn": c_crossattn, "control": control, **kwargs}
        return self.watch.called(call, x, t, given, count, lambda: is_reusing(transformer_options))


class Collecting(Watching):
    """The first pass: also notes every prediction of the model as candidates."""

    def __init__(self, candidates: Candidates, run: int, model, watch: Watch | None = None):
        super().__init__(model, watch)
        self.candidates, self.run, self.call = candidates, run, 0

    def predict_noise(self, executor, x, timestep, model_options, seed):
        options, sigma = model_options["transformer_options"], scalar(timestep)
        features = features_of(x * preserved_scale(sigma, is_flow(executor.class_obj.inner_model)))
        out = super().predict_noise(executor, x, timestep, model_options, seed)
        sigmas = options["sample_sigmas"]
        step = step_at(sigmas.tolist(), sigma)
        self.candidates.add(
            self.run, self.call, step, sigmas, features, out, self.conditions, computed=not is_reused(options)
        )
        self.call += 1
        return out
