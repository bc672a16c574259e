"""Each quantized layer's share of the whole model's error, measured on calls that no statistics come from.

The errors of layers add up like independent noise, E^2 = sum_l s_l e_l^2, with e_l the relative error of a layer's own
output. A layer's e_l says little of its share: one at the end of a network changes the prediction by all that it loses,
one inside attention by a tenth of it. So s_l is measured: with one group of layers quantized and everything else as it
is, s = E^2 / sum e_l^2 of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .native import NativeLayer, kernel_output

GROUPS = 64  # the maximum number of measurements for the shares


class ModelError(Protocol):
    """The model's relative error where these layers are quantized and all others are as they are; `rough` is enough
    to compare shares, as of a few of the calls.
    """

    def __call__(self, layers: Mapping[str, NativeLayer], rough: bool = False) -> float: ...


def sensitivities(layers: Mapping[str, NativeLayer], model_error: ModelError, most: int = GROUPS) -> dict[str, float]:
    """s_l of every layer, the same for those of one group."""
    found: dict[str, float] = {}
    for names in grouped(list(layers), most):
        whole = model_error({name: layers[name] for name in names}, rough=True) ** 2
        own = sum(layers[name].error ** 2 for name in names)
        found |= dict.fromkeys(names, whole / own if own > 0 else 0.0)
    return found


def grouped(names: Sequence[str], most: int = GROUPS) -> list[list[str]]:
    """Each layer alone where there are at most `most`; else those of the same place in blocks next to each other."""
    if len(names) <= most:
        return [[name] for name in names]
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(name)
    parts = max(1, most // len(kinds))
    groups = []
    for members in kinds.values():
        edges = [len(members) * i // parts for i in range(parts + 1)]
        groups += [members[a:b] for a, b in zip(edges, edges[1:]) if a < b]
    return groups


@contextmanager
def answering_as(network: nn.Module, layers: Mapping[str, NativeLayer]) -> Iterator[None]:
    """While it lasts, these linear layers of the network answer what the kernel makes of the quantized ones."""
    handles = [network.get_submodule(name).register_forward_hook(answer_of(layer)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def answer_of(layer: NativeLayer) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def answer(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        tensors = {key: value.to(x.device) if key != "comfy_quant" else value for key, value in layer.tensors.items()}
        y = kernel_output(tensors, x.flatten(0, -2))
        if "bias" in tensors:
            y += tensors["bias"].to(torch.float32)
        return y.view(output.shape).to(output.dtype)

    return answer
