"""What a DeviceLoop calls: a FusedDiT with the modulations of all steps computed beforehand."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import fastest_attention

if TYPE_CHECKING:
    from .loop import DeviceLoop

ROWS_AT_ONCE = 512  # conditions whose modulations are computed in one product


class FusedPredictor:
    """A FusedDiT with the modulations of all steps at hand: weights of a third of the model are read once for a run."""

    def __init__(self, loop: DeviceLoop):
        config, needed = loop.model.config, loop.needed
        self.model: Any = loop.model
        self.rows = loop.rows
        self.timesteps = torch.tensor([loop.schedule.timesteps[i] for i in needed], device=loop.device)
        slots = torch.zeros(len(loop.schedule), dtype=torch.long)
        slots[needed] = torch.arange(len(needed))
        self.slots = slots.to(loop.device)
        conditions = int(loop.rows.max()) + 1
        tensor: dict[str, Any] = {"dtype": loop.dtype, "device": loop.device}
        self.table = torch.zeros(len(needed), conditions, 6 * config.depth + 2, config.hidden_size, **tensor)
        tokens = (len(loop.rows), config.side**2, config.hidden_size)
        shapes = {"branch": (config.depth, 2, *tokens), "block": tokens}
        reuse = loop.cache.reuse
        self.kept = torch.zeros(shapes[reuse], **tensor) if reuse in shapes else None

    def prepare(self, labels: Tensor) -> None:
        at_once = max(1, ROWS_AT_ONCE // len(labels))
        for timesteps, table in zip(self.timesteps.split(at_once), self.table.split(at_once)):
            found = self.model.modulations(timesteps.repeat_interleave(len(labels)), labels.repeat(len(timesteps)))
            table.copy_(found.view_as(table))

    def attention(self, loop: DeviceLoop) -> AbstractContextManager[None]:
        config = loop.model.config
        width = config.hidden_size // config.num_heads
        return fastest_attention(len(loop.rows), config.num_heads, config.side**2, width, self.table)

    def __call__(self, x: Tensor, index: Tensor, reused: bool) -> Tensor:
        modulations = self.table.index_select(0, self.slots.index_select(0, index))[0]
        return self.model(x, modulations.index_select(0, self.rows), self.kept, reused)
