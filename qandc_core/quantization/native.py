"""Quantizes one linear layer to the tensors of ComfyUI's quantized checkpoints.

ComfyUI's own quantization rounds to nearest. The files and kernels are the same here, but the integers are chosen by
GPTQ on calibrated inputs, int8 scales by a search for the least error, and GPTQ's mean output error goes into the bias.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..numerics import ratio, widest_float
from .formats import BY_NAME, Format, check_available, fitting, stored_format
from .gptq import ROUNDINGS, FactoredHessian
from .grids import dequantize as grid_values
from .grids import quantize, token_grid
from .rotation import rotate, rotate_hessian, rotation_group

if TYPE_CHECKING:
    from ..calibration.statistics import LayerStatistics

NATIVE_ROUNDINGS = ("auto", *ROUNDINGS)
COLLAPSE = 0.5
KITCHEN_VALUES = 2**22  # of a weight, which comfy-kitchen packs to grouped codes at once


@dataclass(frozen=True)
class NativeConfig:
    """Format by its name; rounding nearest, gptq, which needs X^T X, or auto: gptq where that is known.

    `clip_search` is of int8 scales only. `bias_correction` is done where the mean input is known; None: where gptq
    chose the codes, since after rounding to nearest it brings layers closer and may take images further away.
    `damping` is relative to the mean of the Hessian's diagonal; the fewer inputs that comes from, the more is added.
    `rounds_inputs`: the layer's activations are in 8 bits too, as the kernels take them; else only the weight is coded.
    """

    format: str = "W8A8"
    rounding: str = "auto"
    clip_search: bool = True
    bias_correction: bool | None = None
    damping: float = 0.01
    rounds_inputs: bool = True

    def __post_init__(self) -> None:
        if self.format not in BY_NAME:
            raise ValueError(f"format must be one of {', '.join(BY_NAME)}, got {self.format!r}.")
        if self.rounding not in NATIVE_ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(NATIVE_ROUNDINGS)}, got {self.rounding!r}.")


@dataclass(frozen=True)
class NativeLayer:
    """`tensors` by their names below the layer's (bias included where there is one), `config` is comfy_quant as a dict,
    `error` the relative output error on held-out inputs where there are any, else of the weight alone where X^T X is
    known, else the weight's. `format` is the format's name, W8A8 for layers promoted from W4A8.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    error: float
    format: str


def working_bytes(outputs: int, inputs: int) -> int:
    """Device memory to round a layer with weight (N, K) by gptq, the weight included: X^T X, its rotation and factor
    of K^2 values each, copies of the weight, and what comfy-kitchen's quantizer takes for its part of the rows.
    """
    rows = min(outputs * inputs, KITCHEN_VALUES)
    return 4 * (inputs * (4 * inputs + 10 * outputs) + 16 * rows)


@torch.no_grad()
def quantize_weight(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    config: NativeConfig,
    statistics: LayerStatistics | None = None,
    moments: Moments | None = None,
) -> NativeLayer | None:
    """The layer with weight (N, K) and bias (N,) or None; None where it has to stay float.

    Raises ValueError on values that are not finite, statistics that the config needs and the file lacks, and a layer
    whose relative error reaches a half.
    """
    layer = rounded_layer(name, weight, bias, config, statistics, moments)
    if layer is not None and not layer.error < COLLAPSE:
        raise ValueError(
            f"{name} cannot be quantized to {layer.format}: its relative error is {layer.error:.2f}; leave it float."
        )
    return layer


@torch.no_grad()
def rounded_layer(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    config: NativeConfig,
    statistics: LayerStatistics | None = None,
    moments: Moments | None = None,
) -> NativeLayer | None:
    """quantize_weight without its limit on the error; `moments` are shared with the layers before."""
    wanted, (outputs, inputs) = BY_NAME[config.format], weight.shape
    check_available(wanted)
    able = fitting(wanted, outputs, inputs)
    if not able:
        return None
    format = able[0]
    weight = weight.detach().float()
    if not torch.isfinite(weight).all():
        raise ValueError(f"The weight of {name} holds values that are not finite; the checkpoint is damaged.")
    moments = moments or Moments()
    hessian = None if statistics is None else moments.second(statistics, weight.device)
    if config.rounding == "gptq" and hessian is None:
        raise ValueError(f"gptq rounding needs the input Hessian of {name}; calibrate with hessians.")
    if hessian is not None and not torch.isfinite(hessian).all():
        raise ValueError(f"The input Hessian of {name} holds values that are not finite; calibrate again.")
    held_out = None if statistics is None else statistics.held_out
    if held_out is not None and not torch.isfinite(held_out).all():
        raise ValueError(f"The held-out inputs of {name} hold values that are not finite; calibrate again.")
    if statistics is not None and hessian is not None:
        config = replace(config, damping=config.damping + statistics.sampling_damping)
    guide = None if config.rounding == "nearest" or hessian is None else moments.rotated(inputs)
    try:
        tensors = weight_tensors(weight, format, config, guide)
    except torch.linalg.LinAlgError as cause:
        raise ValueError(
            f"The Hessian of {name} has no inverse with damping {config.damping:.2g}; raise it."
        ) from cause
    shift = None
    if bias is not None:
        tensors["bias"] = bias = bias.detach()
        corrects = guide is not None if config.bias_correction is None else config.bias_correction
        if corrects and statistics is not None:
            tensors["bias"] = corrected_bias(name, weight, bias, tensors, statistics)
            shift = tensors["bias"].float() - bias.float()
    if held_out is not None and len(held_out):
        error = held_out_error(weight, tensors, held_out.to(weight.device), shift, config.rounds_inputs)
    else:
        error = output_error(weight, tensors, hessian)
    return NativeLayer(tensors, layer_config(tensors), error, format.name)


class Moments:
    """X^T X of the inputs that were asked for last, and what gptq makes of it; query, key and value have the same."""

    def __init__(self) -> None:
        self.statistics: LayerStatistics | None = None
        self.hessian: Tensor | None = None
        self.guide: FactoredHessian | None = None

    def second(self, statistics: LayerStatistics, device: torch.device) -> Tensor | None:
        """X^T X (K, K) on the device, None where it is not known."""
        known = self.statistics is not None and self.hessian is not None and self.hessian.device == device
        if not known or not same_inputs(self.statistics, statistics):
            self.statistics = self.hessian = self.guide = None  # frees the last one first
            self.statistics, self.hessian = statistics, statistics.second_moment(device)
        return self.hessian

    def rotated(self, width: int) -> FactoredHessian:
        """X^T X of the inputs as a format rotates them."""
        group = rotation_group(width)
        assert group is not None and self.hessian is not None
        if self.guide is None:
            self.guide = FactoredHessian(rotate_hessian(self.hessian, group))
        return self.guide


def same_inputs(a: LayerStatistics | None, b: LayerStatistics) -> bool:
    """True if two layers have the same inputs, judged by the statistics of them."""
    if a is None or a is b:
        return a is b
    kept = ((a.mean, b.mean), (a.hessian, b.hessian), (a.inputs, b.inputs))
    return a.count == b.count and all(
        x is y or (x is not None and y is not None and x.device == y.device and torch.equal(x, y)) for x, y in kept
    )


def weight_tensors(
    weight: Tensor, format: Format, config: NativeConfig, hessian: FactoredHessian | None
) -> dict[str, Tensor]:
    """The format's tensors for weight (N, K), which it takes; hessian of rotated inputs where gptq chooses codes."""
    group = rotation_group(weight.shape[1])
    assert group is not None
    rotated = rotate(weight, group)
    tensors = format.encode(weight, rotated, group, hessian, config.clip_search, config.damping)
    tensors["comfy_quant"] = mark(format.config(group))
    return tensors


def corrected_bias(
    name: str, weight: Tensor, bias: Tensor, tensors: dict[str, Tensor], statistics: LayerStatistics
) -> Tensor:
    """b + (W - W_q) E[x] (N,) in the bias's dtype: the mean output is that of the float layer."""
    wide = widest_float(weight.device)
    shift = (weight - dequantize(tensors)).to(wide) @ statistics.mean.to(weight.device, wide)
    corrected = (bias.to(wide) + shift).to(bias.dtype)
    if not torch.isfinite(corrected).all():
        raise ValueError(f"The corrected bias of {name} is not finite; calibrate again.")
    return corrected


def mark(config: Mapping[str, Any]) -> Tensor:
    """The comfy_quant tensor that says `config`."""
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def layer_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The decoded comfy_quant tensor."""
    return json.loads(bytes(tensors["comfy_quant"].tolist()))


def format_of(tensors: Mapping[str, Tensor]) -> Format:
    """The format of a layer's tensors, comfy_quant among them. Raises ValueError where it is none of ours."""
    config = layer_config(tensors)
    format = stored_format(config, tensors)
    if format is None:
        raise ValueError(f"The format {config['format']} is unknown.")
    return format


def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight (N, K) that the tensors of any format stand for, in the basis of the inputs, float32."""
    group = rotation_of(tensors)
    values = stored_values(tensors)
    return values if group is None else rotate(values, group)


def rotation_of(tensors: Mapping[str, Tensor]) -> int | None:
    """The group in which the format's inputs are rotated; None where they are not."""
    return format_of(tensors).rotation(layer_config(tensors))


def stored_values(tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight (N, K) in the basis of the kernel, float32."""
    return format_of(tensors).decode(tensors)


def kernel_output(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """x W_q^T (M, N) float32 as the int8 kernel multiplies: each row of x (M, K) in 8 bits."""
    group, x = rotation_of(tensors), x.float()
    rotated = x if group is None else rotate(x, group)
    grid = token_grid(rotated, 8)
    return grid_values(quantize(rotated, grid), grid) @ stored_values(tensors).T


def held_out_error(
    weight: Tensor, tensors: dict[str, Tensor], x: Tensor, shift: Tensor | None = None, rounds_inputs: bool = True
) -> float:
    """|y_q - y| / |y| of the layer's outputs for inputs x (M, K), bias aside; shift (N,) is its correction."""
    exact = x.float() @ weight.float().T
    lost = (kernel_output(tensors, x) if rounds_inputs else x.float() @ dequantize(tensors).T) - exact
    if shift is not None:
        lost += shift
    wide = widest_float(x.device)
    return ratio(float(lost.to(wide).norm()), float(exact.to(wide).norm()))


def output_error(weight: Tensor, tensors: dict[str, Tensor], hessian: Tensor | None = None) -> float:
    """sqrt(tr(D H D^T) / tr(W H W^T)), D = W - W_q, over inputs with X^T X = H; without H that of the weight itself."""
    weight = weight.float()
    lost, whole = (squared_norm(w, hessian) for w in (weight - dequantize(tensors), weight))
    return ratio(lost, whole) ** 0.5


def squared_norm(weight: Tensor, hessian: Tensor | None) -> float:
    """tr(W H W^T), or ||W||^2; in float64 where the device has it, since errors lie where H is small."""
    w = weight.to(widest_float(weight.device))
    outputs = w if hessian is None else w @ hessian.to(w)
    return max(0.0, float((outputs * w).sum()))
