"""GPTQ rounding (Frantar et al., arXiv 2210.17323): integers chosen so that the layer's output error is least.

Rounding to nearest makes each weight's own error E = W - W_q small. What counts is the error of the outputs,
|E X^T|^2 = tr(E H E^T) with H = X^T X of the layer's inputs, and the errors of correlated inputs can cancel: where one
weight was rounded up, another may better be rounded down.

The columns of W are therefore rounded one after the other, each at the value that best makes up for the errors made so
far. In the form of LDLQ, which gives the same codes (QuIP, arXiv 2307.13304, Theorem 6) and needs no inverse: with
H = U D U^T, U unit upper triangular,

    tr(E H E^T) = sum_k D_k |E U[:, k]|^2,      E U[:, k] = E[:, k] + sum_{j<k} E[:, j] U[j, k],

and the sum over j < k is known when column k is reached, which is therefore rounded from its value plus that sum.

It costs a Cholesky factorization (K^3 / 3) and N K^2 multiplications for each layer, gathered into matmuls by halving
the range of columns, and memory for H and the sums. H of few or correlated inputs is nearly singular, so a share of its
mean diagonal (`damping`) is added; a larger share moves the result towards rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .grids import Grid, quantize

ROUNDINGS = ("nearest", "gptq")
# Column k and its values (N,) -> codes and the values that they stand for, both (N,).
RoundColumn = Callable[[int, Tensor], tuple[Tensor, Tensor]]


class FactoredHessian:
    """X^T X (K, K) with the factor that was asked for last: layers of the same inputs need the same one."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix
        self.known: tuple[float, torch.dtype, Tensor] | None = None

    def factor(self, damping: float, dtype: torch.dtype) -> Tensor:
        if self.known is None or self.known[:2] != (damping, dtype):
            self.known = None  # frees the last one first
            self.known = damping, dtype, reversed_factor(self.matrix, damping, dtype)
        return self.known[2]


Hessian = Tensor | FactoredHessian


def rounding_cost(layer: Any) -> float:
    """Operations of gptq on a linear layer: the factor of X^T X (K^3 / 3), and products with it (N K^2)."""
    return layer.in_features**2 * (layer.in_features / 3 + layer.out_features)


def gptq_codes(weight: Tensor, hessian: Hessian, grid: Grid, damping: float = 0.01, block: int = 16) -> Tensor:
    """int8 codes (N, K) of weight (N, K) on a per-channel grid; hessian X^T X (K, K) of the layer's inputs."""
    channels = Grid(grid.scale.flatten(), grid.zero.flatten(), grid.low, grid.high)

    def round_column(_: int, column: Tensor) -> tuple[Tensor, Tensor]:
        codes = quantize(column, channels)
        return codes, channels.scale * (codes - channels.zero)

    return gptq(weight, hessian, round_column, damping, block)


def gptq(weight: Tensor, hessian: Hessian, round_column: RoundColumn, damping: float = 0.01, block: int = 16) -> Tensor:
    """int8 codes (N, K) of weight (N, K), column after column, on any grid that is fixed beforehand.

    Inputs that never occur are rounded to nearest. Computes in float32, or in float64 where the weight is.
    """
    # Columns lie as rows, the last one first, as in the factor.
    columns = weight.detach().T.flip(0)
    if isinstance(hessian, Tensor):
        hessian = FactoredHessian(hessian)
    factor = hessian.factor(damping, torch.promote_types(weight.dtype, torch.float32))
    errors = torch.zeros_like(columns, dtype=factor.dtype)  # of a column to come: what those before it hand on
    codes = torch.empty_like(columns, dtype=torch.int8)

    def round_columns(start: int, end: int) -> None:
        if end - start > block:
            middle = (start + end) // 2
            round_columns(middle, end)
            errors[start:middle].addmm_(factor[middle:end, start:middle].T, errors[middle:end])
            round_columns(start, middle)
            return
        for row in reversed(range(start, end)):
            errors[row].addmv_(errors[row + 1 : end].T, factor[row + 1 : end, row])
            codes[row], rounded = round_column(len(columns) - 1 - row, columns[row] + errors[row])
            torch.sub(columns[row], rounded, out=errors[row])

    round_columns(0, len(columns))
    return codes.flip(0).T.contiguous()


def reversed_factor(hessian: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """U (K, K) of the damped H = U D U^T with rows and columns in reverse order, so that it is lower triangular.

    Raises LinAlgError where H is not positive definite.
    """
    h = hessian.flip(0, 1).to(dtype)
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal += torch.where(dead, 1.0, damping * diagonal[~dead].mean() if (~dead).any() else 1.0)
    try:
        factor = torch.linalg.cholesky(h.T, out=h.T)  # in place: LAPACK's columns are the rows of h
    except torch.linalg.LinAlgError:
        if dtype == torch.float64:
            raise
        # On the CPU, which has float64 whatever the device.
        return reversed_factor(hessian.cpu(), damping, torch.float64).to(hessian.device, dtype)
    return factor.div_(factor.diagonal().clone())
