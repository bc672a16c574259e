"""GPTQ rounding (Frantar et al., arXiv 2210.17323): codes chosen so that the layer's output error is least."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .quantizer import Grid, quantize

# Column k and its values (N, 1) in float64 -> codes and the values that they stand for, both (N, 1).
RoundColumn = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def gptq_codes(weight: Tensor, hessian: Tensor, grid: Grid, damping: float = 0.01, block: int = 128) -> Tensor:
    """int8 codes (N, K) of weight (N, K) on a per-channel grid; hessian X^T X (K, K) of the layer's inputs."""

    def round_column(_: int, column: Tensor) -> tuple[Tensor, Tensor]:
        codes = quantize(column.float(), grid)
        return codes, grid.scale * (codes.double() - grid.zero)

    return gptq(weight, hessian, round_column, damping, block)


def gptq(weight: Tensor, hessian: Tensor, round_column: RoundColumn, damping: float = 0.01, block: int = 128) -> Tensor:
    """int8 codes (N, K) of weight (N, K), column after column, on any grid that is fixed beforehand.

    Algorithm 1 of the paper; inputs that never occur are rounded to nearest.
    """
    width = weight.shape[1]
    w = weight.detach().to(torch.float64, copy=True)
    inverse = inverse_factor(hessian, damping)
    codes = torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, width, block):
        end = min(start + block, width)
        errors = torch.zeros(len(w), end - start, dtype=w.dtype, device=w.device)
        for j in range(start, end):
            column = w[:, j : j + 1]
            codes[:, j : j + 1], rounded = round_column(j, column)
            error = (column - rounded) / inverse[j, j]
            w[:, j:end] -= error * inverse[j : j + 1, j:end]
            errors[:, j - start] = error[:, 0]
        w[:, end:] -= errors @ inverse[start:end, end:]
    return codes


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor (K, K) of the inverse of the damped Hessian, in float64."""
    h = hessian.to(torch.float64, copy=True)
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal += torch.where(dead, 1.0, damping * diagonal[~dead].mean() if (~dead).any() else 1.0)
    factor = torch.linalg.cholesky(h)
    del h, diagonal  # a matrix of 12288 inputs takes 1.2 GB
    inverse = torch.cholesky_inverse(factor)
    del factor
    return torch.linalg.cholesky(inverse, upper=True)
