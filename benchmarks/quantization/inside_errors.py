"""One model and seed of `python -m benchmarks.quantization`: runs in ComfyUI's Python, prints JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import fidelity
import torch
from subjects import INTERVAL, SAMPLES, TRAJECTORIES, Study, over_seeds

NOISE = 4096  # inputs of a layer
CALIBRATION_SEED, IMAGE_SEED = 500, 20000
PAPER = "paper, TAP"
# Rounding, whether biases are corrected, and which calibration is used.
METHODS = {
    "nearest": ("nearest", False, "GPTQ, TAP"),
    "nearest, corrected biases": ("nearest", True, "GPTQ, TAP"),
    "GPTQ, noise": ("gptq", True, "GPTQ, noise"),
    "GPTQ, random": ("gptq", True, "GPTQ, random"),
    "GPTQ, stratified": ("gptq", True, "GPTQ, stratified"),
    "GPTQ, TAP": ("gptq", True, "GPTQ, TAP"),
    "GPTQ, TAP, no cache": ("gptq", True, "GPTQ, TAP, no cache"),
    "GPTQ, TAP, biases as they are": ("gptq", False, "GPTQ, TAP"),
}


def calibrations(study: Study, seed: int) -> Callable[[str], Any]:
    """Name -> Calibration, made when it is first asked for."""
    first = CALIBRATION_SEED + 10 * seed
    made = {
        "GPTQ, random": lambda: study.calibration(study.cached, first, selection="random"),
        "GPTQ, stratified": lambda: study.calibration(study.cached, first, selection="stratified"),
        "GPTQ, TAP": lambda: study.calibration(study.cached, first, selection="tap"),
        "GPTQ, TAP, no cache": lambda: study.calibration(study.subject.patcher, first, selection="tap"),
    }
    find = cache(lambda name: noise(study, seed, find("GPTQ, TAP")) if name == "GPTQ, noise" else made[name]())
    return find


def noise(study: Study, seed: int, like):
    """The calibration with statistics of standard normal inputs."""
    generator = torch.Generator().manual_seed(seed)
    statistics = {}
    for name, layer in like.statistics.items():
        statistics[name] = type(layer).empty(len(layer.mean), hessian=True)
        statistics[name].update(torch.randn(NOISE, len(layer.mean), generator=generator))
    return replace(like, statistics=statistics)


def native(study: Study, format: str, rounding: str, corrected: bool, calibration) -> tuple[Any, dict[str, float]]:
    """The quantized model with its cache, and its errors on held-out inputs."""
    module = study.host.module("nodes.comfyui.quantize.native")
    config = study.host.module("qandc_core.quantization.native").NativeConfig
    module.NativeConfig = partial(config, bias_correction=corrected)  # no input of Quantize
    patcher, report = module.quantize_native(
        study.cached, module.NativeSettings(format, rounding), study.judged(calibration)
    )
    errors = [layer.error for layer in report.layers]
    return patcher, {"layers": sum(errors) / len(errors), "model": report.model_error[0]}


def paper(study: Study, format: str, calibration) -> tuple[Any, dict[str, float]]:
    """The same of the method paper."""
    model = study.host.module("nodes.comfyui.quantize.paper")
    config = study.host.module("qandc_core.quantization.model").QuantizationConfig()
    patcher, _ = model.quantized_patcher(study.cached, int(format[1]), 8, calibration, config)
    relative_error = study.host.module("qandc_core.numerics").relative_error
    source, errors = study.cached.model.diffusion_model, []
    for name, inputs in study.layers.items():
        x = inputs.float()
        true = source.get_submodule(name)(x)
        errors.append(relative_error(patcher.model.diffusion_model.get_submodule(name)(x), true))
    judge = study.host.module("nodes.comfyui.quantize.judge").HeldOutError(study.cached, study.calls, lambda: None)
    error = judge.of_model(patcher)
    return patcher, {"layers": sum(errors) / len(errors), "model": error[0]}


def image_errors(study: Study, patcher, references: dict[str, torch.Tensor], seed: int) -> dict[str, float]:
    images, _ = study.subject.images(patcher, IMAGE_SEED + seed)
    found = {name: fidelity.relative_l2(images, reference) for name, reference in references.items()}
    return {name: sum(errors) / len(errors) for name, errors in found.items()}


def rows(study: Study, seed: int) -> list[dict[str, Any]]:
    """The rows of one seed of calibration and images."""
    subject, found = study.subject, []
    calibration = calibrations(study, seed)
    references = {
        "same_cache": subject.images(study.cached, IMAGE_SEED + seed)[0],
        "no_cache": subject.images(subject.patcher, IMAGE_SEED + seed)[0],
    }
    methods = [*METHODS, *([PAPER] if study.host.module("nodes.comfyui.model.dit").is_dit(subject.patcher) else [])]
    for format in ("W8A8", "W4A8"):
        for method in methods:
            if method == PAPER:
                patcher, errors = paper(study, format, calibration("GPTQ, TAP"))
            else:
                rounding, corrected, source = METHODS[method]
                patcher, errors = native(study, format, rounding, corrected, calibration(source))
            errors |= image_errors(study, patcher, references, seed)
            found.append({"format": format, "method": method, **errors})
            print(found[-1], file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    shared = {"interval": INTERVAL, "samples": SAMPLES, "trajectories": TRAJECTORIES, "noise": NOISE}
    over_seeds(rows, shared)
