import math

import numpy as np
import pytest
import torch

from qandc_core.evaluation import metrics
from qandc_core.evaluation.metrics import (
    FeatureStatistics,
    bootstrap_standard_error,
    frechet_distance,
    inception_score,
    precision_recall,
    psnr,
    relative_l2,
    ssim,
    standard_error,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def images(seed: int, size: int = 20) -> torch.Tensor:
    return torch.rand(3, 2, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def scipy_frechet(a: FeatureStatistics, b: FeatureStatistics) -> float:
    from scipy.linalg import sqrtm  # type: ignore[import-untyped]

    root = sqrtm((a.covariance @ b.covariance).numpy()).real
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root))


def test_frechet_matches_scipy_sqrtm():
    a = FeatureStatistics.of(normal(400, 24) @ normal(24, 24, seed=1))
    b = FeatureStatistics.of(normal(500, 24, seed=2) @ normal(24, 24, seed=3) + 0.3)
    assert a.frechet(b) == pytest.approx(scipy_frechet(a, b), rel=1e-9)
    assert a.frechet(b) == pytest.approx(b.frechet(a), rel=1e-9)


def test_frechet_closed_forms():
    var_a, var_b, shift = torch.rand(6) + 0.1, torch.rand(6) + 0.1, torch.randn(6)
    expected = shift.double().square().sum() + (var_a.double().sqrt() - var_b.double().sqrt()).square().sum()
    distance = frechet_distance(torch.zeros(6), var_a.diag(), shift, var_b.diag())
    assert distance == pytest.approx(float(expected), rel=1e-9)
    # Covariances c * A commute with A, so the distance is (sqrt(c) - 1)^2 tr A.
    cov = torch.cov(normal(5, 40))
    assert frechet_distance(torch.zeros(5), cov, torch.zeros(5), 4 * cov) == pytest.approx(float(cov.trace()), rel=1e-9)


def test_frechet_of_fewer_images_than_features_stays_real():
    a, b = (FeatureStatistics.of(normal(10, 64, seed=seed)) for seed in (0, 1))
    assert a.frechet(a) == pytest.approx(0, abs=1e-5)
    # The null spaces hide from sqrtm, not from the trace of |X_a^T X_b|, the nuclear norm of the centred products.
    centred = [x - x.mean(0) for x in (normal(10, 64, seed=0), normal(10, 64, seed=1))]
    nuclear = torch.linalg.svdvals(centred[0] @ centred[1].mT).sum() / 9
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * nuclear
    assert a.frechet(b) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_statistics_are_those_of_numpy(offset: float):
    features = normal(50, 4) + offset
    statistics = FeatureStatistics.of(features)
    assert statistics.count == 50
    np.testing.assert_allclose(statistics.mean, features.numpy().mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-8, atol=1e-9)


def test_float32_features_are_accumulated_in_float64():
    features = (normal(1000, 3) * 1e-3 + 100).float()
    covariance = FeatureStatistics.of(features).covariance
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9)


def test_inception_score_bounds_and_closed_forms():
    one_hot = torch.eye(10).repeat(5, 1)
    assert inception_score(one_hot).mean == pytest.approx(10)
    assert inception_score(torch.full((20, 7), 1 / 7)).mean == pytest.approx(1)
    p = 0.9  # two equally frequent classes, each predicted with p: exp(ln 2 - H(p))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    pair = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64)
    assert inception_score(pair).mean == pytest.approx(2 * math.exp(-entropy))
    assert 1 <= inception_score(normal(100, 10).softmax(1)).mean <= 10


def test_inception_score_splits_follow_the_definition():
    probabilities = (normal(103, 5) * 2).softmax(1)
    scores = []
    for i in range(4):
        part = probabilities[i * 103 // 4 : (i + 1) * 103 // 4]
        kl = part * (part.log() - part.mean(0).log())
        scores.append(float(kl.sum(1).mean().exp()))
    score = inception_score(probabilities, splits=4)
    assert score.mean == pytest.approx(np.mean(scores)) and score.std == pytest.approx(np.std(scores))
    assert inception_score(probabilities).std == 0


def brute_force_precision(real: torch.Tensor, fake: torch.Tensor, k: int) -> float:
    hits = 0
    for y in fake:
        for i, x in enumerate(real):
            others = sorted(float((x - z).norm()) for j, z in enumerate(real) if j != i)
            if float((y - x).norm()) <= others[k - 1]:
                hits += 1
                break
    return hits / len(fake)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_match_brute_force(k: int):
    real, fake = normal(30, 2), normal(24, 2, seed=1) * 0.6 + 1.5
    result = precision_recall(real, fake, k)
    assert result.precision == brute_force_precision(real, fake, k)
    assert result.recall == brute_force_precision(fake, real, k)
    assert 0 < result.precision < 1 and 0 < result.recall < 1


def test_precision_recall_of_planted_sets():
    real = normal(60, 64) + 5
    same, apart = precision_recall(real, real.clone()), precision_recall(real, real + 100)
    assert (same.precision, same.recall) == (1, 1) and (apart.precision, apart.recall) == (0, 0)
    # Copies of one real image: all are real, and their balls of radius 0 hold that image alone.
    collapsed = precision_recall(real, real[:1].expand(20, -1))
    assert collapsed.precision == 1 and collapsed.recall == pytest.approx(1 / 60)
    # Half of the fake set is far out; the real manifold is still covered by the other half.
    half = precision_recall(real, torch.cat([real, real + 100]))
    assert half.precision == 0.5 and half.recall == 1


def test_precision_recall_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch):
    real, fake = normal(50, 4), normal(40, 4, seed=1)
    whole = precision_recall(real, fake)
    monkeypatch.setattr(metrics, "DISTANCE_BLOCK", 7 * 50)
    assert precision_recall(real, fake) == whole


def test_psnr_and_relative_l2_known_values():
    a = images(0)
    b = a + torch.tensor([0.2, 0.02, 0.0]).view(3, 1, 1, 1)
    assert psnr(b, a)[:2].tolist() == pytest.approx([20, 40])
    assert math.isinf(psnr(b, a)[2])
    assert psnr(b / 2, a / 2, data_range=1.0)[0] == pytest.approx(20)
    assert relative_l2(1.25 * a, a).tolist() == pytest.approx([0.25] * 3)
    assert relative_l2(torch.zeros_like(a), a).tolist() == pytest.approx([1] * 3)


def brute_force_ssim(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    x = np.arange(11) - 5
    weight = np.exp(-(x[:, None] ** 2 + x[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for channel_a, channel_b in zip(a, b):
        for i in range(a.shape[1] - 10):
            for j in range(a.shape[2] - 10):
                p, q = channel_a[i : i + 11, j : j + 11], channel_b[i : i + 11, j : j + 11]
                mean_p, mean_q = (weight * p).sum(), (weight * q).sum()
                var_p, var_q = (weight * (p - mean_p) ** 2).sum(), (weight * (q - mean_q) ** 2).sum()
                covariance = (weight * (p - mean_p) * (q - mean_q)).sum()
                numerator = (2 * mean_p * mean_q + c1) * (2 * covariance + c2)
                values.append(numerator / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
    return float(np.mean(values))


def test_ssim_matches_a_sliding_window():
    a, b = images(0), (images(0) + 0.3 * images(1)).clamp(-1, 1)
    expected = [brute_force_ssim(x.numpy(), y.numpy(), 2.0) for x, y in zip(a, b)]
    assert ssim(a, b).tolist() == pytest.approx(expected, rel=1e-10)
    assert ssim(a / 2, b / 2, data_range=1.0).tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("band", [1, 40, 500, 10**6])
def test_bands_of_rows_change_no_number(monkeypatch, band):
    """Sums over bands against the formulas on whole images; 37 rows are no multiple of a band."""
    a, b = (torch.rand(3, 37, 40, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1))
    b, ticks = (a + 0.2 * b).clamp(-1, 1), []
    expected = float(metrics.ssim_map(a.double(), b.double(), 2.0).mean())
    monkeypatch.setattr(metrics, "BAND", band)
    found = metrics.pair_fidelity(a, b, tick=lambda: ticks.append(1))
    assert found.ssim == pytest.approx(expected, abs=1e-12)
    assert found.ssim == pytest.approx(brute_force_ssim(a.numpy(), b.numpy(), 2.0), abs=1e-9)
    assert found.psnr == pytest.approx(float(psnr(a[None], b[None])), abs=1e-9)
    assert found.relative_l2 == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-6)
    assert len(ticks) == len(metrics.bands_of(37, 40))


def test_fidelity_of_equal_and_of_small_images():
    same = metrics.pair_fidelity(torch.zeros(3, 12, 12), torch.zeros(3, 12, 12))
    assert (same.psnr, same.ssim, same.relative_l2) == (math.inf, pytest.approx(1), 0)
    small = metrics.pair_fidelity(torch.ones(3, 8, 40), torch.zeros(3, 8, 40))
    assert math.isnan(small.ssim) and small.relative_l2 == math.inf


def test_ssim_identities():
    a, b = images(0), images(1)
    assert ssim(a, a).tolist() == pytest.approx([1] * 3)
    assert torch.allclose(ssim(a, b), ssim(b, a))
    assert (ssim(a, b).abs() < 0.2).all()
    # Constant images differ in luminance alone.
    x, y, c1 = 0.5, 0.25, 0.02**2
    flat = ssim(torch.full((1, 1, 11, 11), x), torch.full((1, 1, 11, 11), y))
    assert flat.tolist() == pytest.approx([(2 * x * y + c1) / (x * x + y * y + c1)])


def test_standard_errors():
    values = normal(400)
    expected = float(values.numpy().std(ddof=1)) / 20
    assert standard_error(values) == pytest.approx(expected)
    assert bootstrap_standard_error(lambda x: float(x.mean()), values, 400) == pytest.approx(expected, rel=0.15)
    first, second = (bootstrap_standard_error(lambda x: float(x.median()), values, 20, seed=3) for _ in range(2))
    assert first == second > 0


def test_bootstrap_of_a_frechet_distance_predicts_its_spread():
    reference = FeatureStatistics.of(normal(2000, 4))

    def distance(features: torch.Tensor) -> float:
        return FeatureStatistics.of(features).frechet(reference)

    spread = np.std([distance(normal(200, 4, seed=seed) + 1) for seed in range(1, 101)], ddof=1)
    assert bootstrap_standard_error(distance, normal(200, 4, seed=7) + 1, 100) == pytest.approx(spread, rel=0.4)
