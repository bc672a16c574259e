"""Images of a run, one at a time: a clip of many frames need never be converted as a whole."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

CHECKER, CHECKERS = 8, (-0.25, 0.25)  # side and values of the squares that show through transparent pixels


class Frames(Protocol):
    """Images or frames (3, H, W) in [-1, 1], one at a time; a tensor (N, 3, H, W) is such."""

    @property
    def shape(self) -> torch.Size: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Tensor: ...


class ImageFrames:
    """Frames of ComfyUI's IMAGE (N, H, W, C) in [0, 1], converted when they are asked for, on the CPU.

    One channel is grey, two are grey and alpha, four are colour and alpha: transparent pixels show a checkerboard, so
    that what differs in alpha alone differs in the picture too. Raises ValueError on other shapes.
    """

    def __init__(self, batch: Tensor, label: str = "The run"):
        if batch.ndim != 4 or not len(batch) or not 1 <= batch.shape[-1] <= 4:
            raise ValueError(
                f"{label} has images of the shape {tuple(batch.shape)}; Compare needs at least one image of 1 to 4 "
                "channels, (N, H, W, C)."
            )
        self.batch = batch
        self.shape = torch.Size((len(batch), 3, *batch.shape[1:3]))

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, index: int) -> Tensor:
        frame = self.batch[index].cpu().movedim(-1, 0).float() * 2 - 1
        color = frame if len(frame) in (1, 3) else frame[:-1]
        color = color.expand(3, -1, -1)
        if len(frame) in (1, 3):
            return color
        alpha = (frame[-1:] + 1) / 2
        return color * alpha + checkerboard(*self.shape[2:]).to(color) * (1 - alpha)


def checkerboard(height: int, width: int) -> Tensor:
    rows, columns = torch.arange(height)[:, None] // CHECKER, torch.arange(width)[None] // CHECKER
    return torch.tensor(CHECKERS)[(rows + columns) % 2]
