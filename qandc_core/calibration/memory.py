"""Fits the statistics of all layers into a memory budget."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from .statistics import BINS

LEAST = 64  # kept inputs below which GPTQ has little to go by


@dataclass(frozen=True)
class StatisticsPlan:
    """The statistics of each layer: X^T X where that is smaller, else `tokens` of its inputs; `held_out` more inputs.

    `bytes` is what all layers' statistics take.
    """

    tokens: int
    held_out: int
    bytes: int

    def hessian(self, width: int) -> bool:
        """True if a layer of this width keeps X^T X in float32 rather than inputs in bfloat16."""
        return 4 * width**2 <= 2 * width * self.tokens

    def inputs(self, width: int) -> int:
        return 0 if self.hessian(width) else self.tokens


def plan_statistics(widths: Sequence[int], budget: int, tokens: int, held_out: int) -> StatisticsPlan:
    """The most tokens, up to those wanted, with which layers of these widths fit a budget in bytes.

    Raises ValueError, naming the least budget, where not even 64 fit.
    """

    def needed(count: int) -> int:
        return sum(layer_bytes(width, count, held_out) for width in widths)

    least = min(LEAST, tokens)
    if needed(least) > budget:
        raise ValueError(
            f"Statistics of {len(widths)} layers need at least {needed(least) / 2**30:.2f} GiB, {budget / 2**30:.2f} "
            "GiB are allowed; allow more memory, or skip layers."
        )
    most = bisect_right(range(tokens + 1), budget, key=needed) - 1
    return StatisticsPlan(most, held_out, needed(most))


def layer_bytes(width: int, tokens: int, held_out: int) -> int:
    """Bounds and mean, the histogram, held-out inputs, and X^T X or inputs."""
    return 3 * 4 * width + 8 * BINS + 2 * width * held_out + min(4 * width**2, 2 * width * tokens)
