"""The update of a LoRA, computed beside the weight of a linear layer: y + D x, without the matrix D.

Adding D to the codes of a quantized weight rounds the sum again, and a LoRA is often smaller than a step of the grid. D
has a structure that makes it cheap to apply on its own instead: LoRA's is a product of two thin matrices, LoHa's of two
less thin ones, LoKr's a Kronecker product of two small ones. The weight keeps its codes, and another strength is
another pair of thin matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """D = up down, with up (N, R) and down (R, K)."""

    up: Tensor
    down: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)

    def dense(self) -> Tensor:
        return self.up @ self.down


@dataclass(frozen=True, eq=False)
class Kronecker:
    """D = left (x) right, with left (A, B), right (C, D), N = A C and K = B D."""

    left: Tensor
    right: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        inner = F.linear(x.unflatten(-1, (self.left.shape[1], -1)), self.right)  # (..., B, C)
        return (self.left @ inner).flatten(-2)

    def dense(self) -> Tensor:
        return torch.kron(self.left, self.right)


Term = LowRank | Kronecker


@dataclass(frozen=True, eq=False)
class Beside:
    """The sum of such terms, x (..., K) -> (..., N)."""

    terms: tuple[Term, ...]

    def __call__(self, x: Tensor) -> Tensor:
        found = self.to(x.device, x.dtype).terms
        total = found[0](x)
        for term in found[1:]:
            total = total + term(x)
        return total

    def dense(self) -> Tensor:
        """D (N, K)."""
        return torch.stack([term.dense() for term in self.terms]).sum(0)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Beside:
        moved = [[part.to(device, dtype) for part in parts_of(term)] for term in self.terms]
        return Beside(tuple(type(term)(*parts) for term, parts in zip(self.terms, moved)))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for term in self.terms for part in parts_of(term))


def parts_of(term: Term) -> list[Tensor]:
    return [getattr(term, field.name) for field in fields(term)]


def hadamard_product(first: LowRank, second: LowRank) -> LowRank:
    """The elementwise product of two matrices of ranks R and S, of rank R S at most."""
    up = (first.up[:, :, None] * second.up[:, None, :]).flatten(1)
    down = (first.down[:, None, :] * second.down[None, :, :]).flatten(0, 1)
    return LowRank(up, down)


def placed(term: Term, shape: tuple[int, int], dim: int, start: int) -> LowRank:
    """The term in the rows (dim 0) or columns (dim 1) of a matrix of zeros from `start` on: LoRAs of q, k and v have
    one weight in some models.
    """
    low = term if isinstance(term, LowRank) else factors(term)
    up, down = low.up, low.down
    if dim == 0:
        up = F.pad(up, (0, 0, start, shape[0] - start - up.shape[0]))
    else:
        down = F.pad(down, (start, shape[1] - start - down.shape[1]))
    return LowRank(up, down)


def factors(term: Kronecker) -> LowRank:
    """left (x) right = (left (x) 1) (1 (x) right), of rank B C."""
    left, right = term.left, term.right
    rows = torch.eye(right.shape[0], dtype=left.dtype, device=left.device)
    columns = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
    return LowRank(torch.kron(left, rows), torch.kron(columns, right))


def beside(terms: Sequence[Term]) -> Beside:
    """One sum of all terms, low ranks joined to one."""
    low = [term for term in terms if isinstance(term, LowRank)]
    joined = [LowRank(torch.cat([term.up for term in low], 1), torch.cat([term.down for term in low]))] if low else []
    return Beside((*joined, *(term for term in terms if not isinstance(term, LowRank))))
