"""The paper's quantization of a class-conditional DiT: static activations, in layers of our own."""

from __future__ import annotations

import logging
import uuid
from typing import Any

from torch import Tensor, nn

from ....qandc_core.calibration.file import FINGERPRINT, Calibration
from ....qandc_core.checkpoints.quantized import quantized_metadata
from ....qandc_core.models.layers import DIT_SKIP, named_linears
from ....qandc_core.numerics import relative_error
from ....qandc_core.quantization.model import QuantizationConfig, linear_weight_bytes, quantize_model, quantized_layers
from ....qandc_core.quantization.native import COLLAPSE
from ..model.dit import is_dit, new_patcher, quantized_dit, resized
from ..pictures import error_bars
from ..sampling import Progress
from ..wrappers import note
from .layers import check_loras, check_not_quantized
from .patcher import as_paper
from .weights import fingerprint_of, patched_tensors

log = logging.getLogger(__name__)


def quantized_patcher(
    patcher, w_bits: int, a_bits: int, calibration: Calibration | None, config: QuantizationConfig
) -> tuple[Any, str]:
    """A quantized copy that keeps the model's wrappers, and its report; LoRAs are merged into the weights."""
    source = patcher.model.diffusion_model
    if not is_dit(patcher):
        raise ValueError(
            f"The method paper supports class-conditional DiTs, this is {type(patcher.model).__name__}; choose the "
            "method native."
        )
    check_not_quantized(source)
    check_loras(patcher)
    tensors = patched_tensors(patcher)
    fresh = new_patcher(source.config, source.dtype, tensors)
    model = fresh.model.diffusion_model
    model.float()  # LoRAs are in the weights in float32: half precision would lose a weak one before it is quantized
    fresh.model.load_model_weights(dict(tensors), "", assign=fresh.is_dynamic())
    setattr(model, FINGERPRINT, fingerprint_of(patcher))
    progress = Progress(patcher, 2 * len(list(named_linears(model, DIT_SKIP))))
    before = linear_weight_bytes(model)
    quantize_model(model, w_bits, a_bits, DIT_SKIP, calibration, config, lambda *_: progress.advance())
    errors = weight_errors(model, tensors, progress)
    model.to(dtype=source.dtype)
    worst = max(errors, key=lambda name: errors[name])
    report = (
        f"{len(errors)} layers in W{w_bits}A{a_bits}, linear weights {before / 2**20:.1f} -> "
        f"{linear_weight_bytes(model) / 2**20:.1f} MiB, largest relative weight error {errors[worst]:.4f} in {worst}"
    )
    log.info("Q&C quantization: %s", report)
    quantized = patcher.clone(model_override=fresh.get_clone_model_override())
    quantized.patches, quantized.patches_uuid = {}, uuid.uuid4()
    # ComfyUI builds a second copy from this recipe where it needs one, for torch.compile or hooks with dynamic VRAM.
    quantized.cached_patcher_init = (quantized_dit, (model.state_dict(), quantized_metadata(model), source.dtype))
    note(quantized, "quantization", f"W{w_bits}A{a_bits}", f"W{w_bits}A{a_bits} {config}")
    return as_paper(resized(quantized)), report


def weight_errors(model: nn.Module, tensors: dict[str, Tensor], progress: Progress) -> dict[str, float]:
    """|W - W_q| / |W| of every quantized layer. Raises ValueError where a layer has lost its weights."""
    errors: dict[str, float] = {}
    for name, layer in quantized_layers(model).items():
        weight = tensors[f"{name}.weight"].float()
        error = relative_error(layer.weight.float().cpu(), weight)
        if not error < COLLAPSE:
            raise ValueError(f"Quantizing {name} lost its weights (relative error {error:.2f}); use W8A8.")
        errors[name] = error
        progress.advance(error_bars(errors))
    return errors
