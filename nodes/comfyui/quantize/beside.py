"""LoRAs on quantized layers: the layer keeps its codes, and what the LoRA adds is computed beside them.

Core decodes a quantized weight, adds the LoRA and rounds the sum again. Where a LoRA has a structure that can be
applied on its own (LoRA, LoHa, LoKr, at offsets too), our layers add it to their output instead. What has none (full
differences, DoRA, merges of models) leaves the layer in floating point while it is on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ....qandc_core.quantization.adapters import Beside, Kronecker, LowRank, Term, beside, hadamard_product, placed
from ....qandc_core.quantization.formats import packed_format
from ....qandc_core.quantization.formats.plain_int8 import from_stock, to_stock


class BesideLayer:
    """Made part of a quantized linear layer's class by `with_besides`."""

    weight: Any
    beside: Beside | None = None
    hooked: Beside | None = None  # of LoRA hooks, on top

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        output = super().forward(input, *args, **kwargs)  # type: ignore[misc]
        for extra in (self.beside, self.hooked):
            if extra is not None:
                output = output + extra(input)
        return output

    def relabel(self) -> None:
        """Gives int8 weights a layout of another name while the layer's answer is more than their product.

        Some models hand an activation and the layer to `comfy.ops.linear_input_act`, which reads stock int8 weights
        itself and never calls the layer; that is how core's bypass loaders lose LoRAs there.
        """
        weight = self.weight
        if packed_format(weight) is None:
            return
        more = self.beside is not None or self.hooked is not None or "forward" in vars(self)
        changed = from_stock(weight) if more else to_stock(weight)
        if changed is not weight:
            self.weight = nn.Parameter(changed, requires_grad=False)


@cache
def layer_class(base: type) -> type:
    return type(f"Beside{base.__name__}", (BesideLayer, base), {})


def with_besides(network: nn.Module) -> None:
    """Lets the network's layers with weights in our formats take LoRAs beside them."""
    for module in network.modules():
        if packed_format(getattr(module, "weight", None)) is not None and not isinstance(module, BesideLayer):
            kind: Any = type(module)
            module.__class__ = layer_class(kind)


def beside_of(patches: Sequence[tuple], weight: Any) -> Beside | None:
    """The sum of core's patches of a packed weight, in the weight's dtype; None where some have no structure, or
    where the layer in floating point would take less memory.
    """
    shape, terms = tuple(weight.shape), []
    for strength, value, strength_model, offset, function in patches:
        part = shape if offset is None else tuple(offset[2] if i == offset[0] else n for i, n in enumerate(shape))
        found = None if function is not None or strength_model != 1.0 else structured(value, part)
        if found is None or shape_of(found) != part:
            return None
        found = scaled(found, strength)
        terms.append(found if offset is None else placed(found, shape, offset[0], offset[1]))
    if not terms:
        return None
    sum_ = beside([scaled(term, 1.0, weight.dtype) for term in terms])
    return sum_ if sum_.nbytes < growth_as_float(weight) else None


def growth_as_float(weight: Any) -> int:
    """Extra bytes of a packed weight in floating point."""
    return weight.numel() * weight.dtype.itemsize - sum(part.nbytes for part in weight.state_dict("").values())


def structured(value: Any, shape: tuple[int, ...]) -> Term | None:
    """The term of one of core's weight adapters, float32; None where it is none, or has none."""
    read = READERS.get(getattr(value, "name", ""))
    return None if read is None else read(value.weights, shape)


def of_lora(weights: tuple, shape: tuple[int, ...]) -> Term | None:
    up, down, alpha, mid, dora, reshape = (*weights, None, None)[:6]
    if mid is not None or dora is not None or reshape is not None:
        return None
    return scaled(LowRank(matrix(up), matrix(down)), 1.0 if alpha is None else alpha / down.shape[0])


def of_loha(weights: tuple, shape: tuple[int, ...]) -> Term | None:
    up, down, alpha, other_up, other_down, tucker, other_tucker, dora = weights
    if tucker is not None or other_tucker is not None or dora is not None:
        return None
    rank = down.shape[0]
    if rank * other_down.shape[0] * sum(shape) > shape[0] * shape[1]:
        return None  # no smaller than the matrix itself
    product = hadamard_product(LowRank(matrix(up), matrix(down)), LowRank(matrix(other_up), matrix(other_down)))
    return scaled(product, 1.0 if alpha is None else alpha / rank)


def of_lokr(weights: tuple, shape: tuple[int, ...]) -> Term | None:
    left, right, alpha, left_up, left_down, right_up, right_down, tucker, dora = weights
    if tucker is not None or dora is not None or (right is not None and right.ndim != 2):
        return None
    rank = None
    if left is None:
        left, rank = matrix(left_up) @ matrix(left_down), left_down.shape[0]
    if right is None:
        right, rank = matrix(right_up) @ matrix(right_down), right_down.shape[0]
    scale = alpha / rank if alpha is not None and rank is not None else 1.0
    return scaled(Kronecker(matrix(left), matrix(right)), scale)


READERS: dict[str, Callable[[tuple, tuple[int, ...]], Term | None]] = {
    "lora": of_lora,
    "loha": of_loha,
    "lokr": of_lokr,
}


def matrix(value: Tensor) -> Tensor:
    """In float32 and on the CPU: core's bypass loader moves a LoRA's tensors, one at a time."""
    return value.detach().to("cpu", torch.float32).flatten(1)


def scaled(term: Term, factor: float, dtype: torch.dtype = torch.float32) -> Term:
    first, second = (term.up, term.down) if isinstance(term, LowRank) else (term.left, term.right)
    return type(term)((float(factor) * first).to(dtype), second.to(dtype))


def shape_of(term: Term) -> tuple[int, int]:
    if isinstance(term, LowRank):
        return term.up.shape[0], term.down.shape[1]
    return term.left.shape[0] * term.right.shape[0], term.left.shape[1] * term.right.shape[1]
