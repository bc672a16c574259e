"""A quantized copy of a MODEL: weights are built anew, never swapped in a model that others share."""

from __future__ import annotations

import logging
import uuid
from typing import Any

import comfy.lora
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from ...qandc_core.calibration.file import FINGERPRINT, Calibration, fingerprint
from ...qandc_core.quantization.model import (
    DIT_SKIP,
    QuantizationConfig,
    linear_weight_bytes,
    named_linears,
    quantize_model,
    quantized_layers,
)
from .dit_model import is_dit, new_patcher, resized
from .runs import note
from .sampling import Progress

log = logging.getLogger(__name__)
COLLAPSED = 0.5  # relative weight error no usable quantization reaches


def patched_tensors(patcher) -> dict[str, Tensor]:
    """The diffusion model's weights with the patcher's LoRAs in them, whether or not they are loaded just now."""
    tensors = {}
    for name, value in patcher.model.diffusion_model.state_dict().items():
        key = f"diffusion_model.{name}"
        if key in patcher.backup:
            value = patcher.backup[key].weight
        if key in patcher.patches:
            value = comfy.lora.calculate_weight(patcher.patches[key], value.float().clone(), key).to(value.dtype)
        tensors[name] = value.detach().cpu()
    return tensors


def quantized_patcher(
    patcher, w_bits: int, a_bits: int, calibration: Calibration | None, config: QuantizationConfig
) -> tuple[Any, str]:
    """A quantized model that keeps what was attached to the given one, and what it cost; LoRAs go into the weights."""
    source = patcher.model.diffusion_model
    if not is_dit(patcher):
        raise ValueError(
            f"Quantize takes class-conditional DiTs so far, this is {type(patcher.model).__name__}; load one with "
            f"Load DiT."
        )
    if quantized_layers(source):
        raise ValueError("This model is quantized already; wire the model that Load DiT gives for the original file.")
    tensors = patched_tensors(patcher)
    fresh = new_patcher(source.config, source.dtype, tensors)
    model = fresh.model.diffusion_model
    fresh.model.load_model_weights(dict(tensors), "", assign=fresh.is_dynamic())
    setattr(model, FINGERPRINT, fingerprint(source))
    progress = Progress(patcher, 2 * len(list(named_linears(model, DIT_SKIP))))
    before = linear_weight_bytes(model)
    quantize_model(model, w_bits, a_bits, DIT_SKIP, calibration, config, lambda *_: progress.advance())
    errors = weight_errors(model, tensors, progress)
    worst = max(errors, key=lambda name: errors[name])
    report = (
        f"{len(errors)} layers in W{w_bits}A{a_bits}, linear weights {before / 2**20:.1f} -> "
        f"{linear_weight_bytes(model) / 2**20:.1f} MiB, largest relative weight error {errors[worst]:.4f} in {worst}"
    )
    log.info("Q&C quantization: %s", report)
    quantized = patcher.clone(model_override=fresh.get_clone_model_override())
    quantized.patches, quantized.patches_uuid = {}, uuid.uuid4()
    quantized.cached_patcher_init = None  # the loader's recipe gives the unquantized model
    note(quantized, "quantization", f"W{w_bits}A{a_bits}")
    return resized(quantized), report


def weight_errors(model: nn.Module, tensors: dict[str, Tensor], progress: Progress) -> dict[str, float]:
    """|W - W_q| / |W| of every quantized layer. Raises ValueError where a layer has lost its weights."""
    errors: dict[str, float] = {}
    for name, layer in quantized_layers(model).items():
        weight = tensors[f"{name}.weight"].float()
        error = float((layer.weight.float().cpu() - weight).norm() / weight.norm().clamp(min=1e-12))
        if not error < COLLAPSED:
            raise ValueError(f"Quantizing {name} lost its weights (relative error {error:.2f}); use W8A8.")
        errors[name] = error
        progress.advance(error_bars(errors))
    return errors


def error_bars(errors: dict[str, float]) -> Image.Image:
    """The relative weight error of every layer so far, shown while the node runs."""
    width, height = 512, 256
    picture = Image.new("RGB", (width, height), (250, 250, 252))
    draw, highest = ImageDraw.Draw(picture), max(errors.values()) or 1.0
    for i, error in enumerate(errors.values()):
        left, right = width * i // len(errors), max(width * i // len(errors), width * (i + 1) // len(errors) - 2)
        draw.rectangle((left, height - round((height - 24) * error / highest), right, height), fill=(38, 110, 190))
    title = f"relative weight error of {len(errors)} layers, largest {highest:.4f}"
    draw.text((8, 4), title, (32, 36, 44), ImageFont.load_default(14))
    return picture
