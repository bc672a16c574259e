from __future__ import annotations

import logging
from pathlib import Path

from comfy_api.v0_0_2 import io

from ..qandc_core.calibration.choice import CalibrationConfig
from ..qandc_core.calibration.file import Calibration, load_calibration
from ..qandc_core.compensation.factors import METHODS
from ..qandc_core.sampling.clock import Stopwatch
from ..qandc_core.sampling.remaining import Remaining
from . import schema
from .comfyui.cache.attach import steps_vary
from .comfyui.calibrate.inputs import digest_of_inputs
from .comfyui.compensation import FittedFor, attach_compensation, fit_compensation
from .comfyui.defaults import AUTO_COUNT, LARGEST_PAIRING, completed, images_at_once, pairs_of
from .comfyui.files import (
    NEW,
    calibration_files,
    calibration_path,
    check_writable,
    file_state,
    made_before,
    save_new,
)
from .comfyui.making import done, require_sampling, teller
from .comfyui.quantize.weights import fingerprint_of
from .comfyui.sampling import prepared
from .comfyui.settings import Settings
from .comfyui.status import node_of, show
from .comfyui.wrappers import details, labels

log = logging.getLogger(__name__)


class VarianceCompensate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_VarianceCompensate",
            display_name="Variance Compensate",
            category=schema.CATEGORY,
            description="Corrects the variance drift that quantization and caching cause together: samples both "
            "models from the same noise and fits one factor per step and channel (Q&C, Eq. 9-12). Saved in "
            "output/qandc.",
            search_aliases=["variance", "vc", "drift", "correction"],
            inputs=[
                io.Model.Input("model", tooltip="The accelerated model: quantized, cached, or both."),
                io.Model.Input("reference", tooltip="The untouched full-precision model."),
                *schema.conditioning(optional=True),
                schema.latent(
                    "The latent of the sampler node, usually an empty one of the size to fit for. Pairs start "
                    "from its images in turn.",
                    True,
                ),
                io.Combo.Input(
                    "file",
                    options=calibration_files("variance"),
                    default=NEW,
                    tooltip="new: fit. Or pick a compensation from output/qandc.",
                ),
                io.Int.Input(
                    "pairs",
                    default=AUTO_COUNT,
                    min=0,
                    max=4096,
                    tooltip="Images sampled with both models. More give a more stable fit and take longer. 0 = chosen "
                    "for the size, 4 to 64.",
                ),
                *schema.sampler_settings("of the fit, the same as in the Sample node"),
                io.Int.Input(
                    "calibration_seed",
                    default=502,
                    min=0,
                    max=schema.MAX_SEED,
                    tooltip="Seed of the noise of the pairs.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    advanced=True,
                    tooltip="variance_match: match the standard deviation. paper: the paper's objective. "
                    "least_squares: least squared error.",
                ),
                schema.fraction(
                    "start_percent", 0.0, "Fraction of the run at which the correction begins.", advanced=True
                ),
                schema.fraction("end_percent", 1.0, "Fraction of the run at which the correction ends.", advanced=True),
                schema.filename_prefix("compensation"),
                *schema.wired_sampling(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output(tooltip="The accelerated model, corrected at every step.")],
        )

    @classmethod
    def validate_inputs(cls, file) -> bool:
        return True

    @classmethod
    def fingerprint_inputs(cls, file, **kwargs):
        return file_state(file)

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        reference: io.Model.Type,
        file: str,
        pairs: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        calibration_seed: int,
        method: str,
        start_percent: float,
        end_percent: float,
        filename_prefix: str,
        positive=None,
        negative=None,
        latent_image=None,
        **wires,
    ) -> io.NodeOutput:
        if file != NEW and calibration_path(file).is_file():
            return io.NodeOutput(loaded(calibration_path(file), model, reference))
        wired = Settings(positive, negative, steps, cfg, sampler_name, scheduler, **wires)
        require_sampling(file, model, latent_image, wired)
        if steps_vary(model):
            raise ValueError(
                "An error budget computes other steps for other images, and compensation is fitted step by step; in "
                "Apply Cache choose another policy, such as number of steps."
            )
        check_alike(model, reference)
        settings = completed(wired, reference)
        latent = prepared(reference, latent_image)
        plan = CalibrationConfig(
            pairs or pairs_of(latent),
            images_at_once(reference, latent, LARGEST_PAIRING),
            held_out=0,
            seed=calibration_seed if settings.noise is None else settings.noise.seed,
            prompts=settings.count,
            rows=max(settings.rows()),
        )
        inputs = digest_of_inputs(
            model, reference, settings.schedule(reference), settings, latent, plan, method, start_percent, end_percent
        ).hex
        saved = made_before(filename_prefix, inputs) if file == NEW else None
        if saved is not None:
            log.info("Variance compensation of the same inputs: %s", saved)
            show(node_of(cls), f"Fitted before with the same inputs: {saved.name}")
            return io.NodeOutput(loaded(saved, model, reference))
        check_writable()
        watch, notes = Stopwatch(), settings.describe(reference)
        estimate = Remaining(f"{plan.images} pairs of {notes['steps']} steps", teller(cls))
        variance, fitted, at_once = fit_compensation(
            reference, model, settings, latent, plan, estimate, method=method, start=start_percent, end=end_percent
        )
        notes |= {"pairs": plan.images, "prompts": sum(settings.rows()), "batch_size": at_once}
        made = {**notes, "accelerated": fingerprint_of(model), **fitted.notes()}
        calibration = Calibration(fingerprint_of(reference), variance=variance, notes={**made, "inputs": inputs})
        path = save_new(calibration.save, filename_prefix, file, reference)
        log.info("Variance compensation saved: %s", path)
        seconds = watch.seconds()
        show(node_of(cls), done("pairs", plan.images, notes["prompts"], plan, at_once, seconds, path.name))
        return io.NodeOutput(attach_compensation(model, variance, fitted))


def loaded(path: Path, model, reference):
    calibration = load_calibration(path)
    calibration.check_fingerprint(fingerprint_of(reference))
    return attach_saved(model, calibration, path.name)


def attach_saved(model, calibration: Calibration, name: str):
    """The model with the compensation of a file that was fitted for its cache and quantization."""
    if calibration.variance is None:
        raise ValueError(f"{name} holds no variance compensation; pick one that this node made, or {NEW!r}.")
    if calibration.notes.get("attached") != details(model):
        raise ValueError(
            f"{name} was fitted with another cache or quantization than this model has attached "
            f"({labels(model) or 'nothing'}); pick {NEW!r} to fit again."
        )
    if calibration.notes.get("accelerated") not in (None, fingerprint_of(model)):
        raise ValueError(f"{name} was fitted for other weights than those of `model`; pick {NEW!r} to fit again.")
    return attach_compensation(model, calibration.variance, FittedFor.from_notes(calibration.notes))


def check_alike(model, reference) -> None:
    """Raises ValueError where the two are models of different kinds."""
    kinds = [type(patcher.model).__name__ for patcher in (model, reference)]
    formats = [type(patcher.get_model_object("latent_format")) for patcher in (model, reference)]
    if kinds[0] != kinds[1] or formats[0] is not formats[1]:
        raise ValueError(f"`model` is a {kinds[0]} and `reference` a {kinds[1]}; connect the same model to both.")
