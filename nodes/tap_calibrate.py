from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from comfy_api.v0_0_2 import io

from ..qandc_core.calibration.choice import SELECTIONS, SURPLUS, CalibrationConfig
from ..qandc_core.calibration.file import Calibration, load_calibration
from ..qandc_core.calibration.presets import CUSTOM
from ..qandc_core.sampling.clock import Stopwatch
from ..qandc_core.sampling.remaining import Remaining
from . import schema
from .comfyui.calibrate.run import calibrate, digest_of
from .comfyui.defaults import AUTO_COUNT, completed, suited_plan
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
from .comfyui.making import done, guided_model, require_sampling, teller
from .comfyui.quantize.weights import fingerprint_of
from .comfyui.sampling import prepared
from .comfyui.settings import AUTO, AUTO_CFG, AUTO_STEPS, Settings
from .comfyui.status import node_of, show
from .comfyui.wrappers import details, sampler_function_name

log = logging.getLogger(__name__)
DEFAULT = CalibrationConfig()


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
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The full-precision model, with the cache that will be used. A guider brings its own.",
                ),
                *schema.conditioning(optional=True),
                schema.latent(
                    "The latent of the sampler node, usually an empty one of the size to calibrate for. "
                    "Trajectories start from its images in turn.",
                    True,
                ),
                io.Combo.Input(
                    "file",
                    options=calibration_files("statistics"),
                    default=NEW,
                    tooltip="new: calibrate, or find the file that was made from the same inputs. Or pick a "
                    "calibration from output/qandc.",
                ),
                io.Int.Input(
                    "trajectories",
                    default=DEFAULT.trajectories,
                    min=1,
                    max=4096,
                    tooltip="Images to sample for calibration.",
                ),
                io.Int.Input(
                    "samples",
                    default=DEFAULT.samples,
                    min=1,
                    max=100000,
                    tooltip="Number of intermediate samples to calibrate on.",
                ),
                *schema.sampler_settings("of the calibration, the same as in the Sample node"),
                io.Int.Input(
                    "calibration_seed",
                    default=DEFAULT.seed,
                    min=0,
                    max=schema.MAX_SEED - 4096,
                    tooltip="Seed of the first batch's noise.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=AUTO_COUNT,
                    min=0,
                    max=1024,
                    advanced=True,
                    tooltip="Images sampled at once, halved when memory runs out. 0 = chosen for the model and the "
                    "size, at most 16.",
                ),
                io.Combo.Input(
                    "selection",
                    options=list(SELECTIONS),
                    default=DEFAULT.selection,
                    advanced=True,
                    tooltip="How samples are chosen: TAP, evenly over the steps, or at random.",
                ),
                io.Int.Input(
                    "clusters",
                    default=DEFAULT.clusters,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="TAP: number of clusters.",
                ),
                io.Float.Input(
                    "time_scale",
                    default=DEFAULT.time_scale,
                    min=0.1,
                    max=1000.0,
                    step=0.1,
                    advanced=True,
                    tooltip="TAP: distance in steps at which two samples count as different in time. Larger values let "
                    "clusters span more steps.",
                ),
                io.Boolean.Input(
                    "computed_steps_only",
                    default=DEFAULT.computed_only,
                    advanced=True,
                    tooltip="Select only from steps that the cache computes; cached layers run on no others.",
                ),
                schema.hessians(),
                schema.filename_prefix("calibration"),
                schema.memory_gb(optional=True),
                schema.tokens(optional=True),
                schema.held_out(
                    "Model calls of the last images, held out for Quantize to measure its error on. 0 = none.",
                    optional=True,
                ),
                *schema.wired_sampling(),
                schema.preset(
                    "quick, standard and thorough choose trajectories, samples, batch_size, hessians, memory_gb and "
                    "tokens for the model, the size and the memory. On a DiT of 4 blocks (one core of an AMD EPYC) "
                    "quick took 0.3 times, thorough 2.5 times as long as standard. custom = as set."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                schema.Calibration.Output(
                    "calibration", display_name="calibration", tooltip="Statistics of every layer."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file) -> bool:
        return True  # a shared workflow may name a file of another machine: execute says what to do

    @classmethod
    def fingerprint_inputs(cls, file, **kwargs):
        return file_state(file)

    @classmethod
    def execute(
        cls,
        model=None,
        file: str = NEW,
        trajectories: int = DEFAULT.trajectories,
        samples: int = DEFAULT.samples,
        steps: int = AUTO_STEPS,
        cfg: float = AUTO_CFG,
        sampler_name: str = AUTO,
        scheduler: str = AUTO,
        calibration_seed: int = DEFAULT.seed,
        batch_size: int = 0,
        selection: str = DEFAULT.selection,
        clusters: int = DEFAULT.clusters,
        time_scale: float = DEFAULT.time_scale,
        computed_steps_only: bool = DEFAULT.computed_only,
        hessians: bool = DEFAULT.hessians,
        filename_prefix: str = "calibration",
        positive=None,
        negative=None,
        latent_image=None,
        memory_gb: float = DEFAULT.memory_gb,
        tokens: int = DEFAULT.tokens,
        held_out: int = DEFAULT.held_out,
        preset: str = CUSTOM,
        **wires,
    ) -> io.NodeOutput:
        wired = Settings(positive, negative, steps, cfg, sampler_name, scheduler, **wires)
        model = model if wired.guider is None else guided_model(wired.guider, model)
        if file != NEW and model is not None and calibration_path(file).is_file():
            return io.NodeOutput(loaded(calibration_path(file), model))
        require_sampling(file, model, latent_image, wired)
        settings = completed(wired, model)
        latent = prepared(model, latent_image)
        plan = CalibrationConfig(
            trajectories,
            batch_size,
            samples,
            selection,
            clusters,
            time_scale,
            computed_steps_only,
            hessians,
            calibration_seed if settings.noise is None else settings.noise.seed,
            memory_gb,
            tokens,
            held_out,
            settings.count,
            max(settings.rows()),
            SURPLUS,
        )
        plan = suited_plan(preset, plan, model, latent, settings)
        inputs = digest_of(model, settings, latent, plan)
        made = made_before(filename_prefix, inputs.hex) if file == NEW else None
        if made is not None:
            log.info("Calibration of the same inputs: %s", made)
            show(node_of(cls), f"Calibrated before with the same inputs: {made.name}")
            return io.NodeOutput(loaded(made, model))
        check_writable()
        partial = partial_path(filename_prefix, inputs.hex) if inputs.known else None
        watch, notes = Stopwatch(), describe(model, settings, plan)
        work = f"{'' if preset == CUSTOM else f'{preset}: '}{plan.images} trajectories of {notes['steps']} steps"
        found = calibrate(model, settings, latent, plan, partial, Remaining(work, teller(cls)))
        kept = {key: found.notes[key] for key in ("distances", "batch_size")}
        calibration = replace(found, notes={**notes, "inputs": inputs.hex, **kept})
        path = save_new(calibration.save, filename_prefix, file, model)
        if partial is not None:
            partial.unlink(missing_ok=True)
        log.info("Calibration saved: %s", path)
        chosen = len(found.notes["samples"])
        at_once, seconds = kept["batch_size"], watch.seconds()
        show(node_of(cls), done("samples", chosen, notes["prompts"], plan, at_once, seconds, path.name))
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
        **settings.describe(model),
        "sigmas": settings.schedule(model).tolist(),
        "sampler_function": sampler_function_name(settings.sampler_object()),
        "attached": details(model),
        "selection": plan.selection,
        "trajectories": plan.images,
        "prompts": sum(settings.rows()),
        "samples": plan.samples,
    }
