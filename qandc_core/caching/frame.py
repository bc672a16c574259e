"""The host's knowledge of a model call before the model is called."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Condition = tuple[Hashable, int]  # id, side of guidance; ids may be shared between sides


@dataclass
class Frame:
    """The host's knowledge of the calls that follow: the input (b, C, ...) of every condition, and which piece of the
    sample it is, None where that is not known. `trusted`: nothing can change the inputs on their way to the model.
    """

    pieces: dict[Condition, Hashable | None]
    inputs: dict[Condition, Tensor]
    trusted: bool = True

    def holds(self, conditions: Sequence[Condition], x: Tensor, trusted: bool) -> bool:
        """True if x (N b, C, ...) is the inputs of these conditions; else something cut or changed them."""
        if x.shape[0] % len(conditions) or not self.inputs.keys() >= set(conditions):
            return False
        inputs = [self.inputs[condition] for condition in conditions]
        shape = x.shape[0] // len(conditions), *x.shape[1:]
        if any(part.shape != shape for part in inputs):
            return False
        if trusted and self.trusted:
            return True
        return all(torch.equal(part, known.to(x.device)) for part, known in zip(x.chunk(len(conditions)), inputs))


@dataclass(frozen=True)
class CallKeys:
    """`keys` of the features of each condition in the batch, None for a call that is computed whatever is planned;
    `lines` of the timeline that it belongs to.
    """

    keys: tuple[Hashable, ...] | None
    lines: tuple[tuple, ...]
