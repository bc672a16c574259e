from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import comfy.samplers
from comfy_api.v0_0_2 import io

from ..qandc_core.calibration.file import Calibration, load_calibration
from . import schema
from .comfyui.calibrate.inputs import schedule_of
from .comfyui.calibrate.run import SELECTIONS, CalibrationConfig, calibrate, digest_of, empty_latent
from .comfyui.files import (
    NEW,
    calibration_files,
    calibration_path,
    check_writable,
    file_state,
    made_before,
    partial_path,
    save_new,
)
from .comfyui.quantize.weights import fingerprint_of
from .comfyui.sampling import Settings
from .comfyui.wrappers import details, sampler_function_name

log = logging.getLogger(__name__)


class TAPCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_TAPCalibrate",
            display_name="TAP Calibrate",
            category=schema.CATEGORY,
            description="Samples with the model as it is wired, cache included, selects varied samples by "
            "temporal-aware parallel clustering (TAP), and collects statistics of every layer's inputs for Quantize. "
            "Saved in output/qandc: the same inputs give the same file, and a cancelled run resumes.",
            search_aliases=["calibration", "ptq", "gptq", "statistics", "tap"],
            inputs=[
                io.Model.Input("model", tooltip="The full-precision model, with the cache that will be used."),
                *schema.conditioning(optional=True),
                schema.latent("An empty latent of the size to calibrate for; its batch size does not matter.", True),
                io.Combo.Input(
                    "file", options=calibration_files("statistics"), default=NEW,
                    tooltip="new calibrates, or finds the file that was made of the same inputs; or take a calibration "
                    "from output/qandc.",
                ),
                io.Int.Input("trajectories", default=32, min=1, max=4096, tooltip="Images to sample for calibration."),
                io.Int.Input(
                    "samples", default=400, min=1, max=100000,
                    tooltip="How many of the images' intermediate steps are chosen.",
                ),
                *schema.sampler_settings("of the calibration, the same as in the Sample node"),
                io.Int.Input(
                    "calibration_seed", default=501, min=0, max=schema.MAX_SEED - 4096,
                    tooltip="Noise of the first batch.",
                ),
                io.Int.Input(
                    "batch_size", default=16, min=1, max=1024, advanced=True, tooltip="Images sampled at once."
                ),
                io.Combo.Input(
                    "selection", options=list(SELECTIONS), default=SELECTIONS[0], advanced=True,
                    tooltip="How samples are chosen: TAP, evenly over the steps, or at random.",
                ),
                io.Int.Input(
                    "clusters", default=50, min=1, max=1000, advanced=True, tooltip="TAP: number of clusters."
                ),
                io.Float.Input(
                    "time_scale", default=5.0, min=0.1, max=1000.0, step=0.1, advanced=True,
                    tooltip="TAP: how many steps apart samples must lie to count as different in time. Larger values "
                    "let clusters span more steps.",
                ),
                io.Boolean.Input(
                    "computed_steps_only", default=True, advanced=True,
                    tooltip="Choose only from steps that the cache computes: cached layers see no others.",
                ),
                io.Boolean.Input(
                    "hessians", default=True, advanced=True,
                    tooltip="Collect the input Hessian (X^T X) of every layer, which GPTQ needs. Off takes little "
                    "memory.",
                ),
                io.String.Input(
                    "filename_prefix", default="calibration", advanced=True,
                    tooltip="New files are named with this, the model, the date and a number.",
                ),
                io.Float.Input(
                    "memory_gb", default=4.0, min=0.1, max=1024.0, step=0.1, optional=True,
                    tooltip="Memory that statistics may take, in GiB; less keeps fewer inputs of each layer.",
                ),
                io.Int.Input(
                    "tokens", default=4096, min=64, max=1048576, optional=True, advanced=True,
                    tooltip="Maximum number of inputs kept of a layer, where they take less memory than its Hessian.",
                ),
                io.Int.Input(
                    "held_out", default=8, min=0, max=256, optional=True, advanced=True,
                    tooltip="Model calls of the last image that are held out for Quantize to measure its error on; "
                    "0: none.",
                ),
            ],
            outputs=[schema.Calibration.Output("calibration", display_name="calibration", tooltip="Statistics of "
            "every layer.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file) -> bool:
        return True  # a shared workflow may name a file of another machine: execute says what to do

    @classmethod
    def fingerprint_inputs(cls, file, **kwargs):
        return file_state(file)

    @classmethod
    def execute(
        cls, model: io.Model.Type, file: str, trajectories: int, samples: int, steps: int, cfg: float,
        sampler_name: str, scheduler: str, calibration_seed: int, batch_size: int, selection: str, clusters: int,
        time_scale: float, computed_steps_only: bool, hessians: bool, filename_prefix: str, positive=None,
        negative=None, latent_image=None, memory_gb: float = 4.0, tokens: int = 4096, held_out: int = 8,
    ) -> io.NodeOutput:  # fmt: skip
        if file != NEW and calibration_path(file).is_file():
            return io.NodeOutput(loaded(calibration_path(file), model))
        require_wires(file, positive=positive, negative=negative, latent_image=latent_image)
        settings = Settings(positive, negative, steps, cfg, sampler_name, scheduler)
        plan = CalibrationConfig(
            trajectories, min(batch_size, trajectories), samples, selection, clusters, time_scale,
            computed_steps_only, hessians, calibration_seed, memory_gb, tokens, held_out,
        )  # fmt: skip
        latent = empty_latent(model, latent_image)
        inputs = digest_of(model, settings, latent, plan)
        made = made_before(filename_prefix, inputs.hex) if file == NEW else None
        if made is not None:
            log.info("Calibration of the same inputs: %s", made)
            return io.NodeOutput(loaded(made, model))
        check_writable()
        partial = partial_path(filename_prefix, inputs.hex) if inputs.known else None
        found = calibrate(model, settings, latent, plan, partial)
        calibration = replace(
            found,
            notes={**describe(model, settings, plan), "inputs": inputs.hex, "distances": found.notes["distances"]},
        )
        path = save_new(calibration.save, filename_prefix, file, model)
        if partial is not None:
            partial.unlink(missing_ok=True)
        log.info("Calibration saved: %s", path)
        return io.NodeOutput(calibration)


def loaded(path: Path, model) -> Calibration:
    """A calibration that TAP Calibrate made for this model. Raises ValueError on any other."""
    calibration = load_calibration(path)
    calibration.check_fingerprint(fingerprint_of(model))
    if not calibration.statistics:
        raise ValueError(f"{path.name} holds no layer statistics; pick a file that TAP Calibrate made, or {NEW!r}.")
    return calibration


def describe(model, settings: Settings, plan: CalibrationConfig) -> dict:
    return {
        **settings.describe(),
        "sigmas": schedule_of(model, settings).tolist(),
        "sampler_function": sampler_function_name(comfy.samplers.sampler_object(settings.sampler_name)),
        "attached": details(model),
        "selection": plan.selection,
        "trajectories": plan.trajectories,
        "samples": plan.samples,
    }


def require_wires(file: str, **inputs) -> None:
    """Raises ValueError naming the inputs that making a new file needs."""
    absent = [name for name, value in inputs.items() if value is None]
    if not absent:
        return
    reason = (
        "To calibrate anew" if file == NEW else f"The file {Path(file).name} is not in output/qandc here; to make it"
    )
    raise ValueError(f"{reason}, connect {', '.join(absent)}, or pick another file.")
