"""Calls of a model that calibration keeps aside, to measure a quantized model on: as tensors and a JSON structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TENSOR, SEQUENCES = "tensor", {"list": list, "tuple": tuple}


@dataclass(frozen=True)
class ModelCall:
    """The input x and noise level sigma of one call, and its conditions: tensors, numbers, strings, None, or lists and
    tuples of those.
    """

    x: Tensor
    sigma: Tensor
    conditions: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        sizes: list[int] = []
        self.mapped(lambda tensor: sizes.append(tensor.nbytes))
        return sum(sizes)

    def copied(self, device: torch.device | str) -> ModelCall:
        """A copy that shares no memory, on a device but for what lies on the host."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(tensor.device if tensor.device.type == "cpu" else device, copy=True)

        return self.mapped(copy)

    def fetched(self) -> ModelCall:
        """On the CPU; itself where it is there."""
        return self.mapped(lambda tensor: tensor.cpu())

    def mapped(self, change: Callable[[Tensor], Any]) -> ModelCall:
        """The call with change(tensor) in place of every tensor."""
        conditions = {name: mapped(value, change) for name, value in self.conditions.items()}
        return ModelCall(change(self.x), change(self.sigma), conditions)


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(part, change) for part in value])
    return change(value) if isinstance(value, Tensor) else value


def storable(value: Any) -> bool:
    """True if a condition can be stored."""
    if isinstance(value, (list, tuple)):
        return type(value) in SEQUENCES.values() and all(map(storable, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def pack_calls(calls: Sequence[ModelCall]) -> tuple[dict[str, Tensor], list]:
    """Tensors by names "held_out/<call>/<number>", and what json can hold of the rest, an entry for each call.

    Raises ValueError on a condition that is not storable.
    """
    tensors: dict[str, Tensor] = {}

    def packed(call: int, value: Any) -> Any:
        if isinstance(value, Tensor):
            name = f"held_out/{call}/{len(tensors)}"
            tensors[name] = value.detach().cpu().clone().contiguous()  # safetensors refuses views of one tensor
            return {TENSOR: name}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [packed(call, part) for part in value]}
        return value

    structure = []
    for number, call in enumerate(calls):
        for name, value in call.conditions.items():
            if not storable(value):
                raise ValueError(f"The condition {name} is a {type(value).__name__}, which no file can hold; skip it.")
        conditions = {name: packed(number, value) for name, value in call.conditions.items()}
        structure.append({"x": packed(number, call.x), "sigma": packed(number, call.sigma), "conditions": conditions})
    return tensors, structure


def unpack_calls(tensors: Mapping[str, Tensor], structure: Sequence[dict]) -> tuple[ModelCall, ...]:
    """The calls that were packed. Raises KeyError on a tensor that is missing."""

    def unpacked(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        return tensors[content] if kind == TENSOR else SEQUENCES[kind](map(unpacked, content))

    return tuple(
        ModelCall(
            unpacked(call["x"]),
            unpacked(call["sigma"]),
            {name: unpacked(value) for name, value in call["conditions"].items()},
        )
        for call in structure
    )
