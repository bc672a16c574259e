"""A DiT as it is, in the engine's loop on the device: the baselines of a FusedDiT."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from qandc_core.caching.schedule import CacheConfig
from qandc_core.diffusion.process import SamplingConfig
from qandc_core.fused.dit import FusedDiT
from qandc_core.fused.loop import DeviceLoop
from qandc_core.fused.predictor import FusedPredictor
from qandc_core.models.dit import DiT


class PlainPredictor:
    """Calls the model with timesteps and labels, as any other loop does. It reuses whole predictions only."""

    def __init__(self, loop: DeviceLoop):
        if loop.cache.reuse != "prediction":
            raise ValueError(
                "On the device a DiT reuses predictions only; use reuse='prediction', or make it a FusedDiT with "
                "fuse_dit()."
            )
        self.model, self.rows = loop.model, loop.rows
        self.timesteps = torch.tensor(loop.schedule.timesteps, device=loop.device)
        self.labels = torch.zeros_like(loop.rows)

    def prepare(self, labels: Tensor) -> None:
        self.labels.copy_(labels[self.rows])

    def attention(self, loop: DeviceLoop) -> AbstractContextManager[None]:
        return nullcontext()

    def __call__(self, x: Tensor, index: Tensor, reused: bool) -> Tensor:
        return self.model(x, self.timesteps.index_select(0, index).expand(len(x)), self.labels)


def loop_of(
    model: DiT | FusedDiT, images: int, config: SamplingConfig, cache: CacheConfig | None = None, **options: Any
) -> DeviceLoop:
    """The loop of either kind of model."""
    predictor = FusedPredictor if isinstance(model, FusedDiT) else PlainPredictor
    return DeviceLoop(model, images, config, cache, predictor=predictor, **options)
