"""Temporal-aware parallel clustering, TAP (arXiv 2503.02508, section 3.1, Eq. 4-8, Algorithm 1).

Which of N intermediate samples should calibration use? Neighbouring steps of one trajectory show nearly the same
image, so a random choice spends most of its samples on repetitions. TAP clusters the samples by an affinity that sees
both the image (cosine of the pixels) and the time (exp(-|t_k - t_h| / time_scale)), and draws evenly from all clusters.

Spectral clustering wants the N x N affinity matrix and its eigenvectors: 10 MB for the 1,600 samples of 32 images at 50
steps, 40 GB for 100,000. The paper clusters subsamples; here the subsample are landmarks, which label all N points at
once (Nystrom's idea, in the bipartite form of Eq. 4):

  1. Draw n << N landmarks, and compute A (N, n), every point's affinity to them, in blocks of rows.
  2. Normalize by degrees on both sides, L = D_r^(-1/2) A D_c^(-1/2). Its left singular vectors are the spectral
     embedding of all N points. They come from the eigenvectors V of the small Gram matrix L^T L (n, n), summed over the
     blocks, as L V / s: cost O(N n D + N n^2 + n^3), memory O(block n + n^2).
  3. k-means on the rows of the embedding labels all N points.
  4. Steps 1 to 3 run num_subsamples times with landmarks of their own, in the paper "in parallel". Two points belong
     together if most runs say so: Algorithm 1 clusters the co-occurrence matrix H H^T, where H (N, runs x k) holds the
     runs' one-hot labels. k-means on the rows of H does the same without an N x N matrix.

The Gram matrix squares singular values, so it is added up in float64; an affinity from float32 features resolves none
below about 1e-5 of the largest, and those directions are dropped instead of being clustered as noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from ..numerics import with_float64
from .selection import checked_timesteps, draw_evenly, require_at_least_one

if TYPE_CHECKING:
    from scipy.sparse import csr_array

BLOCK = 2048  # rows of A that exist at a time
MAX_LANDMARKS = 1024
FIT_ROWS = 20_000  # k-means is fitted on this many rows and predicts the rest
RESTARTS = 4
AGGREGATION_RESTARTS = 10  # cheap, and one-hot rows have many local optima
SAME = 1e-3  # distance of two directions, or steps / time_scale, that a float32 affinity hardly resolves
SMALLEST_SINGULAR = 1e-5  # relative to the largest; below it lies the rounding noise of a float32 affinity


@dataclass(frozen=True, eq=False)
class TapSelection:
    """indices (min(num_samples, N),) sorted and labels (N,) in 0..num_clusters-1, both int64 on the CPU."""

    indices: Tensor
    labels: Tensor
    num_clusters: int


@dataclass(frozen=True, eq=False)
class Pool:
    """Candidates of TAP: features (N, D), timesteps (N,) float32 in steps, and the weights of their affinity."""

    features: Tensor
    timesteps: Tensor
    alpha: float
    time_scale: float

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Tensor) -> Pool:
        return Pool(self.features[rows], self.timesteps[rows], self.alpha, self.time_scale)

    def blocks(self, size: int) -> Iterator[Pool]:
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def directions(self) -> Tensor:
        """x / |x| in float32 for any scale of x; zero vectors stay zero."""
        x = self.features.to(torch.promote_types(self.features.dtype, torch.float32))
        x = x / x.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        return F.normalize(x.float(), dim=1)


def affinity(points: Pool, landmarks: Pool) -> Tensor:
    """A_final of Eq. 6-8, (N, n), with the cosine shifted by 1 so that no entry is negative."""
    spatial = (1 + points.directions() @ landmarks.directions().T).clamp_min_(0)
    temporal = (points.timesteps[:, None] - landmarks.timesteps[None]).abs_().div_(-points.time_scale).exp_()
    return spatial.mul_(points.alpha).add_(temporal, alpha=1 - points.alpha)


def row_normalized(a: Tensor) -> Tensor:
    """D_r^(-1/2) A of Eq. 4 in float64, which the squares in the Gram matrix need. Without affinity the row is zero."""
    a = a.double()
    return a.mul_(a.sum(dim=1, keepdim=True).clamp_min_(torch.finfo(a.dtype).tiny).rsqrt_())


def spectral_embedding(pool: Pool, landmarks: Pool, k: int, block: int = BLOCK) -> np.ndarray:
    """First k left singular vectors of L = D_r^(-1/2) A D_c^(-1/2) (Eq. 4, 5), (N, <= k) float32.

    The right ones come from the Gram matrix L^T L (n, n), summed over blocks; the left ones are L V / s. Vectors of
    (numerically) zero singular values are left out, so a pool of low rank gets fewer columns.
    """
    n = len(landmarks)
    column_sums = torch.zeros(n, dtype=torch.float64)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for part in pool.blocks(block):
        a = affinity(part, landmarks)
        scaled = row_normalized(a)
        column_sums += a.sum(dim=0, dtype=torch.float64).cpu()
        gram += (scaled.T @ scaled).cpu()
    column_scale = column_sums.rsqrt()
    gram *= column_scale[:, None] * column_scale[None]

    squared, right = largest_eigenpairs(gram.numpy(), k)
    singular = np.sqrt(squared.clip(min=0))[::-1]
    kept = singular > SMALLEST_SINGULAR * singular[0]
    basis = column_scale[:, None] * torch.from_numpy(right[:, ::-1][:, kept] / singular[kept])
    basis = basis.to(pool.features.device)
    left = [(row_normalized(affinity(part, landmarks)) @ basis).float() for part in pool.blocks(block)]
    return torch.cat(left).cpu().numpy()


def largest_eigenpairs(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest eigenvalues of a symmetric matrix (n, n), rising, and their vectors (n, <= k)."""
    from scipy.linalg import LinAlgError, eigh

    n = len(matrix)
    try:
        return eigh(matrix, subset_by_index=[max(n - k, 0), n - 1])
    except (
        LinAlgError
    ):  # LAPACK's evr, which finds some of them, gives up on a few matrices with many equal eigenvalues
        values, vectors = eigh(matrix, driver="evd")
        return values[-k:], vectors[:, -k:]


def kmeans(
    rows: np.ndarray | csr_array, weights: np.ndarray, k: int, restarts: int, rng: np.random.Generator
) -> np.ndarray:
    """Labels (N,) of k-means on rows (N, dim) with weights (N,), fitted on at most FIT_ROWS rows to be linear in N."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    fit = np.sort(rng.permutation(rows.shape[0])[: max(FIT_ROWS, k)])
    model = KMeans(k, n_init=restarts, max_iter=100, random_state=int(rng.integers(2**31)))
    with warnings.catch_warnings():
        # Fewer distinct rows than k (a rare point was not among those fitted): the surplus clusters stay empty.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels: np.ndarray = model.fit(rows[fit], sample_weight=weights[fit]).predict(rows)
    return labels


def aggregate(clusterings: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Algorithm 1: k-means on the co-occurrence of m clusterings (N, m) -> labels (N,) in 0..k'-1, k' <= k.

    Co-occurrence is H H^T with H the (N, m k) one-hot matrix; k-means runs on H, whose equal rows are merged into one
    row with their count as weight.
    """
    from scipy.sparse import csr_array

    tuples, member, counts = np.unique(clusterings, axis=0, return_inverse=True, return_counts=True)
    num_rows, m = tuples.shape
    width = int(tuples.max()) + 1
    # scikit-learn takes 32-bit sparse indices only.
    columns = (tuples + width * np.arange(m)).ravel().astype(np.int32)
    starts = m * np.arange(num_rows + 1, dtype=np.int32)
    one_hot = csr_array((np.ones(num_rows * m), columns, starts), shape=(num_rows, m * width))
    merged = kmeans(one_hot, counts.astype(np.float64), min(k, num_rows), AGGREGATION_RESTARTS, rng)
    _, labels = np.unique(merged[member.ravel()], return_inverse=True)
    return labels


def count_distinct(pool: Pool, limit: int) -> int:
    """Number of points further than SAME from each other in what the affinity sees of them, at most limit."""
    known = torch.empty(0, pool.features.shape[1] + 1, device=pool.features.device)
    for part in pool.blocks(256):
        direction = part.directions() * float(pool.alpha > 0)
        step = part.timesteps[:, None] * (float(pool.alpha < 1) / pool.time_scale)
        new = torch.cat([direction, step], dim=1)
        new = new[(distances(new, known) > SAME).all(dim=1)]
        while len(new) and len(known) < limit:
            known = torch.cat([known, new[:1]])
            new = new[distances(new, new[:1])[:, 0] > SAME]
        if len(known) == limit:
            break
    return len(known)


def distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # the matrix form cancels at steps near 1000


def checked_pool(features: Tensor | ArrayLike, timesteps: Tensor | ArrayLike, alpha: float, time_scale: float) -> Pool:
    x, t = torch.as_tensor(features).detach(), checked_timesteps(timesteps)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"features has shape {tuple(x.shape)}, expected (N, D) with N, D >= 1.")
    if len(x) != len(t):
        raise ValueError(f"features has {len(x)} rows and timesteps {len(t)}, expected one timestep per row.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected a weight between 0 (time only) and 1 (features only).")
    if not time_scale > 0:
        raise ValueError(f"time_scale is {time_scale}, expected a positive number of steps.")
    x = x.to(with_float64(x.device))
    # Relative to the first step, where float32 holds any realistic index exactly.
    pool = Pool(x, (t - t.min()).float().to(x.device), float(alpha), float(time_scale))
    if not all(part.features.isfinite().all() for part in pool.blocks(BLOCK)):
        raise ValueError("features contains NaN or infinity, expected finite values.")
    return pool


def tap_select(
    features: Tensor | ArrayLike,
    timesteps: Tensor | ArrayLike,
    num_samples: int = 800,
    num_clusters: int = 100,
    num_subsamples: int = 3,
    subsample_fraction: float = 0.05,
    alpha: float = 0.5,
    time_scale: float = 1.0,
    seed: int = 0,
) -> TapSelection:
    """TAP calibration set (Eq. 4-8, Algorithm 1): cluster all N candidates, draw evenly from the clusters.

    features (N, D), timesteps (N,) as step indices, time_scale in steps. Landmark form: each of the num_subsamples
    runs labels all N points through their affinity to n = min(N, max(N * subsample_fraction, 4 k), 1024) landmarks,
    k = min(num_clusters, distinct points). A = alpha * (1 + cosine) + (1 - alpha) * exp(-|t_k - t_h| / time_scale):
    the shift keeps every degree positive where clipping would erase the difference between orthogonal and opposed
    points, and adds a constant to Eq. 6, so that the balance of the two terms is the printed one. A zero vector has
    cosine 0. A pool of N <= num_samples is returned whole. Runs in blocks on the device of features; bad
    input raises ValueError.
    """
    pool = checked_pool(features, timesteps, alpha, time_scale)
    for name, value in [
        ("num_samples", num_samples),
        ("num_clusters", num_clusters),
        ("num_subsamples", num_subsamples),
    ]:
        require_at_least_one(name, value)
    if not 0 < subsample_fraction <= 1:
        raise ValueError(f"subsample_fraction is {subsample_fraction}, expected a fraction in (0, 1].")
    rng = np.random.default_rng(seed)
    k = count_distinct(pool, num_clusters)
    n = min(len(pool), max(int(len(pool) * subsample_fraction), 4 * k), MAX_LANDMARKS)
    clusterings = []
    for stream in rng.spawn(num_subsamples):
        subsample = torch.from_numpy(stream.choice(len(pool), n, replace=False))
        embedding = spectral_embedding(pool, pool[subsample.to(pool.features.device)], k)
        clusterings.append(kmeans(embedding, np.ones(len(pool), np.float32), k, RESTARTS, stream))
    labels = aggregate(np.stack(clusterings, axis=1), k, rng)
    indices = draw_evenly(labels, num_samples, rng)
    return TapSelection(indices, torch.from_numpy(labels.astype(np.int64)), int(labels.max()) + 1)
