"""One linear layer as the tensors of ComfyUI's quantized checkpoints, with codes of our own choice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .gptq import gptq, gptq_codes
from .hadamard import rotate, rotate_hessian, rotation_group
from .quantizer import Grid, pack_int4, quantize, symmetric_grid, unpack_int4
from .quantizer import dequantize as grid_values

if TYPE_CHECKING:
    from ..calibration.statistics import LayerStatistics

INT8, W4A8 = "int8_tensorwise", "asym_w4a8_int8"
FORMATS = {"W8A8": INT8, "W4A8": W4A8}
ROUNDINGS = ("nearest", "gptq")
GROUP = 16  # W4A8: weights that share a relative scale
# Rounding costs a row K (absmax / 127)^2 / 12: cutting its one outlier pays up to K / (12 * 127^2), 6 % at K = 12288.
CLIPS = tuple(1 - step / 100 for step in range(1, 11))
COLLAPSE = 0.5


@dataclass(frozen=True)
class NativeConfig:
    """Format W8A8 or W4A8; rounding nearest, or gptq, which needs Hessians. `clip_search` is of int8 scales only."""

    format: str = "W8A8"
    rounding: str = "nearest"
    clip_search: bool = True
    bias_correction: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}.")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}.")


@dataclass(frozen=True)
class NativeLayer:
    """`tensors` by their names below the layer's (bias included where there is one), `config` is comfy_quant as a dict,
    `error` the relative output error of the weight alone where a Hessian is known, else its relative error; `format`
    is the checkpoint's name of the format, which is int8_tensorwise for layers promoted from W4A8.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    error: float
    format: str


# The grids.


@dataclass(frozen=True)
class CodebookGrid:
    """The values round(clamp(codebook[c] * relative, +-127)) * channel of W4A8: codebook (16,), relative (N, K / 16)
    e4m3, channel (N,).
    """

    codebook: Tensor
    relative: Tensor
    channel: Tensor

    def levels(self) -> Tensor:
        """The int8 weights that codes stand for, (K / 16, N, 16)."""
        scales = self.relative.float().T.contiguous()
        return (scales[..., None] * self.codebook).round_().clamp_(-127, 127)


def nearest_level(levels: Tensor, x: Tensor) -> Tensor:
    """Index into ascending levels (..., 16) that is nearest to x (..., M); the lower one of two, as comfy-kitchen's."""
    above = torch.searchsorted(levels, x)
    below = (above - 1).clamp_(min=0)
    above.clamp_(max=levels.shape[-1] - 1)
    closer = (x - levels.gather(-1, above)).abs() < (x - levels.gather(-1, below)).abs()
    return torch.where(closer, above, below)


def stock_grid(weight: Tensor, group: int) -> CodebookGrid:
    """The grid that comfy-kitchen's own quantizer gives weight (N, K)."""
    from comfy_kitchen import quantize_w4a8_int8_weight

    _, relative, channel, _, codebook = quantize_w4a8_int8_weight(weight, GROUP, group)
    return CodebookGrid(codebook, relative, channel)


def int8_grid(rotated: Tensor, clip_search: bool) -> Grid:
    """One symmetric grid for each row of (N, K), up to absmax or, by search, to where its squared error is least."""
    absmax = rotated.abs().amax(dim=1, keepdim=True)
    best = symmetric_grid(absmax, 8)
    if not clip_search:
        return best
    least = row_errors(rotated, best)
    for clip in CLIPS:
        grid = symmetric_grid(clip * absmax, 8)
        error = row_errors(rotated, grid)
        best = Grid(torch.where(error < least, grid.scale, best.scale), best.zero, best.low, best.high)
        least = torch.minimum(error, least)
    return best


def row_errors(weight: Tensor, grid: Grid) -> Tensor:
    return (grid_values(quantize(weight, grid), grid) - weight).square_().sum(1, keepdim=True, dtype=torch.float64)


# The codes.


def int8_codes(rotated: Tensor, grid: Grid, hessian: Tensor | None, damping: float) -> Tensor:
    """int8 (N, K), by gptq where the rotated inputs' Hessian is given."""
    return quantize(rotated, grid) if hessian is None else gptq_codes(rotated, hessian, grid, damping)


def codebook_codes(rotated: Tensor, grid: CodebookGrid, hessian: Tensor | None, damping: float) -> Tensor:
    """int8 (N, K) from 0 to 15, by gptq where the rotated inputs' Hessian is given."""
    levels, channel = grid.levels(), grid.channel[:, None]
    if hessian is None:
        target = (rotated / channel).view(len(rotated), -1, GROUP).transpose(0, 1).contiguous()
        return nearest_level(levels, target).transpose(0, 1).flatten(1).to(torch.int8)

    def round_column(index: int, column: Tensor) -> tuple[Tensor, Tensor]:
        group = levels[index // GROUP]
        codes = nearest_level(group, (column.float() / channel).contiguous())
        return codes, group.gather(1, codes).double() * channel

    return gptq(rotated, hessian, round_column, damping)


# The layer.


def native_format(outputs: int, inputs: int, format: str) -> str | None:
    """The checkpoint's format for a layer of W8A8 or W4A8, int8 where W4A8 has no groups; None: it has to stay float.

    cuBLAS multiplies int8 matrices only where both sizes are multiples of four.
    """
    if outputs % 4 or inputs % 4:
        return None
    return INT8 if inputs % GROUP else FORMATS[format]


@torch.no_grad()
def quantize_weight(
    name: str, weight: Tensor, bias: Tensor | None, config: NativeConfig, statistics: LayerStatistics | None = None
) -> NativeLayer | None:
    """The layer with weight (N, K) and bias (N,) or None; None where it has to stay float.

    Raises ValueError on values that are not finite, statistics that the config needs and the file lacks, and a weight
    whose relative error reaches a half.
    """
    outputs, inputs = weight.shape
    format = native_format(outputs, inputs, config.format)
    if format is None:
        return None
    weight = weight.detach().float()
    if not torch.isfinite(weight).all():
        raise ValueError(f"The weight of {name} holds values that are not finite; the checkpoint is damaged.")
    hessian = None if statistics is None or statistics.hessian is None else statistics.hessian.to(weight.device)
    if config.rounding == "gptq" and hessian is None:
        raise ValueError(f"gptq rounding needs the input Hessian of {name}; calibrate with hessians.")
    if hessian is not None and not torch.isfinite(hessian).all():
        raise ValueError(f"The input Hessian of {name} holds values that are not finite; calibrate again.")
    try:
        tensors = weight_tensors(weight, format, config, hessian if config.rounding == "gptq" else None)
    except torch.linalg.LinAlgError as cause:
        raise ValueError(f"The Hessian of {name} has no inverse with damping {config.damping}; raise it.") from cause
    error = output_error(weight, tensors, hessian)
    if not error < COLLAPSE:
        raise ValueError(f"{name} cannot be quantized to {format}: its relative error is {error:.2f}; leave it float.")
    if bias is not None:
        bias = bias.detach()
        tensors["bias"] = corrected_bias(name, weight, bias, tensors, statistics) if config.bias_correction else bias
    return NativeLayer(tensors, layer_config(tensors), error, format)


def weight_tensors(weight: Tensor, format: str, config: NativeConfig, hessian: Tensor | None) -> dict[str, Tensor]:
    """The format's tensors for weight (N, K), K a multiple of four; hessian X^T X (K, K) where gptq chooses codes."""
    group = rotation_group(weight.shape[1])
    assert group is not None
    rotated = rotate(weight, group)
    if hessian is not None:
        hessian = rotate_hessian(hessian, group)
    conf: dict[str, Any]
    if format == INT8:
        conf = {"format": INT8, "convrot": True, "convrot_groupsize": group}
        channels = int8_grid(rotated, config.clip_search)
        tensors = {"weight": int8_codes(rotated, channels, hessian, config.damping), "weight_scale": channels.scale}
    else:
        conf = {"format": W4A8, "group_size": GROUP, "convrot_groupsize": group}
        grid = stock_grid(weight, group)
        codes = codebook_codes(rotated, grid, hessian, config.damping)
        tensors = {
            "weight": pack_int4(codes - 8).view(torch.int8),
            "weight_s_rel": grid.relative,
            "weight_s_channel": grid.channel,
            "weight_codebook": grid.codebook,
        }
    tensors["comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
    return tensors


def corrected_bias(
    name: str, weight: Tensor, bias: Tensor, tensors: dict[str, Tensor], statistics: LayerStatistics | None
) -> Tensor:
    """b + (W - W_q) E[x] (N,) in the bias's dtype: the mean output is that of the float layer."""
    if statistics is None:
        raise ValueError(f"Bias correction needs the mean input of {name}; calibrate first.")
    shift = (weight - dequantize(tensors)).double() @ statistics.mean.to(weight.device).double()
    corrected = (bias.double() + shift).to(bias.dtype)
    if not torch.isfinite(corrected).all():
        raise ValueError(f"The corrected bias of {name} is not finite; calibrate again.")
    return corrected


def layer_config(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the comfy_quant tensor says."""
    return json.loads(bytes(tensors["comfy_quant"].tolist()))


def dequantize(tensors: dict[str, Tensor]) -> Tensor:
    """The weight (N, K) that the tensors of either format stand for, in the basis of the inputs, float32."""
    config = layer_config(tensors)
    if config["format"] == INT8:
        values = tensors["weight"].float() * tensors["weight_scale"]
        return rotate(values, config["convrot_groupsize"]) if config.get("convrot") else values
    channel = tensors["weight_s_channel"]
    levels = CodebookGrid(tensors["weight_codebook"], tensors["weight_s_rel"], channel).levels()
    codes = (unpack_int4(tensors["weight"].view(torch.uint8)) + 8).long()
    values = levels.gather(2, codes.view(len(codes), -1, GROUP).transpose(0, 1)).transpose(0, 1).flatten(1)
    return rotate(values * channel[:, None], config["convrot_groupsize"])


def output_error(weight: Tensor, tensors: dict[str, Tensor], hessian: Tensor | None = None) -> float:
    """sqrt(tr(D H D^T) / tr(W H W^T)), D = W - W_q, over inputs with X^T X = H; without H that of the weight itself."""
    weight = weight.float()
    lost, whole = (squared_norm(w, hessian) for w in (weight - dequantize(tensors), weight))
    return (lost / whole) ** 0.5 if whole > 0 else 0.0


def squared_norm(weight: Tensor, hessian: Tensor | None) -> float:
    """tr(W H W^T), or ||W||^2; float64, since errors lie where H is small."""
    w = weight.double()
    outputs = w if hessian is None else w @ hessian.double()
    return max(0.0, float((outputs * w).sum()))
