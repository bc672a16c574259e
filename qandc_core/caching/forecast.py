"""How a reused step is made of the computed ones: one formula for features, plans and the device's loop.

Order 0 holds the latest value, order 1 extrapolates the line through the latest two (TaylorSeer, arXiv 2503.06923,
Eq. 2, with finite differences). Order 2 adds half of what the parabola through the latest three adds to that line: the
whole of it overshoots where the curvature changes, and half measured better at nearly every number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ORDERS = (0, 1, 2)
CURVATURE = 0.5  # of the quadratic term


def coefficients(known: Sequence[Any], at: Any) -> list[Any]:
    """Of the values at the one to three `known` positions, the latest last, in the forecast at `at`; they sum to 1.

    Positions are numbers, or tensors that broadcast.
    """
    if len(known) == 1:
        return [1.0]
    before, last = known[-2:]
    slope = (at - last) / (last - before)
    if len(known) == 2:
        return [-slope, 1 + slope]
    first = known[0]
    bend = CURVATURE * (at - last) * (at - before)  # times the second divided difference
    return [
        bend / ((first - before) * (first - last)),
        bend / ((before - first) * (before - last)) - slope,
        bend / ((last - first) * (last - before)) + 1 + slope,
    ]
