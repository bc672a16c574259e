"""Identifies a model call: the part of the sample that it evaluates, and the patches that it runs with.

Features may be reused only for the same part of the same condition under the same patches. The number of a call within
a prediction proves none of that: packs evaluate windows, tiles and frames in another order, or move them, from one step
to the next. The values do. Every part is cut from the sample that the sampler handed over, so `locate` looks for it
there: one element, found at exactly one place, gives the position; the lines through it give the indices along every
dimension (a crop, a window of chosen frames, a roll, a stride); the whole cut, compared bit for bit, is the proof. A
part that stands in several places, or that was changed before the call, has no place, and is computed. Guidance that
evaluates all of the sample with other values, scaled or blurred, has its place as long as they still show the sample.

It costs one comparison with the sample and a few host waits for each part. Nothing of it runs for a call on the whole
sample, which the caller knows by the identity of the tensor.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

Indices = range | tuple[int, ...] | None  # along one dimension; None: all of it
Piece = tuple[Indices, ...]
WHOLE: Piece = ()
CHANGED = ("changed",)  # all of the sample in its place, with other values
RESEMBLES = 0.5  # cosine of the differences between neighbours; of a rolled or another sample it is near 0
ANCHORS = 3  # elements that are tried
LARGEST = 2**24  # comparisons along one dimension; more would not pay


def locate(part: Tensor, whole: Tensor) -> Piece | None:
    """Position of `part` (b, C, ...) in `whole` (B, C, ...): indices of each dimension; None if absent or ambiguous."""
    if part.ndim != whole.ndim or part.ndim < 2 or part.shape[1] != whole.shape[1] or not part.numel():
        return None
    if part.shape == whole.shape and torch.equal(part, whole):
        return WHOLE
    for anchor in anchors(part):
        piece = located_at(anchor, part, whole)
        if piece is not None:
            return piece
    return None


def is_changed(part: Tensor, whole: Tensor) -> bool:
    """True if `part` is the whole sample in its place, scaled, blurred or noised, as guidance makes it."""
    if part.shape != whole.shape or part.shape[-1] < 2:
        return False
    first, second = part.diff(dim=-1).flatten().float(), whole.diff(dim=-1).flatten().float()
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0)) >= RESEMBLES


def anchors(part: Tensor) -> list[tuple[int, ...]]:
    """Positions (batch, ...) of the largest values, which noise repeats nowhere."""
    first = part[:, 0]
    largest = first.abs().flatten().topk(min(ANCHORS, first.numel())).indices.tolist()
    return [tuple(int(i) for i in torch.unravel_index(torch.tensor(at), first.shape)) for at in largest]


def located_at(anchor: tuple[int, ...], part: Tensor, whole: Tensor) -> Piece | None:
    """`locate` by the element at `anchor`, which has to be at one place of the whole."""
    value = line(part, anchor, 1)[:, 0]
    places = (whole == value.reshape(1, -1, *[1] * (whole.ndim - 2))).all(dim=1).nonzero()
    if len(places) != 1:
        return None
    place, found, cut = places[0].tolist(), [], whole
    for dim in (0, *range(2, whole.ndim)):
        indices = indices_along(dim, line(part, anchor, dim), line(whole, place, dim))
        if indices is None:
            return None
        found.append(indices)
        cut = cut.index_select(dim, torch.tensor(indices, device=cut.device))
    if not torch.equal(cut, part):
        return None
    sizes = (whole.shape[0], *whole.shape[2:])
    return tuple(compact(indices, size) for indices, size in zip(found, sizes))


def line(x: Tensor, at: Iterable[int], dim: int) -> Tensor:
    """The values (C, n) along a dimension through the element at (batch, ...)."""
    batch, *rest = at
    index: list[Any] = [batch, slice(None), *rest]
    if dim == 1:  # the channels themselves: one element
        return x[tuple(index)][:, None]
    index[dim] = slice(None)
    values = x[tuple(index)]
    return values.T if dim == 0 else values


def indices_along(dim: int, part: Tensor, whole: Tensor) -> list[int] | None:
    if part.shape[1] * whole.shape[1] > LARGEST:
        return None
    same = (part[:, :, None] == whole[:, None, :]).all(dim=0)
    if not bool((same.sum(dim=1) == 1).all()):
        return None
    return same.int().argmax(dim=1).tolist()


def compact(indices: list[int], size: int) -> Indices:
    """The same piece always has the same form: None for all, a range for consecutive indices, else the indices."""
    if indices == list(range(size)):
        return None
    consecutive = indices == list(range(indices[0], indices[0] + len(indices)))
    return range(indices[0], indices[0] + len(indices)) if consecutive else tuple(indices)


def area(sizes: Iterable[int], starts: Iterable[int], whole: Iterable[int]) -> Piece:
    """The piece of a crop of these sizes and starts from the dimensions after the channels, in the form of `locate`."""
    piece = tuple(compact(list(range(at, at + size)), full) for size, at, full in zip(sizes, starts, whole))
    return WHOLE if all(indices is None for indices in piece) else (None, *piece)


class Same:
    """An object that equals itself alone. It is kept, so that no later one gets its id."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def signature(value: Any) -> Hashable:
    """Equal for patches that do the same: containers by their content, functions by code and closure, else identity.

    Guidance makes its closures anew at every step; their code and plain values tell them from other guidance.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return frozenset((signature(key), signature(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(signature, value))
    if isinstance(value, FunctionType):
        inside = tuple(own(cell.cell_contents) for cell in value.__closure__ or () if not is_empty(cell))
        return (value.__code__, inside, signature(value.__defaults__))
    return Same(value)


def own(value: Any) -> Hashable:
    """Key of a closure: plain values by value, all else by identity, since closures may hold each other."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else Same(value)


def is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
