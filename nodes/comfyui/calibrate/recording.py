"""Any sampler's runs on a MODEL, recorded into a calibration file while they go by.

What a node attaches is configuration: the file, what is kept, the model's fingerprint. A run's recorder is made in
OUTER_SAMPLE and found in the options of that run alone, so several samplers and both experts of a model each have their
own; it is freed however the run ends, and only a run that ended well is added. A guider with two models samples both
under the wrappers of its main one, so the main one's node records the other one too where that has a node.

Bringing gigabytes of statistics to the CPU, merging and writing them takes seconds, so a thread does it while the image
is decoded and the next run begins. That run waits for it before it keeps anything of its own: memory holds one run's
statistics. The run itself waits for a twentieth of its own time at most, and where the device has less memory left than
the statistics take, until they have left it.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ....qandc_core.calibration.growth import RunSchedule, add_run, check_recording
from ....qandc_core.calibration.recorder import Recorder, RecordingConfig, RunRecord
from ....qandc_core.sampling.clock import Stopwatch
from ..cache.calls import CACHE, COMPILE
from ..cache.others import other_caches
from ..quantize.layers import calibrated, check_not_quantized
from ..status import show
from ..wrappers import PRE_RUN, WRAPPERS, declares_noise, options_of_run, repeated, sampler_function_name, without

RECORDING = "qandc_recording"
log = logging.getLogger(__name__)
WAIT = 0.05  # of its own time, for which a run waits until it is added
adding = ThreadPoolExecutor(1, "qandc-recording")  # one run after the other
recording_now: ContextVar[tuple[RunRecorder, ...]] = ContextVar("recording_now", default=())  # runs that have begun


@dataclass(frozen=True)
class RunRecorder:
    """The wrapper of Calibrate from Runs: OUTER_SAMPLE of every run."""

    path: Path
    config: RecordingConfig
    fingerprint: str
    node_id: str | None = None

    def check(self, patcher) -> None:
        """Raises ValueError in one sentence where runs of this model cannot be added to the file."""
        network = patcher.model.diffusion_model
        check_not_quantized(network)
        if is_compiled(patcher):
            raise ValueError(
                "The layer inputs of a compiled model cannot be recorded; remove torch.compile, or set record to off."
            )
        layers = calibrated(network)
        if not layers:
            raise ValueError(
                "This model has no linear layer of ComfyUI's within blocks, so there is nothing to calibrate."
            )
        self.config.plan([layer.in_features for _, layer in layers])
        if not self.path.is_file():
            settle()  # it may be about to appear
        check_recording(self.path, self.fingerprint, self.config)

    def __call__(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        if len(sigmas) < 2 or repeated.get() is not None:  # no step, or one that Compare only times
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        runs = [RecordedRun(self, guider.model_patcher, len(sigmas) - 1)]
        runs += [RecordedRun(node, patcher, len(sigmas) - 1) for node, patcher in others_recorded(guider)]
        for run in runs:
            run.node.check(run.patcher)
        with options_of_run(guider) as options:
            caches = CACHE in options.get("wrappers", {}).get(WRAPPERS.OUTER_SAMPLE, {}) or bool(
                other_caches(guider.model_patcher, guider.model_options)
            )
            name = sampler_function_name(sampler).removeprefix("sample_")
            schedule = RunSchedule(sigmas.tolist(), name, declares_noise(sampler), not caches)
            options[RECORDING] = runs
            keep_innermost(options)
            begun = recording_now.set((*recording_now.get(), *(run.node for run in runs)))
            watch = Stopwatch()
            try:
                out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
                deadline = watch.seconds() * (1 + WAIT)
                for run in runs:
                    if run.recorder.strata is not None:  # at a CFG of 1 a guider leaves its second model out
                        run.node.end(run.recorder, schedule, run.patcher.load_device, deadline - watch.seconds())
                return out
            finally:
                recording_now.reset(begun)
                for run in runs:
                    run.recorder.close()

    def end(self, recorder: Recorder, schedule: RunSchedule, device: torch.device, seconds: float) -> None:
        """Has a run added that ended well, and waits some seconds for it; what it adds is measured on the device."""
        size = recorder.num_bytes
        record: Future[RunRecord] = adding.submit(recorder.taken().result)
        # With the context of the run, which says whose words the node shows if the job has ended by then.
        done = adding.submit(copy_context().run, self.add, record, schedule, device)
        if size > mm.get_free_memory(device):
            wait([record])
        if wait([done], max(0.0, seconds)).done:
            done.result()

    def add(self, record: Future[RunRecord], schedule: RunSchedule, device: torch.device) -> None:
        """Adds the run; where that fails, the image is still there and the file is unchanged."""
        try:
            found = add_run(self.path, self.fingerprint, record.result(), schedule, self.config, device)
            self.say(found.describe())
        except (ValueError, OSError, RuntimeError) as error:
            self.say(f"this run was not added, {error}", logging.WARNING)

    def say(self, text: str, level: int = logging.INFO) -> None:
        log.log(level, "Q&C calibration: %s: %s", self.path.name, text)
        show(self.node_id, f"{self.path.name}: {text}")


def settle() -> None:
    """Waits until every run that has ended is added."""
    adding.submit(lambda: None).result()


class RecordedRun:
    """One sampling run of one model: the node, the recorder, and the networks whose calls are of this model."""

    def __init__(self, node: RunRecorder, patcher, steps: int):
        self.node, self.patcher, self.recorder = node, patcher, Recorder(node.config, steps)
        clones = patcher.get_additional_models_with_key("multigpu")
        self.models = [patcher.model, *(clone.model for clone in clones)]


def others_recorded(guider) -> list[tuple[RunRecorder, Any]]:
    """Models of a guider beside its main one, with weights and a node of their own."""
    found, seen = [], [guider.model_patcher.model]
    for patcher in vars(guider).values():
        model = getattr(patcher, "model", None)
        if not isinstance(patcher, ModelPatcher) or any(model is known for known in seen):
            continue
        seen.append(model)
        found += [(node, patcher) for node in patcher.get_wrappers(WRAPPERS.OUTER_SAMPLE, RECORDING)]
    return found


def run_of(options: dict[str, Any], model) -> RecordedRun | None:
    """The run that calls of this model belong to."""
    runs = options.get(RECORDING, ())
    return next((run for run in runs if any(model is known for known in run.models)), None)


def reuses_blocks(options: dict[str, Any], model, device: torch.device) -> bool:
    """True while Apply Cache reuses blocks in this call, or tests whether it could."""
    run = options.get(CACHE)
    cache = None if run is None else run.caches.get((device, id(model)))
    return cache is not None and cache.run.reusing


def layers_of(model) -> list[tuple[str, nn.Module]]:
    """The layers to observe, once the run before is added and its memory is free."""
    settle()
    return calibrated(model.diffusion_model)


def room(model, x: Tensor) -> int:
    """Bytes on the device that statistics may take: half of what a model call leaves."""
    call = model.memory_required(list(x.shape))
    return int(max(0, mm.get_free_memory(x.device) - call - mm.minimum_inference_memory()) // 2)


def predict_noise(executor, x, timestep, model_options, seed):
    """PREDICT_NOISE: the prediction of each step, for the distances between them."""
    out = executor(x, timestep, model_options, seed)
    for run in model_options["transformer_options"].get(RECORDING, ()):
        run.recorder.predicted(timestep, out)
    return out


def calc_cond_batch(executor, model, conds, x_in, timestep, model_options):
    """CALC_COND_BATCH: how many samples a prediction evaluates."""
    run = run_of(model_options.get("transformer_options", {}), model)
    if run is not None:
        run.recorder.expect(len(x_in) * sum(len(found) for found in conds if found is not None))
    return executor(model, conds, x_in, timestep, model_options)


def apply_model(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
    """APPLY_MODEL: the calls that are computed."""

    def call() -> Tensor:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    model = executor.class_obj
    run = run_of(transformer_options, model)
    if run is None or reuses_blocks(transformer_options, model, x.device):
        return call()
    conditions = {"c_concat": c_concat, "c_crossattn": c_crossattn, "control": control, **kwargs}
    return run.recorder.called(id(model), lambda: layers_of(model), lambda: room(model, x), call, x, t, conditions)


def keep_innermost(options: dict[str, Any]) -> None:
    """Calls that a cache answers do not reach the recorder, whichever node came first."""
    wrappers = options.get("wrappers", {}).get(WRAPPERS.APPLY_MODEL, {})
    if RECORDING in wrappers:
        wrappers[RECORDING] = wrappers.pop(RECORDING)


def is_compiled(patcher) -> bool:
    """True if torch.compile is on the model or on a part of it."""
    wrappers = [patcher.wrappers, patcher.model_options["transformer_options"].get("wrappers", {})]
    if any(COMPILE in kinds.get(WRAPPERS.APPLY_MODEL, {}) for kinds in wrappers):
        return True
    parts = [*patcher.object_patches.values(), *patcher.model.modules()]
    return any(
        isinstance(part, nn.Module) and ("_orig_mod" in part._modules or part._compiled_call_impl is not None)
        for part in parts
    )


def before_run(patcher) -> None:
    """ON_PRE_RUN: tells of a model that its guider does not wrap, the second one of two whose first has no node."""
    for wrapper in patcher.get_wrappers(WRAPPERS.OUTER_SAMPLE, RECORDING):
        if wrapper not in recording_now.get() and repeated.get() is None:
            wrapper.say(
                "a run is not recorded, its guider's main model needs a Calibrate from Runs node too", logging.WARNING
            )


def record_runs(patcher, recorder: RunRecorder):
    """A clone of the model whose runs are recorded."""
    recorder.check(patcher)
    clone = without(patcher, RECORDING)
    clone.add_wrapper_with_key(WRAPPERS.OUTER_SAMPLE, RECORDING, recorder)
    clone.add_wrapper_with_key(WRAPPERS.PREDICT_NOISE, RECORDING, predict_noise)
    clone.add_wrapper_with_key(WRAPPERS.CALC_COND_BATCH, RECORDING, calc_cond_batch)
    clone.add_wrapper_with_key(WRAPPERS.APPLY_MODEL, RECORDING, apply_model)
    clone.add_callback_with_key(PRE_RUN, RECORDING, before_run)
    return clone
