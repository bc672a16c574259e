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
    """Coefficients of the values at the one to three `known` positions, the latest last, in the forecast at `at`.

    They sum to 1. Positions are numbers, or tensors that broadcast.
    """
    if len(known) == 1:
        return [1.0]
    before, last = known[-2:]
    along = (at - before) / (last - before)
    if len(known) == 2:
        return [1 - along, along]
    first = known[0]
    bend = CURVATURE * (at - last) * (at - before)  # times the second divided difference
    return [
        bend / ((first - before) * (first - last)),
        bend / ((before - first) * (before - last)) + 1 - along,
        bend / ((last - first) * (last - before)) + along,
    ]


def forecast_rows(computed: Sequence[bool], order: int) -> list[list[float]]:
    """For each step the coefficients of the latest three predictions before it, the latest first; 0 where unused."""
    rows, known = [], [0]
    for step, computes in enumerate(computed):
        if computes and step:
            known = [*known, step][-1 - order :]
        row = [1.0] if computes else [float(weight) for weight in reversed(coefficients(known, step))]
        rows.append(row + [0.0] * (3 - len(row)))
    return rows
