"""A quantized copy of any MODEL in ComfyUI's native format; it saves as a file that stock ComfyUI loads."""

from __future__ import annotations

import logging
import math
import uuid
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management as mm
import torch
from torch import Tensor

from ....qandc_core.calibration.calls import ModelCall
from ....qandc_core.calibration.file import FINGERPRINT, Calibration
from ....qandc_core.numerics import relative_error
from ....qandc_core.quantization.budget import FLOAT, Budget, LayerSource, quantize_layers, stored_bytes
from ....qandc_core.quantization.native import COLLAPSE, NativeConfig, NativeLayer
from ....qandc_core.quantization.report import LayerReport, QuantizationReport
from ....qandc_core.quantization.selection import unmatched
from ....qandc_core.sampling.clock import Stopwatch
from ..pictures import error_bars, report_picture
from ..sampling import Progress
from ..wrappers import QUANTIZATION, note, on_one_device
from .formats import backend, check_supported
from .layers import all_linears, check_loras, check_not_quantized, quantizable
from .patcher import as_native
from .rebuild import again, compiled_again, rebuilt, shapes_read_by_detection, stored_dtype
from .weights import SourceWeights, fingerprint_of, is_quantized

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NativeSettings:
    """Settings of the node Quantize. `loras`: bake them into the weights, or keep them as patches on top.

    `include`: parts of names of layers outside the blocks that are quantized too.
    """

    format: str = "W8A8"
    rounding: str = "auto"
    budget: Budget = Budget()
    skip: tuple[str, ...] = ()
    loras: str = "bake"
    include: tuple[str, ...] = ()


def quantize_native(
    patcher, settings: NativeSettings, calibration: Calibration | None = None
) -> tuple[Any, QuantizationReport]:
    """A quantized copy of the model that keeps its wrappers and patches; the model itself is not changed.

    Raises ValueError where this ComfyUI lacks the format, the model is quantized already, the calibration is of another
    model, or the result is not finite or far from full precision.
    """
    check_supported(settings.format)
    layers = chosen_layers(patcher, settings.skip, settings.include)
    if calibration is not None:
        calibration.check_fingerprint(fingerprint_of(patcher))
    watch = Stopwatch(patcher.load_device)
    calls = calibration.held_out if calibration is not None else ()
    progress = Progress(patcher, len(layers) + 2 * len(calls))
    weights = SourceWeights(patcher, settings.loras == "bake", stored_dtype(patcher.model.model_config))
    quantized = quantized_weights(weights, layers, settings, calibration, progress)
    model = assembled(weights, quantized)
    error = model_error(patcher, model, calls, progress)
    report = QuantizationReport(
        settings.format,
        layer_reports(weights, quantized),
        watch.seconds(),
        backend(settings.format, model.load_device),
        error,
    )
    if error is not None and not error[0] < COLLAPSE:
        raise ValueError(
            f"The model in {settings.format} is {error[0]:.2f} away from full precision on held-out samples, the worst "
            f"layer is {report.worst.name}; set max_layer_error, skip layers, or use W8A8."
        )
    progress.show(report_picture(report))
    log.info("Q&C quantization: %s", report.summary())
    note(model, "quantization", settings.format, f"{settings} {calibration.notes if calibration else ''}")
    model.model_options["transformer_options"][QUANTIZATION] = report
    return model, report


def chosen_layers(patcher, skip: tuple[str, ...], include: tuple[str, ...] = ()) -> list[str]:
    """Names of the layers to quantize. Raises ValueError where there is none, or on weights that are no floats."""
    network = patcher.model.diffusion_model
    check_not_quantized(network)
    check_loras(patcher)
    found = quantizable(network, include)
    for name, module in found:
        if not (is_quantized(module.weight) or module.weight.is_floating_point()):
            raise ValueError(
                f"The weight of {name} is a {type(module.weight).__name__} of {module.weight.dtype}, expected floating "
                "point; load the model with Load Diffusion Model from a file of 16 bits."
            )
    names = [name for name, _ in found if not any(pattern in name for pattern in skip)]
    if not names:
        raise ValueError(
            f"{type(network).__name__} has no linear layer left to quantize with skip = {', '.join(skip) or 'nothing'}."
        )
    return names


def ignored_patterns(patcher, settings: NativeSettings) -> list[str]:
    """A sentence for each part of `skip` and `include` that no layer's name contains."""
    names = list(all_linears(patcher.model.diffusion_model))
    found = [
        f"{kind}: {sentence}"
        for kind, patterns in (("skip", settings.skip), ("include", settings.include))
        for sentence in unmatched(patterns, names)
    ]
    for sentence in found:
        log.warning("Q&C quantization: %s.", sentence)
    return found


def quantized_weights(
    weights: SourceWeights, names: list[str], settings: NativeSettings, calibration: Calibration | None,
    progress: Progress,
) -> dict[str, NativeLayer | None]:  # fmt: skip
    """Every layer's tensors; None where it stays as it is. Raises ValueError where all of them do."""
    device, patcher = mm.get_torch_device(), weights.patcher

    def source(name: str) -> LayerSource:
        return LayerSource(name, lambda: weights.layer(name, device), sizes[name], name in unpacked)

    sizes = weights.bytes(names)
    unpacked = {key.rpartition(".")[0] for key in shapes_read_by_detection(weights.tensors)}
    errors: dict[str, float] = {}

    def shown(name: str, error: float) -> None:
        counted = name in errors  # a layer that gets a finer format comes twice
        errors[name] = error
        if counted:
            mm.throw_exception_if_processing_interrupted()
        else:
            progress.advance(error_bars(errors, "relative error"))

    config = NativeConfig(settings.format, settings.rounding)
    statistics = calibration.statistics if calibration is not None else {}
    mm.free_memory(max(working_memory(patcher, name) for name in names), device)
    budget = settings.budget
    if budget.max_bytes is not None and budget.max_bytes >= sum(sizes.values()):
        # The layers as they are meet this limit: spending it would quantize nothing.
        budget = replace(budget, max_bytes=None)
    found = quantize_layers([source(name) for name in names], config, statistics, budget, shown)
    if not any(found.values()):
        raise ValueError(
            f"Nothing would be quantized: in {settings.format} and every finer format all {len(names)} layers have a "
            f"relative error above max_layer_error = {settings.budget.max_error or 0:g} or sizes that the format does "
            "not take; raise max_layer_error, or set 0 for no limit."
        )
    return found


def working_memory(patcher, name: str) -> int:
    """Memory to round one layer: X^T X and its factor, and the weight a few times, in float32."""
    module = patcher.model.diffusion_model.get_submodule(name)
    return 4 * module.in_features * (3 * module.in_features + 6 * module.out_features)


def layer_reports(weights: SourceWeights, quantized: dict[str, NativeLayer | None]) -> list[LayerReport]:
    before = weights.bytes(quantized)
    return [
        LayerReport(name, FLOAT, 0.0, before[name], before[name])
        if layer is None
        else LayerReport(name, layer.format, layer.error, before[name], stored_bytes(layer))
        for name, layer in quantized.items()
    ]


def assembled(weights: SourceWeights, quantized: dict[str, NativeLayer | None]):
    """A model of the quantized layers and all that is left of the source, with the source's wrappers and patches."""
    patcher = weights.patcher
    layers = {name: layer for name, layer in quantized.items() if layer is not None}
    tensors = weights.without(layers)
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": value.cpu() for key, value in layer.tensors.items()}
    fresh = rebuilt(patcher, tensors)
    setattr(fresh.model.diffusion_model, FINGERPRINT, fingerprint_of(patcher))
    fresh.cached_patcher_init = (again, (fresh,))
    model = as_native(patcher.clone(model_override=fresh.get_clone_model_override()))
    model.cached_patcher_init = fresh.cached_patcher_init
    if weights.bake:
        model.patches, model.patches_uuid = {}, uuid.uuid4()
    replaced = [key for key in patcher.object_patches if key.startswith("diffusion_model.")]
    if replaced:
        log.warning("Parts that another node put into the model stay in full precision: %s", ", ".join(replaced))
    if on_one_device(model):
        log.warning("Q&C quantization: on one device; put the node for several GPUs after Quantize.")
    compiled_again(model, patcher)
    model.size = 0  # counted for the source
    model.model_size()
    return model


@torch.inference_mode()
def model_error(
    patcher, quantized, calls: tuple[ModelCall, ...], progress: Progress
) -> tuple[float, float, int] | None:
    """Mean, standard error and number of |D_q - D| / |D| over held-out calls of the two models; None without calls."""
    if not calls:
        return None
    full, lossy = (predictions(model, calls, progress) for model in (patcher, quantized))
    errors = torch.tensor([relative_error(b, a) for a, b in zip(full, lossy)], dtype=torch.float64)
    spread = float(errors.std() / math.sqrt(len(errors))) if len(errors) > 1 else math.nan
    return float(errors.mean()), spread, len(errors)


def predictions(patcher, calls: tuple[ModelCall, ...], progress: Progress) -> list[Tensor]:
    """Predictions of the bare model, without wrappers and caches, for each call."""
    mm.load_models_gpu([patcher])
    given = patcher.model_options["transformer_options"]
    patches = {key: given[key] for key in ("patches", "patches_replace") if key in given}
    found = []
    for call in calls:
        x, sigma = call.x.to(patcher.load_device), call.sigma.to(patcher.load_device)
        options = {**patches, "cond_or_uncond": [0], "sigmas": sigma, "sample_sigmas": sigma, "uuids": [uuid.uuid4()]}
        found.append(patcher.model.apply_model(x, sigma, transformer_options=options, **call.conditions).float().cpu())
        progress.advance()
    return found
