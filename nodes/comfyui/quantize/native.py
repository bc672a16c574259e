"""A quantized copy of any MODEL in ComfyUI's native format; it saves as a file that stock ComfyUI loads."""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management as mm
import torch
from torch import nn

from ....qandc_core.calibration.file import FINGERPRINT, Calibration
from ....qandc_core.quantization.budget import TRIES, Budget, LayerSource, quantize_layers
from ....qandc_core.quantization.formats import BY_NAME
from ....qandc_core.quantization.gptq import rounding_cost
from ....qandc_core.quantization.native import COLLAPSE, NativeConfig, NativeLayer, working_bytes
from ....qandc_core.quantization.report import QuantizationReport, layer_reports
from ....qandc_core.quantization.selection import unmatched
from ....qandc_core.quantization.sensitivity import grouped
from ....qandc_core.sampling.clock import Stopwatch
from ..wrappers import QUANTIZATION, note, on_one_device
from .formats import backend, check_supported
from .judge import FEW, HeldOutError
from .layers import all_linears, check_loras, check_not_paper, narrower, packed_name, quantizable
from .patcher import as_native
from .rebuild import compiled_again, rebuilt, rebuilt_again, shapes_read_by_detection, stored_dtype
from .weights import SourceWeights, fingerprint_of, is_packed
from .work import Work

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
    patcher, settings: NativeSettings, calibration: Calibration | None = None, node_id: str | None = None
) -> tuple[Any, QuantizationReport]:
    """A quantized copy of the model that keeps its wrappers and patches; the model itself is not changed. The node with
    this id shows how far it is.

    Raises ValueError where this ComfyUI lacks the format, the model is quantized already, the calibration is of another
    model, or the result is not finite or far from full precision.
    """
    check_supported(settings.format)
    layers = chosen_layers(patcher, settings)
    if calibration is not None:
        calibration.check_fingerprint(fingerprint_of(patcher))
    watch = Stopwatch(patcher.load_device)
    calls = calibration.held_out if calibration is not None else ()
    work = planned_work(patcher, settings, layers, len(calls), node_id)
    weights = SourceWeights(patcher, settings.loras == "bake", stored_dtype(patcher.model.model_config))
    judge = HeldOutError(patcher, calls, work.called) if calls else None
    if judge is not None:
        judge.prepare()  # first, so that the time of a call is known
    quantized = quantized_weights(weights, layers, settings, calibration, work, judge)
    model = assembled(weights, quantized)
    error = None if judge is None else judge.of_model(model)
    report = QuantizationReport(
        settings.format,
        layer_reports(quantized, weights.bytes(quantized)),
        watch.seconds(),
        backend(settings.format, model.load_device),
        error,
        packed_sources(patcher.model.diffusion_model, layers),
    )
    if error is not None and not error[0] < COLLAPSE:
        raise ValueError(
            f"The model in {settings.format} is {error[0]:.2f} away from full precision on held-out samples, the worst "
            f"layer is {report.worst.name}; set max_layer_error, skip layers, or use W8A8."
        )
    log.info("Q&C quantization: %s", report.summary())
    limit = settings.budget.max_model_error
    within = "" if limit is None else f"within {limit:g} of the model "
    note(model, "quantization", settings.format, f"{settings} {within}{calibration.notes if calibration else ''}")
    model.model_options["transformer_options"][QUANTIZATION] = report
    return model, report


def chosen_layers(patcher, settings: NativeSettings) -> list[str]:
    """Names of the layers to quantize. Raises ValueError where there is none, or on weights that are no floats."""
    network = patcher.model.diffusion_model
    check_not_paper(network)
    check_loras(patcher)
    found = quantizable(network, settings.include)
    check_decodable(found, "Load Diffusion Model")
    wanted = [(name, module) for name, module in found if not any(pattern in name for pattern in settings.skip)]
    if not wanted:
        skipped = ", ".join(settings.skip) or "nothing"
        raise ValueError(f"{type(network).__name__} has no linear layer left to quantize with skip = {skipped}.")
    return [name for name, _ in narrower(wanted, BY_NAME[settings.format])]


def check_decodable(layers: list[tuple[str, Any]], loader: str) -> None:
    """Raises ValueError on weights that are neither floating point nor packed by ComfyUI, such as GGUF's."""
    for name, module in layers:
        if not (is_packed(module.weight) or module.weight.is_floating_point()):
            raise ValueError(
                f"The weight of {name} is a {type(module.weight).__name__} of {module.weight.dtype}, expected floating "
                f"point; load the model with {loader} from a file of 16 bits."
            )


def packed_sources(network: nn.Module, names: list[str]) -> dict[str, int]:
    """Formats that these layers are in before, and how many of them."""
    found = Counter(packed_name(network.get_submodule(name)) for name in names)
    return {name: count for name, count in found.items() if name is not None}


def ignored_patterns(patcher, settings: NativeSettings) -> list[str]:
    """A sentence for each part of `skip` and `include` that no layer's name contains."""
    names = list(all_linears(patcher.model.diffusion_model))
    return unmatched_parts(names, settings.skip, settings.include)


def unmatched_parts(names: list[str], skip: tuple[str, ...], include: tuple[str, ...]) -> list[str]:
    found = [
        f"{kind}: {sentence}"
        for kind, patterns in (("skip", skip), ("include", include))
        for sentence in unmatched(patterns, names)
    ]
    for sentence in found:
        log.warning("Q&C quantization: %s.", sentence)
    return found


def quantized_weights(
    weights: SourceWeights,
    names: list[str],
    settings: NativeSettings,
    calibration: Calibration | None,
    work: Work,
    judge: HeldOutError | None,
) -> dict[str, NativeLayer | None]:
    """Every layer's tensors; None where it stays as it is. Raises ValueError where all of them do."""
    device, network = mm.get_torch_device(), weights.patcher.model.diffusion_model

    def source(name: str) -> LayerSource:
        return LayerSource(name, lambda: weights.layer(name, device), sizes[name], name in unpacked)

    sizes = weights.bytes(names)
    unpacked = {key.rpartition(".")[0] for key in shapes_read_by_detection(weights.tensors)}
    errors: dict[str, float] = {}

    def shown(name: str, error: float) -> None:
        errors[name] = error  # a layer that gets a finer format comes again
        words = f"layer {len(errors)} of {len(names)}" if len(errors) < len(names) else "finer formats"
        work.did("rounding", rounding_cost(network.get_submodule(name)), words)

    config = NativeConfig(settings.format, settings.rounding)
    statistics = calibration.statistics if calibration is not None else {}
    make_room([network.get_submodule(name) for name in names], device)
    budget = settings.budget
    if budget.max_bytes is not None and budget.max_bytes >= sum(sizes.values()):
        # The layers as they are meet this limit: spending it would quantize nothing.
        budget = replace(budget, max_bytes=None)
    measure = None if judge is None else judge_of_layers(judge, settings).of_layers
    found = quantize_layers([source(name) for name in names], config, statistics, budget, shown, measure)
    if not any(found.values()):
        raise ValueError(
            f"Nothing would be quantized: in {settings.format} and every finer format all {len(names)} layers have a "
            f"relative error above max_layer_error = {settings.budget.max_error or 0:g} or sizes that the format does "
            "not support; raise max_layer_error, or set 0 for no limit."
        )
    return found


def judge_of_layers(judge: HeldOutError, settings: NativeSettings) -> HeldOutError:
    """The judge of the layers by themselves: LoRAs that are kept on top are no part of them."""
    if settings.loras == "bake" or not judge.patcher.patches:
        return judge
    plain = judge.patcher.clone()
    plain.patches, plain.patches_uuid = {}, uuid.uuid4()
    return HeldOutError(plain, judge.calls, judge.called)


def planned_work(patcher, settings: NativeSettings, names: list[str], calls: int, node_id: str | None) -> Work:
    """All that is to be done as far as it can be known: finer formats and their measurements are a guess."""
    network = patcher.model.diffusion_model
    rounding, asked = sum(rounding_cost(network.get_submodule(name)) for name in names), 2 * calls
    if settings.budget.climbs and calls:
        rounding, asked = 1.5 * rounding, asked + min(FEW, calls) * len(grouped(names)) + TRIES // 2 * calls
    return Work(patcher, rounding, asked, node_id)


def make_room(layers: Sequence[Any], device: torch.device) -> None:
    """Has ComfyUI unload models until any of the layers can be rounded."""
    mm.free_memory(max(working_bytes(layer.out_features, layer.in_features) for layer in layers), device)


def assembled(weights: SourceWeights, quantized: dict[str, NativeLayer | None]):
    """A model of the quantized layers and all that is left of the source, with the source's wrappers and patches."""
    patcher = weights.patcher
    layers = {name: layer for name, layer in quantized.items() if layer is not None}
    tensors = weights.without(layers)
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": value.cpu() for key, value in layer.tensors.items()}
    fresh = rebuilt(patcher, tensors)
    setattr(fresh.model.diffusion_model, FINGERPRINT, fingerprint_of(patcher))
    fresh.cached_patcher_init = (rebuilt_again, (fresh,))
    model = as_native(patcher.clone(model_override=fresh.get_clone_model_override()))
    model.cached_patcher_init = fresh.cached_patcher_init
    if weights.bake:
        model.patches, model.patches_uuid = {}, uuid.uuid4()
    replaced = [key for key in patcher.object_patches if key.startswith("diffusion_model.")]
    if replaced:
        log.warning("Parts that another node put into the model are kept in full precision: %s", ", ".join(replaced))
    if on_one_device(model):
        log.warning("Q&C quantization: on one device; put the node for several GPUs after Quantize.")
    compiled_again(model, patcher)
    model.size = 0  # counted for the source
    model.model_size()
    return model
