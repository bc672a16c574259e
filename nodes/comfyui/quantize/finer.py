"""Quantized layers whose whole matrix a patch changes: how the changed weight is held, and how it is saved.

Most LoRAs are computed beside the layer (beside.py). A merge, a full difference or DoRA changes every weight: a layer
of 4 bits holds the sum in int8, whose steps are a tenth of its own, with one scale for each row; one of 6 or 8 bits
holds it in floating point, since rounding to int8 would cost it a tenth of its error and more. In a file the sum is
rounded without bias (stochastically, as ComfyUI does), since a change is a small part of a step. comfy-kitchen picks
the kernel by the weight's layout, so the module that holds it needs no change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ....qandc_core.quantization.formats import packed_format
from ....qandc_core.quantization.formats.base import Format
from ....qandc_core.quantization.formats.plain_int8 import to_stock
from ....qandc_core.quantization.native import mark
from .beside import growth_as_float

COARSE = 4  # bits of weights that int8 is fine enough for


def finer_format(weight: object) -> Format | None:
    """The format in which a file has a weight with patches in it; None where that is its own."""
    format = packed_format(weight)
    return None if format is None else format.patched


def held_format(weight: object) -> Format | None:
    """The format in which a layer holds a weight that a patch changes wholly; None where that is floating point."""
    format = packed_format(weight)
    return None if format is None or format.weight_bits > COARSE else format.patched


@contextmanager
def holds_patched(module: Any, weight: Any) -> Iterator[None]:
    """Lets the module of a packed `weight` hold what is set as `stored_patched` has it, not rounded as before."""

    def set_weight(changed: Tensor, inplace_update=False, seed=None, return_weight=False, **kwargs) -> Tensor | None:
        assert not inplace_update  # as core's set_weight of quantized weights: the backup is of another size
        stored = stored_patched(weight, changed, seed or 0)
        if return_weight:
            return stored
        module.weight = nn.Parameter(stored, requires_grad=False)
        return None

    module.set_weight = set_weight
    try:
        yield
    finally:
        del module.set_weight


def stored_patched(weight: Any, changed: Tensor, seed: int) -> Any:
    """`changed` (N, K), a changed decoded `weight`, as a layer holds it: in its held format or in floating point."""
    return changed.to(weight.dtype) if held_format(weight) is None else stored_finer(weight, changed, seed)


def for_file(weight: Any, changed: Tensor, seed: int) -> Any:
    """The QuantizedTensor of `changed` for a file: in the finer format, else in the weight's own."""
    if finer_format(weight) is not None:
        return stored_finer(weight, changed, seed)
    packed = to_stock(weight).requantize_from_float(changed.float(), scale="recalculate", stochastic_rounding=seed)
    return packed.to(weight.dtype)


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


def growth(module: Any, weight: Any) -> int:
    """Extra bytes of a module whose packed weight is held as `stored_patched` has it."""
    format = packed_format(weight)
    assert format is not None
    if held_format(weight) is None:
        return growth_as_float(weight) - file_mark(module, weight, format).nbytes  # which only packed weights have
    now = sum(part.nbytes for part in weight.state_dict("").values())
    return sum(part.nbytes for part in finer_parts(weight).values()) - now


def file_mark(module: Any, weight: Any, format: Format) -> Tensor:
    """comfy_quant of a module with this packed weight, or with one that is patched and saved in `format`."""
    params = weight._params
    config: dict = (
        format.config(params.convrot_groupsize) if getattr(params, "convrot", True) else {"format": format.stored}
    )
    if getattr(module, "_full_precision_mm_config", False):
        config["full_precision_matrix_mult"] = True
    return mark(config)


def decode_at_call(module: Any) -> None:
    """Under dynamic VRAM: adds a patch to the decoded weight at every call, not to what is then rounded again.

    ComfyUI rounds the results of `weight_lowvram_function`, and keeps in float those of `weight_function`.
    """
    patch = getattr(module, "weight_lowvram_function", None)
    if patch is not None and packed_format(getattr(module, "weight", None)) is not None:
        module.weight_lowvram_function = None
        module.weight_function = [patch, *module.weight_function]
