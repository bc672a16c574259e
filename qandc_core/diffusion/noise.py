"""Noise that depends on the image alone, never on how images are batched or sharded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def image_seed(index: int, seed: int) -> int:
    # torch's CPU generator reads 32 bits of its seed. The golden-ratio step keeps a million images of any two of
    # 1,000 run seeds apart.
    return (seed * 0x9E3779B9 + index) % 2**32


class ImageNoise:
    """One CPU generator for each image index; every draw gives (len(indices), *shape) float32."""

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int]):
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(image_seed(index, seed)) for index in indices]

    def draw(self) -> Tensor:
        noise = torch.empty(len(self.generators), *self.shape)
        for image, generator in zip(noise, self.generators):
            torch.randn(self.shape, generator=generator, out=image)
        return noise


class GivenNoise:
    """Noise supplied by the caller: the start (N, C, H, W), or the start and each step's (1 + steps, N, C, H, W)."""

    def __init__(self, noise: Tensor, seed: int, indices: Sequence[int], channels: int):
        if noise.ndim not in (4, 5) or tuple(noise.shape[-4:-2]) != (len(indices), channels):
            raise ValueError(
                f"noise must be (N, C, H, W) or (1 + steps, N, C, H, W) for {len(indices)} images of {channels} "
                f"channels, got {tuple(noise.shape)}."
            )
        if not torch.isfinite(noise).all():
            raise ValueError("noise contains values that are not finite; generate it again.")
        self.queue = list(noise) if noise.ndim == 5 else [noise]
        self.own = ImageNoise(seed, indices, noise.shape[-3:])

    def draw(self) -> Tensor:
        own = (
            self.own.draw()
        )  # drawn even where noise is given, so that the seed's start never returns as a step's noise
        return self.queue.pop(0) if self.queue else own
