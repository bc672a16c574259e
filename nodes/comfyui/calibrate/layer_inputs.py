"""The second pass of calibration under ComfyUI: model calls of a sampling run go through an observer."""

from __future__ import annotations

from torch import Tensor

from ....qandc_core.calibration.layer_inputs import Observer
from .candidates import condition_count, is_counted


class Observing:
    """PREDICT_NOISE and APPLY_MODEL of the second pass."""

    def __init__(self, observer: Observer, model):
        self.observer, self.model = observer, model

    def predict_noise(self, executor, x, timestep, model_options, seed):
        self.observer.next_prediction()
        return executor(x, timestep, model_options, seed)

    def apply_model(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        def call() -> Tensor:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

        if not is_counted(executor, self.model, transformer_options):
            return call()
        conditions = {"c_concat": c_concat, "c_crossattn": c_crossattn, "control": control, **kwargs}
        return self.observer.called(call, x, t, conditions, condition_count(transformer_options))
