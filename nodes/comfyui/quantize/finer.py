"""LoRAs kept on layers of few bits: while one is on a layer, its weight is stored in a finer format.

A change of 1 % is a small part of a 4-bit step, and rounding the sum to the old codebook again loses about a tenth of
it. int8 takes one scale for each row of the sum, and rounds without bias (stochastically, as ComfyUI does).
comfy-kitchen picks the kernel by the weight's layout, so the module that holds it needs no change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.utils
import torch
from torch import Tensor, nn

from ....qandc_core.quantization.formats import STORED, packed_format
from ....qandc_core.quantization.formats.base import Format
from ....qandc_core.quantization.native import mark


def finer_format(weight: object) -> Format | None:
    """The format that a weight takes while a LoRA is on it; None where it keeps its own."""
    format = packed_format(weight)
    return None if format is None else format.patched


@contextmanager
def set_finer(model: nn.Module, key: str) -> Iterator[None]:
    """Lets the module that holds the weight `key` store what is set in the weight's finer format, if it has one."""
    owner, _, attribute = key.rpartition(".")
    module = comfy.utils.get_attr(model, owner) if owner and attribute == "weight" else None
    weight = getattr(module, "weight", None)
    if module is None or finer_format(weight) is None:
        yield
        return

    def set_weight(changed: Tensor, inplace_update=False, seed=None, return_weight=False, **kwargs) -> Tensor | None:
        assert not inplace_update  # as core's set_weight of quantized weights: the backup is of another size
        stored = stored_finer(weight, changed, seed or 0)
        if return_weight:
            return stored
        module.weight = nn.Parameter(stored, requires_grad=False)
        return None

    module.set_weight = set_weight
    try:
        yield
    finally:
        del module.set_weight


def stored_finer(weight: Any, changed: Tensor, seed: int) -> Any:
    """The QuantizedTensor of `changed` (N, K), a changed decoded `weight`, in the weight's finer format."""
    format = finer_format(weight)
    assert format is not None
    rotation = {"convrot": True, "convrot_groupsize": weight._params.convrot_groupsize}
    packed = type(weight).from_float(
        changed.float(), format.layouts[0], per_channel=True, stochastic_rounding=seed, **rotation
    )
    return packed.to(weight.dtype)


def finer_parts(weight: Any) -> dict[str, Tensor]:
    """Tensors without values, of the types and shapes that a file has for the weight in its finer format."""
    rows = weight.shape[0]
    return {
        "weight": torch.empty(weight.shape, dtype=torch.int8, device="meta"),
        "weight_scale": torch.empty(rows, 1, dtype=torch.float32, device="meta"),
    }


def growth(weight: Any) -> int:
    """Extra bytes of the weight in its finer format; 0 where it keeps its own."""
    if finer_format(weight) is None:
        return 0
    now = sum(part.nbytes for part in weight.state_dict("").values())
    return sum(part.nbytes for part in finer_parts(weight).values()) - now


def corrected_mark(module: Any, format: Format) -> Tensor | None:
    """comfy_quant of a module whose weight is (or will be saved) in `format`; None where the module's own is right."""
    named = getattr(module, "quant_format", "")
    if named not in STORED or named == format.stored:
        return None
    config = format.config(module.weight._params.convrot_groupsize)
    if getattr(module, "_full_precision_mm_config", False):
        config["full_precision_matrix_mult"] = True
    return mark(config)


def decode_at_call(module: Any) -> None:
    """Under dynamic VRAM: adds a LoRA to the decoded weight at every call, not to what is then rounded again.

    ComfyUI rounds the results of `weight_lowvram_function`, and keeps in float those of `weight_function`.
    """
    patch = getattr(module, "weight_lowvram_function", None)
    if patch is not None and finer_format(getattr(module, "weight", None)) is not None:
        module.weight_lowvram_function = None
        module.weight_function = [patch, *module.weight_function]
