"""Which steps compute and which reuse."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .forecast import ORDERS
from .optimum import optimal_schedule

REUSE = ("branch", "block", "prediction")


def check_order(order: int) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be {', '.join(map(str, ORDERS[:-1]))} or {ORDERS[-1]}, got {order}.")


def check_reuse(reuse: str) -> None:
    if reuse not in REUSE:
        raise ValueError(f"reuse must be one of {', '.join(REUSE)}, got {reuse!r}.")


@dataclass(frozen=True)
class CacheConfig:
    """The computed steps that a policy has chosen for a run: `steps`, and step 0; or, where the number of steps is not
    known, every `interval`-th. Exactly one of the two. For `reuse` see PolicyConfig, for `order` CachePolicy.
    """

    interval: int | None = None
    steps: frozenset[int] | None = None
    reuse: str = "branch"
    order: int = 0

    def __post_init__(self) -> None:
        if (self.interval is None) == (self.steps is None):
            raise ValueError("`interval` and `steps` each say which steps compute; give one of them.")
        if self.interval is not None and self.interval < 1:
            raise ValueError(f"interval must be 1 (no reuse) or more, got {self.interval}.")
        check_reuse(self.reuse)
        check_order(self.order)

    def computes(self, step: int) -> bool:
        """FORA (arXiv 2407.01425): computed where mod(step, interval) = 0."""
        if self.interval is not None:
            return step % self.interval == 0
        return step == 0 or step in (self.steps or ())

    def keeps(self, step: int) -> bool:
        """True if a later step may read what `step` computes: with order 0 never where the next step computes too."""
        return self.order > 0 or not self.computes(step + 1)


SPACING = 0.7  # exponent of the default spacing, which saved compensations were fitted with


def spaced_steps(total: int, num_computed: int, exponent: float = SPACING) -> tuple[int, ...]:
    """`num_computed` of `total` steps, the first and the last among them, denser towards the end, where images sharpen.

    Step k lies at (total - 1) (k / (num_computed - 1))^exponent, rounded, and earlier where two would coincide.
    Raises ValueError unless 1 <= num_computed <= total.
    """
    if not 1 <= num_computed <= total:
        raise ValueError(f"The number of computed steps must be between 1 and {total}, got {num_computed}.")
    steps = [round((total - 1) * (k / max(num_computed - 1, 1)) ** exponent) for k in range(num_computed)]
    for k in reversed(range(num_computed - 1)):
        steps[k] = min(steps[k], steps[k + 1] - 1)
    return tuple(steps)


def spread(
    total: int,
    num_computed: int,
    inside: range,
    distances: Tensor | None = None,
    order: int = 0,
    lengths: Tensor | None = None,
    exponent: float = SPACING,
) -> set[int]:
    """All steps outside `inside`, and within it as many as make up `num_computed`, at least one.

    Those are spaced, or lie where the distances (T, T) make the error of forecasts of this order least; for `lengths`
    see `optimal_schedule`. A held value is not carried over the beginning of `inside`, a forecast is.
    """
    outside = set(range(total)) - set(inside)
    if not len(inside):
        return outside
    count = min(max(num_computed - len(outside), 1), len(inside))
    if distances is None:
        steps = spaced_steps(len(inside), count, exponent)
    elif order and count > 1:
        forced = {0, total - 1, *outside}
        number = max(len(outside) + count, len(forced))
        return set(optimal_schedule(distances, number, order=order, forced=forced, lengths=lengths))
    else:
        steps = optimal_schedule(distances[inside.start : inside.stop, inside.start : inside.stop], count)
    return outside | {inside.start + step for step in steps}


def affordable(total: int, speedup: float, cost: float) -> int:
    """The largest n with n + (total - n) cost <= total / speedup; at least one."""
    return min(total, max(1, int((total / speedup - total * cost) / (1 - cost)))) if cost < 1 else 1
