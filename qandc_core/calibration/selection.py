"""Selects calibration samples from a candidate pool: evenly over groups, stratified by timestep, at random."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def require_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}, expected 1 or more.")


def checked_timesteps(timesteps: Tensor | ArrayLike) -> Tensor:
    """Timesteps as a finite float64 tensor (N,) on the CPU, N >= 1."""
    steps = torch.as_tensor(timesteps).detach().cpu().double()
    if steps.ndim != 1 or len(steps) == 0:
        raise ValueError(f"timesteps has shape {tuple(steps.shape)}, expected (N,) with N >= 1.")
    if not steps.isfinite().all():
        raise ValueError("timesteps contains NaN or infinity, expected finite step indices.")
    return steps


def draw_evenly(groups: np.ndarray, num_samples: int, rng: np.random.Generator) -> Tensor:
    """Equal quota per group, drawn uniformly without replacement; a small group's rest goes to the others.

    groups (N,) labels 0..G-1 -> sorted indices (min(num_samples, N),) int64. Points are taken rank by rank, where
    the rank of a point is its place in a random order of its group; the last, partial rank falls to random groups.
    """
    shuffled = rng.permutation(len(groups))
    by_group = shuffled[np.argsort(groups[shuffled], kind="stable")]
    sizes = np.bincount(groups)
    rank = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    first = np.lexsort((rng.random(len(groups)), rank))[:num_samples]
    return torch.from_numpy(np.sort(by_group[first]).astype(np.int64))


def stratified_select(timesteps: Tensor | ArrayLike, num_samples: int, seed: int = 0) -> Tensor:
    """Baseline of TAP: equal count per timestep. timesteps (N,) -> sorted indices (min(num_samples, N),) int64."""
    require_at_least_one("num_samples", num_samples)
    _, groups = np.unique(checked_timesteps(timesteps).numpy(), return_inverse=True)
    return draw_evenly(groups, num_samples, np.random.default_rng(seed))


def random_select(num_points: int, num_samples: int, seed: int = 0) -> Tensor:
    """Baseline of TAP: uniform without replacement, sorted indices (min(num_samples, num_points),) int64."""
    require_at_least_one("num_points", num_points)
    require_at_least_one("num_samples", num_samples)
    drawn = np.random.default_rng(seed).permutation(num_points)[:num_samples]
    return torch.from_numpy(np.sort(drawn).astype(np.int64))
