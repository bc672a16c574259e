"""TAP against a dense reference of Eq. 4-8, planted pools, tiny pools, and its baselines."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from benchmarks.speed.tap import benchmark_tap
from qandc_core.calibration import tap
from qandc_core.calibration.selection import draw_evenly, random_select, stratified_select
from qandc_core.calibration.tap import (
    TapSelection,
    affinity,
    aggregate,
    checked_pool,
    count_distinct,
    largest_eigenpairs,
    spectral_embedding,
    tap_select,
)

ROOT = Path(__file__).resolve().parents[2]


def planted(num_points=600, clusters=6, dim=16, noise=0.1, steps=1, seed=0):
    """Points around random directions; the timestep is drawn apart from the direction."""
    g = torch.Generator().manual_seed(seed)
    member = torch.randint(clusters, (num_points,), generator=g)
    centers = 3 * torch.nn.functional.normalize(torch.randn(clusters, dim, generator=g), dim=1)
    features = centers[member] + noise * torch.randn(num_points, dim, generator=g)
    return features, torch.randint(steps, (num_points,), generator=g), member


def dense_reference(features, timesteps, landmarks, alpha, time_scale):
    """Eq. 4-8 point by point in float64: A (N, n) with the cosine shifted by one, and L."""
    x, t = features.double().numpy(), timesteps.double().numpy()
    a = np.empty((len(x), len(landmarks)))
    for k in range(len(x)):
        for column, h in enumerate(landmarks):
            cosine = x[k] @ x[h] / np.sqrt((x[k] @ x[k]) * (x[h] @ x[h]))
            a[k, column] = alpha * (1 + cosine) + (1 - alpha) * np.exp(-abs(t[k] - t[h]) / time_scale)
    return a, np.diag(a.sum(1) ** -0.5) @ a @ np.diag(a.sum(0) ** -0.5)


def same_partition(a, b):
    return adjusted_rand_score(np.asarray(a), np.asarray(b)) == 1.0


def assert_valid(result: TapSelection, num_points: int, num_samples: int) -> None:
    assert result.indices.dtype == result.labels.dtype == torch.int64
    assert result.labels.shape == (num_points,)
    assert result.indices.shape == (min(num_samples, num_points),)
    assert (result.indices.diff() > 0).all()
    assert 0 <= result.indices[0] and result.indices[-1] < num_points
    assert result.labels.unique().tolist() == list(range(result.num_clusters))


# Eq. 4-8 against the dense reference


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_affinity_is_equation_6(alpha):
    features, timesteps, _ = planted(60, steps=7)
    landmarks = torch.tensor([3, 50, 9, 22])
    expected, _ = dense_reference(features, timesteps, landmarks, alpha, 2.0)
    pool = checked_pool(features, timesteps, alpha, 2.0)
    np.testing.assert_allclose(affinity(pool, pool[landmarks]).numpy(), expected, atol=1e-6)


def test_affinity_of_opposed_points_is_never_negative():
    features, timesteps, _ = planted(200, noise=1.0)
    pool = checked_pool(torch.cat([features, -features]), timesteps.repeat(2), 1.0, 1.0)
    directions = pool.directions()
    assert (directions @ directions.T).min() < -1  # by rounding
    assert affinity(pool, pool).min() == 0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_embedding_spans_the_left_singular_vectors(alpha):
    features, timesteps, _ = planted(300, noise=0.5, steps=12)
    landmarks = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:60]
    _, laplacian = dense_reference(features, timesteps, landmarks, alpha, 1.0)
    left, singular, _ = np.linalg.svd(laplacian, full_matrices=False)
    k = 8
    assert singular[k - 1] > 1.05 * singular[k]
    pool = checked_pool(features, timesteps, alpha, 1.0)
    embedding = spectral_embedding(pool, pool[landmarks], k)
    assert embedding.shape == (300, k)
    # Every vector agrees up to its sign where the singular values are apart, and the spanned subspace always does.
    np.testing.assert_allclose(embedding.T @ embedding, np.eye(k), atol=1e-5)
    np.testing.assert_allclose(np.linalg.svd(left[:, :k].T @ embedding)[1], 1, atol=1e-5)
    np.testing.assert_allclose(abs(left[:, 0] @ embedding[:, 0]), 1, atol=1e-5)


def test_one_subsample_gives_the_partition_of_the_dense_reference():
    features, timesteps, member = planted(200, clusters=5)
    timesteps = 4 * (member % 2)
    result = tap_select(features, timesteps, 50, num_clusters=5, num_subsamples=1)
    stream = np.random.default_rng(0).spawn(1)[0]
    landmarks = stream.choice(200, 20, replace=False)
    _, laplacian = dense_reference(features, timesteps, landmarks, 0.5, 1.0)
    left = np.linalg.svd(laplacian, full_matrices=False)[0][:, :5]
    reference = KMeans(5, n_init=10, random_state=0).fit_predict(left)
    assert same_partition(reference, result.labels)
    assert same_partition(reference, member)


@pytest.mark.parametrize("block", [1, 7, 256, 10_000])
def test_embedding_does_not_depend_on_the_block_size(block):
    features, timesteps, _ = planted(257, noise=0.3, steps=5)
    pool = checked_pool(features, timesteps, 0.5, 1.0)
    whole = spectral_embedding(pool, pool[torch.arange(40)], 6)
    blocked = spectral_embedding(pool, pool[torch.arange(40)], 6, block)
    np.testing.assert_allclose(blocked * np.sign((blocked * whole).sum(0)), whole, atol=1e-5)


def test_selection_does_not_depend_on_the_block_size(monkeypatch):
    features, timesteps, _ = planted(500)
    whole = tap_select(features, timesteps, 60, num_clusters=6)
    monkeypatch.setattr(spectral_embedding, "__defaults__", (64,))
    monkeypatch.setattr(tap, "BLOCK", 64)
    blocked = tap_select(features, timesteps, 60, num_clusters=6)
    assert same_partition(whole.labels, blocked.labels)


def test_low_rank_affinity_has_few_singular_vectors():
    features, timesteps, _ = planted(200, dim=2)
    pool = checked_pool(features, timesteps, 1.0, 1.0)
    assert spectral_embedding(pool, pool[torch.arange(50)], 20).shape == (200, 3)  # 1 + cosine in the plane


# Clusters


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_planted_clusters_are_recovered(alpha):
    features, timesteps, member = planted(3000, clusters=20, dim=32)
    result = tap_select(features, timesteps, 200, num_clusters=20, alpha=alpha)
    assert_valid(result, 3000, 200)
    assert same_partition(result.labels, member)


def test_planted_clusters_with_a_common_offset_are_recovered():
    features, timesteps, member = planted(1500, clusters=8, dim=32)
    result = tap_select(features + 10, timesteps, 100, num_clusters=8)
    assert same_partition(result.labels, member)


def test_time_and_direction_both_split_the_pool():
    features, timesteps, member = planted(800, clusters=2, steps=2)
    result = tap_select(features, 10 * timesteps, 40, num_clusters=4)
    assert same_partition(result.labels, 2 * member + timesteps)


def test_every_point_is_labelled_though_few_are_landmarks():
    features, timesteps, member = planted(4000, clusters=5)
    result = tap_select(features, timesteps, 100, num_clusters=5, subsample_fraction=0.01, num_subsamples=2)
    assert same_partition(result.labels, member)
    assert (torch.bincount(result.labels) > 700).all()


def test_alpha_0_clusters_by_time():
    features, _, _ = planted(500)
    timesteps = torch.randint(5, (500,), generator=torch.Generator().manual_seed(3))
    result = tap_select(features, timesteps, 50, num_clusters=100, alpha=0.0)
    assert result.num_clusters == 5
    assert same_partition(result.labels, timesteps)


def test_alpha_1_ignores_time():
    features, timesteps, member = planted(600, steps=50)
    result = tap_select(features, timesteps, 50, num_clusters=6, alpha=1.0)
    assert same_partition(result.labels, member)


def test_time_scale_sets_the_width_of_the_temporal_kernel():
    timesteps = torch.arange(100)
    pools = [checked_pool(torch.ones(100, 1), timesteps, 0.0, scale) for scale in (1.0, 10.0)]
    narrow, wide = [affinity(pool, pool[torch.tensor([0])])[:, 0] for pool in pools]
    torch.testing.assert_close(narrow[1:10], wide[10:100:10])
    assert wide[20] > 0.1 > narrow[20]


def test_time_scale_decides_whether_raw_timesteps_have_neighbours():
    """With t in 0..999 and a scale of one step each timestep is alone; a scale of 20 joins the runs."""
    runs = torch.cat([torch.arange(0, 200, 20), torch.arange(700, 900, 20)])
    timesteps = runs.repeat(20)
    features = torch.ones(len(timesteps), 1)
    near = tap_select(features, timesteps, 40, num_clusters=2, alpha=0.0, time_scale=60.0)
    assert same_partition(near.labels, timesteps > 500)
    alone = checked_pool(features, timesteps, 0.0, 1.0)
    torch.testing.assert_close(affinity(alone[:20], alone[:20]), torch.eye(20), atol=1e-6, rtol=0)


def test_scale_of_features_does_not_matter():
    features, timesteps, _ = planted(300)
    plain = tap_select(features, timesteps, 30, num_clusters=6)
    scales = torch.logspace(-30, 30, 300)[:, None]
    scaled = tap_select(features * scales, timesteps, 30, num_clusters=6)
    assert same_partition(plain.labels, scaled.labels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_float_dtypes_agree(dtype):
    features, timesteps, member = planted(400)
    result = tap_select(features.to(dtype), timesteps, 40, num_clusters=6)
    assert same_partition(result.labels, member)


def test_numpy_input_gives_the_same_selection():
    features, timesteps, _ = planted(400)
    expected = tap_select(features, timesteps, 40, num_clusters=6)
    for steps in (timesteps.numpy(), timesteps.tolist(), timesteps.double()):
        result = tap_select(features.numpy(), steps, 40, num_clusters=6)
        assert torch.equal(result.indices, expected.indices) and torch.equal(result.labels, expected.labels)


def test_features_that_require_grad_are_accepted_and_left_alone():
    features, timesteps, _ = planted(100)
    original = features.clone()
    assert_valid(tap_select(features.requires_grad_(), timesteps, 10, num_clusters=6), 100, 10)
    assert torch.equal(features.detach(), original)


def test_kmeans_fitted_on_a_part_labels_all_points(monkeypatch):
    monkeypatch.setattr(tap, "FIT_ROWS", 150)
    features, timesteps, member = planted(2000)
    result = tap_select(features, timesteps, 60, num_clusters=6)
    assert same_partition(result.labels, member)


# Aggregation


def test_aggregation_outvotes_one_bad_clustering():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 100)
    good = [rng.permutation(4)[truth] for _ in range(2)]
    bad = np.where(np.arange(400) % 10 == 0, rng.integers(4, size=400), truth)
    assert same_partition(aggregate(np.stack([*good, bad], axis=1), 4, rng), truth)


def test_aggregation_of_equal_clusterings_is_that_clustering():
    rng = np.random.default_rng(0)
    truth = rng.integers(30, size=500)
    shuffled = [rng.permutation(30)[truth] for _ in range(3)]
    assert same_partition(aggregate(np.stack(shuffled, axis=1), 30, rng), truth)


def test_aggregation_is_kmeans_on_the_factor_of_the_co_occurrence_matrix():
    """The merged weighted rows reach the inertia of plain k-means on the whole one-hot matrix."""
    rng = np.random.default_rng(1)
    clusterings = rng.integers(3, size=(300, 3))
    one_hot = np.concatenate([np.eye(3)[column] for column in clusterings.T], axis=1)
    co_occurrence = (clusterings[:, None] == clusterings[None]).sum(-1)
    np.testing.assert_array_equal(one_hot @ one_hot.T, co_occurrence)

    def inertia(labels):
        parts = [one_hot[labels == label] for label in np.unique(labels)]
        return sum(((part - part.mean(0)) ** 2).sum() for part in parts)

    best = KMeans(3, n_init=20, random_state=0).fit(one_hot).inertia_
    assert inertia(aggregate(clusterings, 3, rng)) <= 1.05 * best


# The draw

group_lists = st.lists(st.integers(0, 6), min_size=1, max_size=80)


@settings(max_examples=150, deadline=None)
@given(group_lists, st.integers(1, 100), st.integers(0, 2**32))
def test_quota_is_equal_up_to_the_size_of_a_group(values, num_samples, seed):
    groups = np.unique(values, return_inverse=True)[1]
    indices = draw_evenly(groups, num_samples, np.random.default_rng(seed)).numpy()
    assert len(indices) == min(num_samples, len(groups))
    assert (np.diff(indices) > 0).all()
    sizes = np.bincount(groups)
    drawn = np.bincount(groups[indices], minlength=len(sizes))
    unfilled = drawn[drawn < sizes]
    assert (drawn <= sizes).all()
    # No group could take one more without being ahead of a group that still has points.
    assert len(unfilled) == 0 or drawn.max() <= unfilled.min() + 1


def test_draw_is_uniform_within_a_group_and_over_groups():
    groups = np.repeat([0, 1, 2], [10, 20, 30])
    rng = np.random.default_rng(0)
    hits = np.zeros(60)
    for _ in range(3000):
        hits[draw_evenly(groups, 4, rng).numpy()] += 1
    # Four samples of three groups: 4/3 per group, spread over its points.
    np.testing.assert_allclose(hits / 3000, (4 / 3 / np.array([10, 20, 30]))[groups], rtol=0.25)


def test_small_groups_are_filled_from_the_others():
    groups = np.repeat([0, 1, 2], [2, 100, 100])
    indices = draw_evenly(groups, 60, np.random.default_rng(0)).numpy()
    assert np.bincount(groups[indices]).tolist() == [2, 29, 29]


def test_tap_draws_the_quota_of_its_own_clusters():
    features, timesteps, _ = planted(2000, clusters=8)
    result = tap_select(features, timesteps, 80, num_clusters=8)
    assert torch.bincount(result.labels[result.indices]).tolist() == [10] * 8


@settings(max_examples=50, deadline=None)
@given(group_lists, st.integers(1, 100))
def test_stratified_select_has_equal_counts_per_timestep(values, num_samples):
    timesteps = 20 * torch.tensor(values) + 1
    indices = stratified_select(timesteps, num_samples, seed=0)
    assert indices.dtype == torch.int64
    assert len(indices) == min(num_samples, len(values)) == len(indices.unique())
    _, sizes = timesteps.unique(return_counts=True)
    _, groups = timesteps.unique(return_inverse=True)
    drawn = torch.bincount(groups[indices], minlength=len(sizes))
    unfilled = drawn[drawn < sizes]
    assert len(unfilled) == 0 or drawn.max() <= unfilled.min() + 1


def test_random_select_is_uniform_without_repeats():
    assert random_select(5, 10).tolist() == [0, 1, 2, 3, 4]
    hits = torch.zeros(20)
    for seed in range(1000):
        indices = random_select(20, 5, seed)
        assert (indices.diff() > 0).all()
        hits[indices] += 1
    assert hits.sum() == 5000
    assert ((hits - 250).abs() < 60).all()


# Determinism


def test_same_seed_same_selection_other_seed_another():
    features, timesteps, _ = planted(1000, noise=1.0, steps=10)
    first, second = (tap_select(features, timesteps, 100, num_clusters=20, seed=5) for _ in range(2))
    assert torch.equal(first.indices, second.indices) and torch.equal(first.labels, second.labels)
    assert not torch.equal(first.indices, tap_select(features, timesteps, 100, num_clusters=20, seed=6).indices)
    for select in (lambda seed: stratified_select(timesteps, 100, seed), lambda seed: random_select(1000, 100, seed)):
        assert torch.equal(select(1), select(1)) and not torch.equal(select(1), select(2))


def test_global_random_state_is_untouched():
    features, timesteps, _ = planted(300)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    tap_select(features, timesteps, 30, num_clusters=6)
    stratified_select(timesteps, 30)
    random_select(300, 30)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))


# Tiny and degenerate pools; a warning is a failure


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_points", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("num_samples", [1, 4, 800])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_fewer_points_than_clusters(num_points, num_samples, alpha):
    features, timesteps, _ = planted(num_points, steps=3)
    result = tap_select(features, timesteps, num_samples, alpha=alpha)
    assert_valid(result, num_points, num_samples)
    if alpha == 0.5:
        assert result.num_clusters == num_points  # all distinct


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_identical_samples_are_one_cluster(alpha):
    result = tap_select(torch.full((50, 3), -2.5), torch.full((50,), 7), 10, alpha=alpha)
    assert_valid(result, 50, 10)
    assert result.num_clusters == 1


@pytest.mark.filterwarnings("error")
def test_copies_share_a_cluster_and_distinct_points_do_not():
    features, timesteps, _ = planted(12, steps=4)
    result = tap_select(features.repeat(40, 1), timesteps.repeat(40), 24)
    assert_valid(result, 480, 24)
    assert same_partition(result.labels, torch.arange(12).repeat(40))
    assert torch.bincount(result.labels[result.indices]).tolist() == [2] * 12


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 4), (0.5, 12), (1.0, 3)])
def test_multiples_of_one_vector_are_the_same_to_the_cosine(alpha, expected):
    g = torch.Generator().manual_seed(0)
    vectors, member = torch.randn(3, 777, generator=g), torch.arange(3).repeat(200)
    features = vectors[member] * (0.1 + 9 * torch.rand(600, 1, generator=g))
    timesteps = torch.arange(4).repeat_interleave(150)
    assert tap_select(features, timesteps, 50, alpha=alpha).num_clusters == expected


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 2), (0.5, 5), (1.0, 3)])
def test_distinct_points_are_counted_as_the_affinity_sees_them(alpha, expected):
    features = torch.tensor([[0.0, 1.0], [-0.0, 2.0], [-1e-9, 1.0], [1.0, 1.0], [0.0, 0.0]])
    timesteps = [998, 998, 998, 998, 998, 999, 999, 999, 999, 998]
    pool = checked_pool(features.repeat(2, 1), timesteps, alpha, 1.0)
    assert count_distinct(pool, 100) == expected
    assert count_distinct(pool, 2) == 2


@pytest.mark.filterwarnings("error")
def test_points_too_close_for_float32_affinities_are_one_cluster():
    noise = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    result = tap_select(torch.ones(50, 3) + 1e-4 * noise, torch.zeros(50), 10)
    assert_valid(result, 50, 10)
    assert result.num_clusters == 1


@pytest.mark.filterwarnings("error")
def test_rare_points_missed_by_the_fit_are_still_labelled(monkeypatch):
    monkeypatch.setattr(tap, "FIT_ROWS", 50)
    features, timesteps, _ = planted(1000, clusters=1, noise=0.0)
    features[::100] = torch.randn(10, 16, generator=torch.Generator().manual_seed(1))
    result = tap_select(features, timesteps, 30, num_clusters=11)
    assert_valid(result, 1000, 30)
    assert 1 < result.num_clusters < 11


@pytest.mark.filterwarnings("error")
def test_one_timestep():
    features, timesteps, member = planted(300, steps=1)
    result = tap_select(features, timesteps + 999, 30, num_clusters=6)
    assert same_partition(result.labels, member)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_zero_vectors(alpha):
    timesteps = torch.arange(40) // 10
    result = tap_select(torch.zeros(40, 4), timesteps, 8, alpha=alpha)
    assert_valid(result, 40, 8)
    expected = timesteps if alpha < 1 else torch.zeros(40)
    assert same_partition(result.labels, expected)


@pytest.mark.filterwarnings("error")
def test_zero_vectors_among_others_are_their_own_cluster():
    features, timesteps, member = planted(300, clusters=3)
    features[:100] = 0
    member[:100] = 3
    result = tap_select(features, timesteps, 40, num_clusters=4, alpha=1.0)
    assert same_partition(result.labels, member)


@pytest.mark.filterwarnings("error")
def test_a_point_opposed_to_all_landmarks_has_no_degree_and_is_alone():
    features = torch.ones(200, 3)
    features[17] = -1
    result = tap_select(features, torch.zeros(200), 10, num_clusters=2, alpha=1.0)
    assert result.labels.bincount().sort().values.tolist() == [1, 199]
    assert (result.labels == result.labels[17]).sum() == 1


@pytest.mark.filterwarnings("error")
def test_pool_not_larger_than_the_request_is_returned_whole():
    features, timesteps, _ = planted(100, steps=5)
    for num_samples in (100, 101, 800):
        assert tap_select(features, timesteps, num_samples).indices.tolist() == list(range(100))


@pytest.mark.filterwarnings("error")
def test_more_clusters_than_samples():
    features, timesteps, _ = planted(500, noise=1.0, steps=10)
    result = tap_select(features, timesteps, 7, num_clusters=50)
    assert_valid(result, 500, 7)
    assert len(result.labels[result.indices].unique()) == 7


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("settings", [{"num_clusters": 1}, {"num_subsamples": 1}, {"subsample_fraction": 1.0}])
def test_extreme_settings(settings):
    features, timesteps, _ = planted(200, steps=5)
    assert_valid(tap_select(features, timesteps, 20, **{"num_clusters": 6, **settings}), 200, 20)


@pytest.mark.filterwarnings("error")
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 50), st.integers(1, 50), st.data())
def test_any_small_pool_gets_an_answer(num_points, dim, num_samples, num_clusters, data):
    value = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.1, 1e-30, -1e30])
    features = data.draw(
        st.lists(st.lists(value, min_size=dim, max_size=dim), min_size=num_points, max_size=num_points)
    )
    timesteps = data.draw(st.lists(st.integers(0, 999), min_size=num_points, max_size=num_points))
    alpha = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    result = tap_select(torch.tensor(features), timesteps, num_samples, num_clusters, alpha=alpha)
    assert_valid(result, num_points, num_samples)
    assert result.num_clusters <= num_clusters


@pytest.mark.filterwarnings("error")
def test_a_pool_whose_affinities_have_many_equal_eigenvalues():
    """On some processors LAPACK's evr ends in an internal error here."""
    features = [1, 0, 0, 1, 0, 1, 0, 1, 1, 1, 0, -1, 1, 0, 0, 1, 0.1, 0, 0.1, 0, 0.1]
    timesteps = [150, 399, 21, 4, 3, 427, 721, 190, 224, 0, 109, 392, 70, 207, 180, 54, 718, 713, 92, 21, 38]
    assert_valid(tap_select(torch.tensor(features)[:, None], timesteps, 2, 49, alpha=0.5), 21, 2)


def test_largest_eigenpairs_where_the_partial_solver_gives_up(monkeypatch):
    from scipy import linalg

    x = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    matrix, whole = x @ x.T, linalg.eigh

    def gives_up(a, subset_by_index=None, **settings):
        if subset_by_index is not None:
            raise linalg.LinAlgError("Internal Error.")
        return whole(a, **settings)

    expected = largest_eigenpairs(matrix, 4)
    monkeypatch.setattr(linalg, "eigh", gives_up)
    values, vectors = largest_eigenpairs(matrix, 4)
    assert np.allclose(values, expected[0]) and np.allclose(np.abs(expected[1].T @ vectors), np.eye(4), atol=1e-9)


# Errors

X, T = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": X.index_fill(0, torch.tensor([4]), torch.nan)}, "features contains NaN or infinity"),
        ({"features": X.index_fill(0, torch.tensor([4]), -torch.inf)}, "features contains NaN or infinity"),
        ({"features": X[:, 0]}, r"features has shape \(10,\), expected \(N, D\)"),
        ({"features": X[None]}, r"features has shape \(1, 10, 3\)"),
        ({"features": X[:0], "timesteps": T[:0]}, r"timesteps has shape \(0,\)"),
        ({"features": X[:, :0]}, r"features has shape \(10, 0\)"),
        ({"timesteps": T[:9]}, "features has 10 rows and timesteps 9"),
        ({"timesteps": T[:, None]}, r"timesteps has shape \(10, 1\)"),
        ({"timesteps": torch.full((10,), torch.nan)}, "timesteps contains NaN"),
        ({"num_samples": 0}, "num_samples is 0, expected 1 or more"),
        ({"num_clusters": 0}, "num_clusters is 0, expected 1 or more"),
        ({"num_subsamples": -1}, "num_subsamples is -1, expected 1 or more"),
        ({"subsample_fraction": 0.0}, "subsample_fraction is 0.0"),
        ({"subsample_fraction": 1.5}, "subsample_fraction is 1.5"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": 1.1}, "alpha is 1.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"time_scale": 0.0}, "time_scale is 0.0"),
        ({"time_scale": -1.0}, "time_scale is -1.0"),
        ({"time_scale": float("nan")}, "time_scale is nan"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        tap_select(**{"features": X, "timesteps": T, "num_samples": 5, **arguments})
    text = str(error.value)
    assert "expected" in text and text.endswith(".") and "\n" not in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stratified_select(T, 0), "num_samples is 0"),
        (lambda: stratified_select(T[:0], 5), "timesteps has shape"),
        (lambda: stratified_select(torch.tensor([1.0, torch.inf]), 5), "timesteps contains"),
        (lambda: random_select(0, 5), "num_points is 0"),
        (lambda: random_select(5, -3), "num_samples is -3"),
    ],
)
def test_bad_input_of_the_baselines(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Cost


def test_memory_never_holds_all_pairs(monkeypatch):
    """The largest array of a run on 12,000 points is far below N x N and below N x n as well."""
    features, timesteps, _ = planted(12_000, steps=50)
    shapes = []
    plain = tap.affinity

    def recorded(points, landmarks):
        a = plain(points, landmarks)
        shapes.append(tuple(a.shape))
        return a

    monkeypatch.setattr(tap, "affinity", recorded)
    tracemalloc.start()  # numpy, scipy and scikit-learn; torch's blocks are in `shapes`
    assert_valid(tap_select(features, timesteps, 200, num_clusters=40), 12_000, 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(rows for rows, _ in shapes) <= tap.BLOCK < 12_000
    assert {columns for _, columns in shapes} == {600}
    assert peak < 12_000 * 12_000 / 4


def test_number_of_landmarks_is_capped(monkeypatch):
    seen = []
    plain = tap.spectral_embedding

    def recorded(pool, landmarks, k):
        seen.append((len(landmarks), len(landmarks.features.unique(dim=0))))
        return plain(pool, landmarks, k)

    monkeypatch.setattr(tap, "spectral_embedding", recorded)
    for num_points, clusters, fraction in [(10, 100, 0.05), (300, 5, 0.05), (1000, 5, 0.1), (3000, 5, 0.9)]:
        features, timesteps, _ = planted(num_points)
        tap_select(features, timesteps, 5, num_clusters=clusters, num_subsamples=1, subsample_fraction=fraction)
    assert seen == [(10, 10), (20, 20), (100, 100), (1024, 1024)]


def test_import_does_not_load_scipy_or_scikit_learn():
    code = "import sys, qandc_core.calibration.tap as t; print([m for m in ('scipy', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_benchmark_measures_every_size():
    result = benchmark_tap(sizes=(900, 300), repeats=1, spectral_points=250)
    assert [row["num_points"] for row in result["tap"]] == [300, 900]
    for row in [*result["tap"], result["tap_small"], result["spectral_clustering"]]:
        assert row["seconds"] > 0 and len(row["seconds_all"]) == 1
        assert 50 < row["peak_rss_mib"] < 1500
    assert result["ratio"] == result["tap"][1]["seconds"] / result["tap"][0]["seconds"]
    assert result["hardware"]["cpu"] and result["hardware"]["threads"] >= 1
