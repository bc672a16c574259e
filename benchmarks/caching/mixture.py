"""An exact denoiser to fit settings on, so that no trained model is tuned on and then judged.

The posterior mean of a mixture of Gaussians is known in closed form. This one has ten classes of three components, with
means and covariances whose spectra fall like those of images, and guidance between the mixture of one class and that of
all. A call takes a millisecond, so every sampler can be run at every number of steps and with every plan.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Mixture:
    """predict(x, sigma) -> guided and unconditional clean sample, for x (N, D) = clean + sigma noise.

    With `flow`, x = (1 - sigma) clean + sigma noise instead.
    """

    def __init__(self, flow: bool = False, seed: int = 0, samples: int = 6, guidance: float = 1.5, dim: int = 96):
        generator = torch.Generator().manual_seed(seed)
        self.flow, self.guidance, self.dim, classes, per, rank = flow, guidance, dim, 10, 3, 24
        scale = torch.arange(1, dim + 1).float() ** -0.75
        scale *= math.sqrt(dim) / scale.norm()
        basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
        count = classes * per
        self.means = 0.5 * torch.randn(count, dim, generator=generator) * scale @ basis
        spread = basis.T @ (scale[:, None] * torch.randn(count, dim, rank, generator=generator))
        self.axes, lengths, _ = torch.linalg.svd(spread, full_matrices=False)
        self.variance, self.rest = lengths.square() / rank * 0.35**2, 1e-3
        self.flat = self.axes.permute(1, 0, 2).reshape(dim, -1)  # all axes side by side: one product instead of many
        self.means_along = torch.einsum("kd,kdr->kr", self.means, self.axes)
        self.classes, self.labels = torch.arange(count) // per, torch.arange(samples) % classes

    def predict(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        if self.flow:
            x, sigma = x / max(1 - sigma, 1e-4), sigma / max(1 - sigma, 1e-4)
        inside, outside = self.variance + self.rest + sigma**2, self.rest + sigma**2
        along = (x @ self.flat).view(len(x), *self.variance.shape) - self.means_along  # (N, components, rank)
        square = torch.cdist(x, self.means).square() - along.square().sum(2)
        fit = -0.5 * (square / outside + (along.square() / inside + inside.log()).sum(2))
        gain = (self.variance + self.rest) / inside - self.rest / outside
        own = self.classes == self.labels[: len(x), None]
        clean, unconditional = (
            self.mean(x, along * gain, weights.softmax(1), self.rest / outside)
            for weights in (fit.where(own, -torch.inf), fit)
        )
        return unconditional + self.guidance * (clean - unconditional), unconditional

    def mean(self, x: Tensor, moved: Tensor, weights: Tensor, share: float) -> Tensor:
        """Of the components' posterior means, by their weights (N, components)."""
        center = weights @ self.means
        return center + share * (x - center) + (moved * weights[..., None]).flatten(1) @ self.flat.T
