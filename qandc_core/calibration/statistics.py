"""What calibration keeps of each layer's inputs: sums, bounds, a histogram, and X^T X or a random sample of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BINS = 2048


@dataclass
class LayerStatistics:
    """Statistics of inputs x (M, K): count M, channel low, high and mean (K,), histogram (2048,) over [-reach, reach],
    and X^T X (K, K) where Hessians are asked for. `rows` (R, K) are inputs of chosen samples drawn at random, which
    stand in for X^T X where it does not fit; `held_out` (H, K) are inputs of samples that were not chosen; bfloat16.
    """

    count: int
    low: Tensor
    high: Tensor
    mean: Tensor
    histogram: Tensor
    reach: float
    hessian: Tensor | None
    rows: Tensor | None = None
    held_out: Tensor | None = None

    @classmethod
    def empty(cls, width: int, hessian: bool = False, rows: int = 0, held_out: int = 0) -> LayerStatistics:
        """Statistics that keep up to `rows` and `held_out` inputs of this width, none where 0."""
        low, high = torch.full((width,), float("inf")), torch.full((width,), float("-inf"))
        second = torch.zeros(width, width) if hessian else None
        bins = torch.zeros(BINS, dtype=torch.float64)
        kept = reserved(rows, width), reserved(held_out, width)
        return cls(0, low, high, torch.zeros(width), bins, 2.0**-20, second, *kept)

    def update(self, x: Tensor) -> None:
        """Adds rows x (M, K)."""
        x = x.detach().float()
        self.count += len(x)
        self.low, self.high = torch.minimum(self.low, x.amin(0).cpu()), torch.maximum(self.high, x.amax(0).cpu())
        self.mean += (x.mean(0).cpu() - self.mean) * (len(x) / self.count)
        self.widen(float(x.abs().max()))
        for part in x.flatten().split(2**24):  # a float32 bin of histc counts no further
            self.histogram += torch.histc(part, BINS, -self.reach, self.reach).cpu()
        if self.hessian is not None:
            self.hessian += (x.T @ x).cpu()

    def keep_rows(self, x: Tensor) -> None:
        """Appends x (M, K) to the rows, as many as there is room for."""
        self.rows = appended(self.rows, x)

    def keep_held_out(self, x: Tensor) -> None:
        self.held_out = appended(self.held_out, x)

    @property
    def samples(self) -> int:
        """Number of inputs that second_moment comes from."""
        return self.count if self.hessian is not None or self.rows is None else len(self.rows)

    def second_moment(self, device: torch.device | None = None) -> Tensor | None:
        """X^T X (K, K) of all `count` inputs, float32; estimated where there are only rows, None without either."""
        if self.hessian is not None:
            return self.hessian.to(device)
        if self.rows is None or not len(self.rows):
            return None
        rows = self.rows.to(device, torch.float32)
        return (rows.T @ rows).mul_(self.count / len(rows))

    def widen(self, absmax: float) -> None:
        """Doubles the reach until it covers absmax; pairs of bins merge exactly."""
        while self.reach < absmax:
            merged = self.histogram.view(-1, 2).sum(1)
            self.histogram = F.pad(merged, (BINS // 4, BINS // 4))
            self.reach *= 2

    @property
    def centers(self) -> Tensor:
        width = 2 * self.reach / BINS
        return torch.arange(BINS) * width - self.reach + width / 2


def reserved(rows: int, width: int) -> Tensor | None:
    """An empty (0, K) bfloat16 tensor in memory for so many rows."""
    return torch.empty(rows, width, dtype=torch.bfloat16)[:0] if rows else None


def appended(kept: Tensor | None, x: Tensor) -> Tensor | None:
    """kept (R, K) with rows of x behind it, as many as the memory that was reserved for it holds."""
    if kept is None:
        return None
    capacity = kept.untyped_storage().nbytes() // (kept.element_size() * kept.shape[1])
    x = x.detach()[: capacity - len(kept)]
    grown = kept.as_strided((len(kept) + len(x), kept.shape[1]), (kept.shape[1], 1))
    grown[len(kept) :] = x
    return grown


def merge_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@contextmanager
def observed(layers: Iterable[tuple[str, nn.Module]], observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls observe(name, input) before each layer runs, for as long as the context lasts."""

    def hook(name: str) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: observe(name, args[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
