"""A linear layer that multiplies integers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .grids import Grid, pack_int4, quantize, token_grid, unpack_int4
from .matmul import backend_for, int_mm, kitchen_mm, simulated_matmul

# Temporaries of this many values stay in the CPU's cache; those of a whole batch are paged in anew at every call.
CPU_BLOCK = 2**19
PRODUCTS = {"int_mm": int_mm, "kitchen": kitchen_mm, "simulated": simulated_matmul}


@dataclass(frozen=True)
class LinearFormat:
    """Bits of weights and activations, and whether the activation grid is fixed (static) or taken per token.

    `symmetric` is of the weights, `symmetric_inputs` of a static activation grid; grids per token are symmetric.
    """

    w_bits: int = 8
    a_bits: int = 8
    static: bool = False
    symmetric: bool = True
    symmetric_inputs: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(bits, int) and 2 <= bits <= 8 for bits in (self.w_bits, self.a_bits)):
            raise ValueError(f"w_bits and a_bits must be between 2 and 8, got {self.w_bits} and {self.a_bits}.")

    @property
    def packed(self) -> bool:
        return self.w_bits <= 4

    @property
    def label(self) -> str:
        return f"W{self.w_bits}A{self.a_bits}"


class QuantizedLinear(nn.Module):
    """y = s_x s_w (q_x - z_x)(q_w - z_w)^T + bias with codes q in int8, weights of 4 bits and below packed in pairs.

    Buffers: codes (N, K) int8 or (N, K / 2) uint8; weight_scale, weight_zero (N,) float32; input_scale, input_zero ()
    and row_sums (N,), the sums of the codes, where static. x (..., K) -> (..., N) in x's dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        format: LinearFormat,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.format, self.backend = in_features, out_features, format, backend
        columns, storage = (in_features // 2, torch.uint8) if format.packed else (in_features, torch.int8)
        self.codes: Tensor
        self.weight_scale: Tensor
        self.weight_zero: Tensor | None
        self.input_scale: Tensor
        self.input_zero: Tensor
        self.row_sums: Tensor
        self.register_buffer("codes", torch.empty(out_features, columns, dtype=storage, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, device=device))
        self.register_buffer("weight_zero", None if format.symmetric else torch.zeros(out_features, device=device))
        self.register_buffer("input_scale", torch.ones((), device=device) if format.static else None)
        self.register_buffer("input_zero", torch.zeros((), device=device) if format.static else None)
        self.register_buffer("row_sums", torch.zeros(out_features, device=device) if format.static else None)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), False) if bias else None

    @classmethod
    def like(cls, linear: nn.Linear, format: LinearFormat, backend: str = "auto") -> QuantizedLinear:
        """A layer of linear's shape, without its values."""
        sizes, weight = (linear.in_features, linear.out_features), linear.weight
        return cls(*sizes, linear.bias is not None, format, backend, weight.dtype, weight.device)

    @classmethod
    def from_codes(
        cls, linear: nn.Linear, codes: Tensor, weights: Grid, format: LinearFormat, inputs: Grid | None, backend: str
    ) -> QuantizedLinear:
        """Takes over linear's shape and bias; `inputs` is the static activation grid."""
        bias, layer = linear.bias, cls.like(linear, format, backend)
        layer.codes = pack_int4(codes) if format.packed else codes
        layer.weight_scale = weights.scale.flatten()
        if not format.symmetric:
            layer.weight_zero = weights.zero.flatten()
        if inputs is not None:
            layer.input_scale, layer.input_zero = inputs.scale, inputs.zero
            layer.row_sums = codes.sum(dim=1, dtype=torch.int32).float()
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), False)
        return layer

    def weight_codes(self) -> Tensor:
        """int8 (N, K)."""
        return unpack_int4(self.codes) if self.format.packed else self.codes

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, (N, K)."""
        codes = self.weight_codes().float()
        if self.weight_zero is not None:
            codes = codes - self.weight_zero[:, None]
        return (codes * self.weight_scale[:, None]).to(self.bias.dtype if self.bias is not None else torch.float32)

    def input_grid(self, x: Tensor) -> Grid:
        high = 2 ** (self.format.a_bits - 1) - 1
        if not self.format.static:
            return token_grid(x, self.format.a_bits)
        return Grid(self.input_scale, self.input_zero, -high if self.format.symmetric_inputs else -high - 1, high)

    @property
    def rows_at_once(self) -> int:
        return max(64, CPU_BLOCK // max(self.in_features, self.out_features))

    @torch.no_grad()  # rounding has no gradient
    def forward(self, x: Tensor) -> Tensor:
        if any(t is not None and t.device != x.device for t in (*self._buffers.values(), *self._parameters.values())):
            return self.on(x.device)(x)
        rows = x.reshape(-1, self.in_features)
        backend = backend_for(self.backend, x.device)
        if backend == "kitchen" and not self.format.static and self.format.symmetric and self.format.a_bits == 8:
            return self.kitchen_linear(rows).view(*x.shape[:-1], self.out_features)
        y = torch.empty(len(rows), self.out_features, dtype=x.dtype, device=x.device)
        block = self.rows_at_once if x.device.type == "cpu" else max(1, len(rows))
        weights = self.weight_codes()
        for part, out in zip(rows.split(block), y.split(block)):
            grid = self.input_grid(part.float())
            codes = quantize(part.float(), grid)
            self.rescale(PRODUCTS[backend](codes, weights), codes, grid, out)
        return y.view(*x.shape[:-1], self.out_features)

    def on(self, device: torch.device) -> QuantizedLinear:
        """This layer with weights on another device, for one call of a host that keeps them elsewhere (low VRAM)."""
        layer = copy.copy(self)
        for kind in ("_buffers", "_parameters"):
            moved = {name: None if t is None else t.to(device) for name, t in vars(self)[kind].items()}
            object.__setattr__(layer, kind, moved)
        return layer

    def rescale(self, accumulated: Tensor, codes: Tensor, grid: Grid, out: Tensor) -> None:
        """Writes the layer's output; what is the same for all rows is put into one factor and one addend first."""
        y, factor = accumulated.float(), self.weight_scale
        addend = torch.zeros_like(factor) if self.bias is None else self.bias.float()
        if self.weight_zero is not None:
            shifted = codes.float().sum(dim=1, keepdim=True) - self.in_features * grid.zero
            y.sub_(shifted * self.weight_zero)
        if self.format.static:
            factor = factor * grid.scale
            addend = addend - grid.zero * self.row_sums * factor
        else:
            y.mul_(grid.scale)
        if out.dtype == y.dtype:
            torch.addcmul(addend, y, factor, out=out)
        else:
            out.copy_(torch.addcmul(addend, y, factor))

    def kitchen_linear(self, x: Tensor) -> Tensor:
        """comfy-kitchen's fused dynamic W8A8 kernel."""
        import comfy_kitchen

        return comfy_kitchen.int8_linear(x, self.weight_codes(), self.weight_scale, self.bias, out_dtype=x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in self._buffers.items():
            kept = before[name]
            # Scales stay float32 in a model of half precision: row_sums would overflow float16.
            if value is not None and kept is not None and value.dtype != kept.dtype:
                self._buffers[name] = kept.to(value.device)
        return self

    def extra_repr(self) -> str:
        kind = "static" if self.format.static else "per token"
        return f"{self.in_features}, {self.out_features}, {self.format.label}, activations {kind}, {self.backend}"
