"""Which steps compute and which reuse."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from .optimum import optimal_schedule

MODES = ("branch", "block", "prediction")
ORDERS = (0, 1)


def check_order(order: int) -> None:
    if order not in ORDERS:
        raise ValueError(f"forecast order must be {' or '.join(map(str, ORDERS))}, got {order}.")


@dataclass(frozen=True)
class CacheConfig:
    """Reuse policy. `steps` lists the computed steps and replaces `interval`; step 0 always computes.

    `mode` "branch" keeps attention and MLP outputs before the gate (FORA), "block" what each block adds, "prediction"
    the predicted clean image, which needs a FusedDiT: only its loop sees predictions.
    `order` 1 extrapolates linearly over the last two computed steps instead of holding the last.
    """

    interval: int = 3
    steps: frozenset[int] | None = None
    mode: str = "branch"
    order: int = 0

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"cache_interval must be 1 (no reuse) or more, got {self.interval}.")
        if self.mode not in MODES:
            raise ValueError(f"cache mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        check_order(self.order)

    def for_run(self, total: int, cost: float = 0.0) -> CacheConfig:
        return self

    def computes(self, step: int) -> bool:
        """FORA (arXiv 2407.01425): computed where mod(step, interval) = 0."""
        if self.steps is not None:
            return step == 0 or step in self.steps
        return step % self.interval == 0

    def keeps(self, step: int) -> bool:
        """Whether a later step may read what `step` computes: with order 0 never where the next step computes too."""
        return self.order > 0 or not self.computes(step + 1)


SPACING = 0.7  # exponent of the default spacing; chosen on the models of benchmarks/caching


def spaced_steps(total: int, computed: int) -> tuple[int, ...]:
    """`computed` of `total` steps, first and last among them, closer together towards the end, where images sharpen.

    Step k lies at (total - 1) (k / (computed - 1))^SPACING, rounded, and earlier where two would coincide.
    Raises ValueError unless 1 <= computed <= total.
    """
    if not 1 <= computed <= total:
        raise ValueError(f"The number of computed steps must be between 1 and {total}, got {computed}.")
    steps = [round((total - 1) * (k / max(computed - 1, 1)) ** SPACING) for k in range(computed)]
    for k in reversed(range(computed - 1)):
        steps[k] = min(steps[k], steps[k + 1] - 1)
    return tuple(steps)


def spread(
    total: int,
    computed: int,
    inside: range,
    distances: Tensor | None = None,
    order: int = 0,
    lengths: Tensor | None = None,
) -> set[int]:
    """All steps outside `inside`, and within it as many as make up `computed`, at least one.

    Those are spaced, or lie where the distances (T, T) make the error of forecasts of this order least. For `lengths`
    see `optimal_schedule`.
    """
    outside = set(range(total)) - set(inside)
    if not len(inside):
        return outside
    count = min(max(computed - len(outside), 1), len(inside))
    if distances is not None and order:
        forced = outside | {total - 1} if count > 1 else outside
        return set(optimal_schedule(distances, len(outside | {0}) + count - (0 in inside), order=order, forced=forced, lengths=lengths))
    if distances is None:
        steps = spaced_steps(len(inside), count)
    else:
        steps = optimal_schedule(distances[inside.start : inside.stop, inside.start : inside.stop], count)
    return outside | {inside.start + step for step in steps}


def affordable(total: int, speedup: float, cost: float) -> int:
    """The largest n with n + (total - n) cost <= total / speedup; at least one."""
    return min(total, max(1, int((total / speedup - total * cost) / (1 - cost)))) if cost < 1 else 1


def step_set(steps: Iterable[int] | None) -> frozenset[int] | None:
    return None if steps is None else frozenset(int(s) for s in steps)
