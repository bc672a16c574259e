"""Quantizes the linear layers of a model in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ..calibration.file import FINGERPRINT, fingerprint
from ..distributed import ALONE, Distributed, owners
from ..models.dit import check_open
from ..models.layers import named_linears
from ..values import real_number
from .clipping import CLIPPINGS, activation_bounds
from .gptq import ROUNDINGS, gptq_codes, rounding_cost
from .grids import Grid, affine_grid, quantize, symmetric_grid, weight_grid
from .linear import LinearFormat, QuantizedLinear
from .matmul import BACKENDS

if TYPE_CHECKING:
    from ..calibration.file import Calibration
    from ..calibration.statistics import LayerStatistics

NATIVE_SKIP = ("t_embedder",)  # of our DiT in ComfyUI's formats: modulations, a third of its weights, are quantized


@dataclass(frozen=True)
class QuantizationConfig:
    """Choices beyond bits. `static` None means static per-tensor activations exactly where statistics are given.

    `clipping` sets static bounds: minmax (the paper's), percentile or mse. `rounding` gptq needs Hessians.
    """

    static: bool | None = None
    symmetric_weights: bool = True
    symmetric_activations: bool = False
    clipping: str = "minmax"
    percentile: float = 99.99
    rounding: str = "nearest"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}.")
        if self.clipping not in CLIPPINGS:
            raise ValueError(f"clipping must be one of {', '.join(CLIPPINGS)}, got {self.clipping!r}.")
        real_number(vars(self), "percentile", 0, 100)
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}.")


def quantize_model(
    model: nn.Module,
    w_bits: int = 8,
    a_bits: int = 8,
    skip_patterns: Sequence[str] = (),
    calibration: Calibration | None = None,
    config: QuantizationConfig | None = None,
    callback: Callable[[str, int, int], None] | None = None,
    process: Distributed = ALONE,
) -> nn.Module:
    """Replaces linear layers by quantized ones (Q&C, Eq. 1-3), in place, and returns the model.

    Weights per output channel. Activations dynamic per token, or static per tensor with a calibration, unless
    `config.static` says otherwise. Layers with an odd number of inputs keep 8-bit codes. Raises ValueError, before any
    layer is replaced, on weights that are not finite, a calibration of another model, or statistics that the config
    needs and the file lacks. callback(layer, index, layers) before each layer. Several processes share the rounding
    out, and each returns the whole model.

    Works on any model of torch.nn.Linear layers, diffusers' transformers included; save_pretrained of those then raises
    ValueError, since from_pretrained has no place for the codes.
    """
    config = config or QuantizationConfig()
    check_open(model, "quantize")
    static = calibration is not None if config.static is None else config.static
    if calibration is not None:
        calibration.check_model(model)
    elif static or config.rounding == "gptq":
        raise ValueError("Static activations and gptq rounding need calibration=; run the calibration first.")
    format = LinearFormat(w_bits, a_bits, static, config.symmetric_weights, config.symmetric_activations)
    layers = list(named_linears(model, skip_patterns))
    if not layers:
        raise ValueError(f"No linear layer is left to quantize with skip_patterns {list(skip_patterns)}.")
    replacements = {}
    taken = owners([rounding_cost(linear) for _, linear in layers], process.world)
    for index, (name, linear) in enumerate(layers):
        statistics = calibration.layer(name) if calibration is not None else None
        if taken[index] != process.rank:
            continue
        if callback is not None:
            callback(name, index, len(layers))
        replacements[name] = quantize_linear(name, linear, format, config, statistics)
    if process.world > 1:
        for (name, linear), owner in zip(layers, taken):
            if owner != process.rank:
                replacements[name] = QuantizedLinear.like(linear, packable(format, linear), config.backend)
            receive(replacements[name], owner, process)
    setattr(model, FINGERPRINT, fingerprint(model))
    for name, replacement in replacements.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, replacement)
    if hasattr(model, "save_pretrained"):
        setattr(model, "save_pretrained", refuse_saving)  # noqa: B010
    return model


def receive(layer: QuantizedLinear, owner: int, process: Distributed) -> None:
    """Gives the layer the values that its owner computed."""
    layer.load_state_dict({key: process.sent(value.cpu(), owner) for key, value in layer.state_dict().items()})


def packable(format: LinearFormat, linear: nn.Linear) -> LinearFormat:
    """The format, or its 8 bits for a layer with an odd number of inputs, which cannot be packed in pairs."""
    return replace(format, w_bits=8) if format.packed and linear.in_features % 2 else format


def refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    """Replaces diffusers' save_pretrained, whose from_pretrained would ignore the codes and use random weights."""
    raise ValueError(
        "from_pretrained cannot read a quantized model back; save it before quantize_model, and quantize it again "
        "after loading."
    )


@torch.no_grad()
def quantize_linear(
    name: str, linear: nn.Linear, format: LinearFormat, config: QuantizationConfig, statistics: LayerStatistics | None
) -> QuantizedLinear:
    check_plain(name, linear)
    weight = linear.weight.detach().float()
    if not torch.isfinite(weight).all():
        raise ValueError(f"The weight of {name} holds values that are not finite; the checkpoint is damaged.")
    format = packable(format, linear)
    grid = weight_grid(weight, format.w_bits, format.symmetric)
    if config.rounding == "gptq":
        hessian = None if statistics is None else statistics.second_moment(weight.device)
        if hessian is None:
            raise ValueError(f"gptq rounding needs the input Hessian of {name}; calibrate with hessians.")
        codes = gptq_codes(weight, hessian, grid)
    else:
        codes = quantize(weight, grid)
    inputs = activation_grid(statistics, format.a_bits, config, weight.device) if format.static else None
    return QuantizedLinear.from_codes(linear, codes, grid, format, inputs, config.backend)


def check_plain(name: str, linear: nn.Linear) -> None:
    """Refuses layers of other libraries that keep something else than a matrix of floats under `weight`."""
    weight, expected = linear.weight, (linear.out_features, linear.in_features)
    if weight.is_meta or not weight.is_floating_point() or tuple(weight.shape) != expected:
        raise ValueError(
            f"The weight of {name} is {tuple(weight.shape)} of {weight.dtype} on {weight.device}, expected {expected} "
            "floating-point values; load the model in full precision, or leave the layer out with skip_patterns."
        )


def activation_grid(
    statistics: LayerStatistics | None, bits: int, config: QuantizationConfig, device: torch.device
) -> Grid:
    """The static per-tensor grid from the bounds seen on the calibration set."""
    assert statistics is not None
    low, high = activation_bounds(statistics, config.clipping, bits, config.percentile, config.symmetric_activations)
    if config.symmetric_activations:
        return symmetric_grid(torch.tensor(max(-low, high), device=device), bits)
    return affine_grid(torch.tensor(low, device=device), torch.tensor(high, device=device), bits)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def linear_weight_bytes(model: nn.Module) -> int:
    """Bytes that the weights of all linear layers take, with scales, zero points and packing, without biases."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += module.weight.nbytes
        elif isinstance(module, QuantizedLinear):
            tensors: list[Tensor | None] = [module.codes, module.weight_scale, module.weight_zero]
            total += sum(t.nbytes for t in tensors if t is not None)
            if module.codes is None:
                total += module.in_features * module.out_features
    return total
