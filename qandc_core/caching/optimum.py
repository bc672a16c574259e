"""Which steps should compute: the best choice of all, by dynamic programming over what a run keeps.

A forecast of order p goes through the last p + 1 computed steps, so what a reused step errs by depends on p + 1 steps
and on nothing before. That makes those steps the state: adding the next computed step k to (h, i, j) costs the errors
of the steps between j and k, and the cheapest way to each state is kept (CacheQuant, arXiv 2503.01323, for order 0; the
path-aware cost is the idea of DPCache, arXiv 2602.22654).

A forecast is a sum of computed predictions whose coefficients sum to 1 (`forecast`). What it misses needs no
predictions, only distances between them: the coefficients of a prediction minus its forecast sum to 0, and then

    |sum_a c_a v_a|^2 = - sum_{a < b} c_a c_b |v_a - v_b|^2.

The distances are those of a run that computed every step; what reuse does to the steps after it is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations, pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from .forecast import coefficients

Weighted = Sequence["tuple[Tensor, Tensor]"]  # coefficients and the steps that they belong to
LONGEST = {1: 200, 2: 60}  # steps of a run up to which an order is priced; the tables grow with the power order + 2


def optimal_schedule(
    distances: Tensor,
    num_computed: int,
    *,
    order: int = 0,
    forced: Collection[int] | None = None,
    lengths: Tensor | None = None,
) -> tuple[int, ...]:
    """Computed steps with the least total error of the reused ones, each forecast from the last order + 1 computed.

    distances (T, T): [i, j] is the error of using at step j what step i computed, which is |v_i - v_j| / lengths[j]. A
    full matrix says by itself what the lengths (T,) are; of an upper triangular one they are given, or alike.
    Step 0 always computes; of order 1 and 2 also the `forced` steps, by default the last one. Runs that are too long
    for an order are placed by the next lower one. Raises ValueError unless 1 <= num_computed <= T.
    """
    total = len(distances)
    if distances.ndim != 2 or distances.shape[1] != total or not torch.isfinite(distances).all():
        raise ValueError(f"distances must be a finite (T, T) matrix, got shape {tuple(distances.shape)}.")
    if not 1 <= num_computed <= total:
        raise ValueError(f"num_computed must be between 1 and the {total} steps, got {num_computed}.")
    while order and total > LONGEST[order]:
        order -= 1
    distances = distances.double().cpu()
    if order == 0:
        return held_schedule(distances, num_computed)
    must = {0} if num_computed == 1 else {0, total - 1} if forced is None else {0, *forced}
    if len(must) > num_computed:
        raise ValueError(f"num_computed must be {len(must)} or more, as many as have to compute, got {num_computed}.")
    lengths = lengths_of(distances) if lengths is None else lengths.double()
    squares = (distances.triu(1) * lengths).square()
    return forecast_schedule(squares + squares.T, 1 / lengths, num_computed, order, sorted(must))


def lengths_of(distances: Tensor) -> Tensor:
    """By what each column (T,) of distances was divided, up to a common factor; ones for a triangular matrix."""
    both = (distances > 0) & (distances.T > 0)
    ratio = torch.where(both, distances.T.log() - distances.log(), 0.0)
    return ratio.mean(dim=0).exp()


def squared_norm(parts: Weighted, squares: Tensor) -> Tensor:
    """|sum c v|^2 by the squared distances (T, T) of the v, for coefficients c that sum to 0; all broadcast."""
    products = [c * d * squares[a, b] for (c, a), (d, b) in combinations(parts, 2)]
    total = products[0]
    for product in products[1:]:
        total = total + product
    return (-total).clamp(min=0.0)


def missed(known: Sequence[Tensor], at: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The error of a forecast from the `known` steps at the steps `at`, as coefficients and their steps."""
    weights = [torch.as_tensor(weight, dtype=torch.float64) for weight in coefficients(known, at)]
    return [(torch.ones((), dtype=torch.float64), at), *((-weight, step) for weight, step in zip(weights, known))]


def errors_after(j: int, order: int, squares: Tensor) -> Tensor:
    """Errors (j + 1,) * order + (T - 1 - j,) of steps j + 1.. forecast from j and the `order` computed steps before it.

    In each of the first dimensions, earlier steps first, 0 stands for no such step and i + 1 for step i. Choices that
    cannot be are infinite.
    """
    last, later, before = torch.tensor(j), torch.arange(j + 1, len(squares)), torch.arange(j)
    held = squared_norm(missed([last], later), squares)
    linear = torch.cat([held[None], squared_norm(missed([before[:, None], last], later), squares)])
    if order == 1:
        return linear.sqrt()
    found = torch.full((j + 1, *linear.shape), float("inf"), dtype=torch.float64)
    found[0] = linear
    for i in range(1, j):
        found[1 : i + 1, i + 1] = squared_norm(missed([before[:i, None], torch.tensor(i), last], later), squares)
    return found.sqrt()


def forecast_schedule(squares: Tensor, weights: Tensor, count: int, order: int, must: Sequence[int]) -> tuple[int, ...]:
    """Steps, `count` of them and all of `must` among them, whose reused steps err least in sum, for order 1 and 2.

    A state is the latest computed step and, as in `errors_after`, the `order` ones before it.
    """
    total, infinite = len(squares), float("inf")
    following = {step: later for now, later in pairwise([*must, total]) for step in range(now, later)}
    costs = []  # from step j: what is forecast before the next computed step, j + 1, j + 2, .. or the end, errs by
    for j in range(total):
        cost = pad((errors_after(j, order, squares) * weights[j + 1 :]).cumsum(dim=-1), (1, 0))
        cost[..., following[j] - j :] = infinite
        costs.append(cost)
    best = torch.full((total, *(total + 1 for _ in range(order))), infinite, dtype=torch.float64)
    best[(0,) * (order + 1)] = 0.0
    dropped = []  # the step that leaves the state where another one enters
    for _ in range(count - 1):
        reached, left = torch.full_like(best, infinite), torch.zeros_like(best, dtype=torch.long)
        for j in range(total - 1):
            least = (best[known(j, order)].unsqueeze(-1) + costs[j][..., :-1]).min(dim=0)
            into = (slice(j + 1, None), *known(j, order)[2:], j + 1)
            reached[into], left[into] = least.values.movedim(-1, 0), least.indices.movedim(-1, 0)
        best = reached
        dropped.append(left)
    for j in range(total):
        best[known(j, order)] += costs[j][..., -1]
    last, *state = (int(i) for i in torch.unravel_index(best.argmin(), best.shape))
    found = [last]
    for left in reversed(dropped):
        first = int(left[tuple([last, *state])])
        last, state = state[-1] - 1, [first, *state[:-1]]
        found.append(last)
    return tuple(reversed(found))


def known(j: int, order: int) -> tuple[int | slice, ...]:
    """Where the states lie whose latest step is j."""
    return (j, *(slice(0, j + 1) for _ in range(order)))


def held_schedule(distances: Tensor, count: int) -> tuple[int, ...]:
    """The same for order 0, where a step errs by its distance (T, T) to the latest computed one alone."""
    total = len(distances)
    held = torch.triu(distances, diagonal=1).cumsum(dim=1)  # [i, j]: steps i + 1..j reuse step i
    best = held[0].clone()  # best[j]: least error of steps 0..j with the segments placed so far
    previous = []
    for _ in range(count - 1):
        cost = torch.full((total, total), float("inf"), dtype=torch.float64)
        for i in range(1, total):
            cost[i, i:] = best[i - 1] + held[i, i:]
        best, start = cost.min(dim=0)
        previous.append(start)
    schedule, end = [], total - 1
    for start in reversed(previous):
        schedule.append(int(start[end]))
        end = schedule[-1] - 1
    return (0, *reversed(schedule))
