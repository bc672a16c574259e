"""Bounds of static activations, from what calibration saw of a layer's inputs."""

from __future__ import annotations

import torch

from ..calibration.statistics import BINS, LayerStatistics
from .grids import affine_grid, dequantize, quantize, symmetric_grid

CLIPPINGS = ("minmax", "percentile", "mse")


def activation_bounds(
    statistics: LayerStatistics,
    clipping: str = "minmax",
    bits: int = 8,
    percentile: float = 99.99,
    symmetric: bool = False,
) -> tuple[float, float]:
    """Low and high of the static activation grid: all seen, a two-sided percentile, or least squared error."""
    low, high = float(statistics.low.min()), float(statistics.high.max())
    if clipping == "minmax":
        return low, high
    if clipping == "percentile":
        cumulative = statistics.histogram.cumsum(0) / statistics.histogram.sum()
        tail = (1 - percentile / 100) / 2
        first, last = (int(torch.searchsorted(cumulative, q)) for q in (tail, 1 - tail))
        half = statistics.reach / BINS
        edge = statistics.centers
        last = min(last, BINS - 1)
        return max(low, float(edge[first]) - half), min(high, float(edge[last]) + half)
    if clipping == "mse":
        fractions = torch.linspace(0.2, 1.0, 81).tolist()
        best = min(fractions, key=lambda f: clipping_error(statistics, f * low, f * high, bits, symmetric))
        return best * low, best * high
    raise ValueError(f"clipping must be one of {', '.join(CLIPPINGS)}, got {clipping!r}.")


def clipping_error(statistics: LayerStatistics, low: float, high: float, bits: int, symmetric: bool) -> float:
    """Squared error of quantizing the histogram on the grid from low to high."""
    if symmetric:
        grid = symmetric_grid(torch.tensor(max(-low, high)), bits)
    else:
        grid = affine_grid(torch.tensor(low), torch.tensor(high), bits)
    x = statistics.centers
    return float((statistics.histogram * (dequantize(quantize(x, grid), grid) - x).double().square()).sum())
