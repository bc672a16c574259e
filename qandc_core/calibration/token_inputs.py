"""Statistics of the inputs of a text encoder's layers, in as many passes over the texts as memory asks for.

X^T X of all layers takes more memory than the encoder itself: 15 GB for T5-XXL. Layers are therefore taken in the order
in which they run, in groups whose X^T X fits, and the texts run once for each group, no further than its last layer.
Layers that are given the same tensor, such as query, key and value, share their statistics, and GPTQ their factor. The
inputs are those of the unquantized encoder, so that the result does not depend on the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .layer_inputs import HELD_OUT_TOKENS, Share
from .statistics import LayerStatistics, check_inputs_finite, merge_tokens, observed

EncodeText = Callable[[Any], object]  # encodes one text, given as whatever the host calls a text


@dataclass(frozen=True)
class Feed:
    """A layer's inputs: their width K, and the first layer that is given the same tensor (maybe itself)."""

    owner: str
    width: int


class Enough(Exception):
    """All layers that are asked for have run."""


def feeds_of(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Feed]:
    """The layers that run, in that order."""
    feeds: dict[str, Feed] = {}
    last: tuple[Tensor | None, str] = None, ""

    def observe(name: str, x: Tensor) -> None:
        nonlocal last
        if x is not last[0]:
            last = x, name
        feeds.setdefault(name, Feed(last[1], x.shape[-1]))

    with observed(layers.items(), observe):
        run()
    return feeds


def groups_of(feeds: Mapping[str, Feed], room: int) -> list[list[str]]:
    """The layers in order, in groups whose X^T X takes at most `room` bytes where a single one does not take more."""
    groups: list[list[str]] = []
    left = 0
    for name, feed in feeds.items():
        needed = 4 * feed.width**2 if feed.owner == name else 0
        if not groups or needed > max(0, left):
            groups.append([])
            left = room
        groups[-1].append(name)
        left -= needed
    return groups


def statistics_of(
    layers: Mapping[str, nn.Module],
    feeds: Mapping[str, Feed],
    group: Sequence[str],
    run: EncodeText,
    texts: Sequence[Any],
    held_out: Sequence[Any],
    counted: Callable[[Tensor], Tensor] = merge_tokens,
    settle: Callable[[LayerStatistics], object] = lambda statistics: None,
) -> dict[str, LayerStatistics]:
    """Statistics of a group's layers on `texts`, with inputs on the texts held out; `settle` may move empty ones.

    `counted` gives the inputs (M, K) of the tokens that matter among those of a call (..., K). Without texts there is
    no X^T X. Raises ValueError on inputs that are not finite.
    """
    owners = {
        name: LayerStatistics.empty(feeds[name].width, bool(texts), 0, HELD_OUT_TOKENS if held_out else 0)
        for name in dict.fromkeys(feeds[name].owner for name in group)
    }
    for statistics in owners.values():
        settle(statistics)
    share = Share(HELD_OUT_TOKENS, max(1, len(held_out)))

    def add(name: str, x: Tensor) -> None:
        x = counted(x)
        if len(x):
            owners[name].update(x)

    def keep(wanted: int) -> Callable[[str, Tensor], None]:
        def keep_some(name: str, x: Tensor) -> None:
            x = counted(x)
            owners[name].keep_held_out(x[:: max(1, len(x) // max(1, wanted))][:wanted])

        return keep_some

    watched = [(name, layers[name]) for name in owners]
    with stopped_after(layers, feeds, group):
        for observe, text in [*((add, text) for text in texts), *((keep(share.take(1)), text) for text in held_out)]:
            with observed(watched, observe), suppress(Enough):
                run(text)
    check_inputs_finite(owners)
    return {name: owners[feeds[name].owner] for name in group}


@contextmanager
def stopped_after(layers: Mapping[str, nn.Module], feeds: Mapping[str, Feed], group: Sequence[str]) -> Iterator[None]:
    """Raises Enough in every run that comes to the first layer after the group."""
    order = list(feeds)
    end = order.index(group[-1]) + 1

    def stop(*_: Any) -> None:
        raise Enough

    handles = [layers[name].register_forward_pre_hook(stop) for name in order[end : end + 1]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
