"""GPTQ rounding (Frantar et al., arXiv 2210.17323): codes chosen so that the layer's output error is least."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantizer import Grid, quantize


def gptq_codes(weight: Tensor, hessian: Tensor, grid: Grid, damping: float = 0.01, block: int = 128) -> Tensor:
    """int8 codes (N, K) of weight (N, K) on a per-channel grid; hessian X^T X (K, K) of the layer's inputs.

    Algorithm 1 of the paper; inputs that never occur are rounded to nearest.
    """
    width = weight.shape[1]
    w = weight.detach().double().clone()
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    diagonal = h.diagonal()
    diagonal += torch.where(dead, 1.0, damping * diagonal[~dead].mean() if (~dead).any() else 1.0)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, width, block):
        end = min(start + block, width)
        errors = torch.zeros(len(w), end - start, dtype=w.dtype, device=w.device)
        for j in range(start, end):
            column = w[:, j : j + 1]
            codes[:, j : j + 1] = quantize(column.float(), grid)
            rounded = grid.scale * (codes[:, j : j + 1].double() - grid.zero)
            error = (column - rounded) / inverse[j, j]
            w[:, j:end] -= error * inverse[j : j + 1, j:end]
            errors[:, j - start] = error[:, 0]
        w[:, end:] -= errors @ inverse[start:end, end:]
    return codes
