"""A quantized copy of any MODEL in ComfyUI's native format; it saves as a file that stock ComfyUI loads."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import torch
from torch import Tensor

from ....qandc_core.calibration.calls import ModelCall
from ....qandc_core.calibration.file import FINGERPRINT, Calibration
from ....qandc_core.quantization.budget import FLOAT, Budget, LayerSource, quantize_layers, stored_bytes
from ....qandc_core.quantization.native import COLLAPSE, NativeConfig, NativeLayer
from ....qandc_core.quantization.report import LayerReport, QuantizationReport
from ..pictures import error_bars, report_picture
from ..sampling import Progress
from ..wrappers import QUANTIZATION, note
from .formats import backend, check_supported, prepare
from .layers import check_loras, check_not_quantized, quantizable
from .rebuild import again, compiled_again, rebuilt, shapes_read_by_detection
from .weights import base_tensors, base_weight, fingerprint_of, is_quantized, patched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NativeSettings:
    """What the node Quantize asks for. `loras`: bake them into the weights, or keep them as patches on top."""

    format: str = "W8A8"
    rounding: str = "auto"
    budget: Budget = Budget()
    skip: tuple[str, ...] = ()
    loras: str = "bake"


def quantize_native(
    patcher, settings: NativeSettings, calibration: Calibration | None = None
) -> tuple[Any, QuantizationReport]:
    """A quantized model that keeps what was attached to the given one, which stays as it is.

    Raises ValueError where this ComfyUI lacks the format, the model is quantized already, the calibration is of another
    model, or the result is not finite or far from full precision.
    """
    check_supported(settings.format)
    layers = chosen_layers(patcher, settings.skip)
    if calibration is not None:
        calibration.check_fingerprint(fingerprint_of(patcher))
    started = time.perf_counter()
    calls = calibration.held_out if calibration is not None else ()
    progress = Progress(patcher, len(layers) + 2 * len(calls))
    quantized = quantized_weights(patcher, layers, settings, calibration, progress)
    model = assembled(patcher, quantized, settings.loras == "bake")
    error = model_error(patcher, model, calls, progress)
    report = QuantizationReport(
        settings.format,
        layer_reports(patcher, quantized),
        time.perf_counter() - started,
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


def chosen_layers(patcher, skip: tuple[str, ...]) -> list[str]:
    """Names of the layers to quantize. Raises ValueError where there is none, or on weights that are no floats."""
    network = patcher.model.diffusion_model
    check_not_quantized(network)
    check_loras(patcher)
    found = quantizable(network)
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


def quantized_weights(
    patcher, names: list[str], settings: NativeSettings, calibration: Calibration | None, progress: Progress
) -> dict[str, NativeLayer | None]:
    """Every layer's tensors; None where it stays as it is."""
    device, bake = mm.get_torch_device(), settings.loras == "bake"

    def tensor(name: str) -> Tensor:
        value = base_weight(patcher, name)
        return (patched(patcher, name, value) if bake else value).to(device)

    def source(name: str) -> LayerSource:
        module = patcher.model.diffusion_model.get_submodule(name)
        bias = None if module.bias is None else f"{name}.bias"
        return LayerSource(
            name, lambda: (tensor(f"{name}.weight"), bias and tensor(bias)), sizes[name], name in unpacked
        )

    sizes = layer_bytes(patcher, names)
    unpacked = {key.rpartition(".")[0] for key in shapes_read_by_detection(base_tensors(patcher))}
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
    return quantize_layers([source(name) for name in names], config, statistics, settings.budget, shown)


def working_memory(patcher, name: str) -> int:
    """Bytes that rounding one layer takes: X^T X and its factor, and the weight a few times, in float32."""
    module = patcher.model.diffusion_model.get_submodule(name)
    return 4 * module.in_features * (3 * module.in_features + 6 * module.out_features)


def layer_bytes(patcher, names: Collection[str]) -> dict[str, int]:
    """What each layer takes in the source."""
    found = dict.fromkeys(names, 0)
    for key, value in base_tensors(patcher).items():
        owner = key.rpartition(".")[0]
        if owner in found:
            found[owner] += value.nbytes
    return found


def layer_reports(patcher, quantized: dict[str, NativeLayer | None]) -> list[LayerReport]:
    before = layer_bytes(patcher, quantized)
    return [
        LayerReport(name, FLOAT, 0.0, before[name], before[name])
        if layer is None
        else LayerReport(name, layer.format, layer.error, before[name], stored_bytes(layer))
        for name, layer in quantized.items()
    ]


def assembled(patcher, quantized: dict[str, NativeLayer | None], bake: bool):
    """A model of the quantized layers and all that is left of the source, with the source's attachments."""
    layers = {name: layer for name, layer in quantized.items() if layer is not None}
    tensors: dict[str, Tensor] = {}
    for name, value in base_tensors(patcher).items():
        if name.rpartition(".")[0] not in layers:
            tensors[name] = (patched(patcher, name, value) if bake else value).cpu()
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": value.cpu() for key, value in layer.tensors.items()}
    prepare({layer.format for layer in layers.values()})
    fresh = rebuilt(patcher, tensors)
    setattr(fresh.model.diffusion_model, FINGERPRINT, fingerprint_of(patcher))
    fresh.cached_patcher_init = (again, (fresh,))
    model = patcher.clone(model_override=fresh.get_clone_model_override())
    model.cached_patcher_init = fresh.cached_patcher_init
    if bake:
        model.patches, model.patches_uuid = {}, uuid.uuid4()
    replaced = [key for key in patcher.object_patches if key.startswith("diffusion_model.")]
    if replaced:
        log.warning("Parts that another node put into the model stay in full precision: %s", ", ".join(replaced))
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
    errors = torch.stack([(b - a).norm() / a.norm().clamp(min=1e-12) for a, b in zip(full, lossy)]).double()
    spread = float(errors.std() / math.sqrt(len(errors))) if len(errors) > 1 else math.nan
    return float(errors.mean()), spread, len(errors)


def predictions(patcher, calls: tuple[ModelCall, ...], progress: Progress) -> list[Tensor]:
    """What the model alone, without wrappers and caches, answers to each call."""
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
