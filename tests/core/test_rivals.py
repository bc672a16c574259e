"""The caches that Apply Cache is compared with: their formulas against numpy, scipy and scikit-learn."""

import numpy as np
import pytest
import torch
from scipy.special import eval_hermite, factorial
from sklearn.linear_model import Ridge

from benchmarks.caching import rivals
from benchmarks.caching.rivals import Chebyshev, Hermite, Hold, Rival, Taylor
from qandc_core.models.dit import DiT, DiTConfig

TINY = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DiT(TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def feed(forecaster, steps, features):
    for step in steps:
        forecaster.update(step, features[step])
    return forecaster


def test_taylor_of_order_1_is_the_line_through_the_last_two():
    features = torch.arange(20.0)[:, None] * torch.tensor([2.0, -1.0]) + 3
    assert torch.allclose(feed(Taylor(1), (0, 1, 4, 9), features).predict(13), features[13])


@pytest.mark.parametrize("kind", [Taylor, Hermite])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_series_are_the_sum_of_backward_differences(kind, order):
    features, gap, x = torch.randn(13, 4, dtype=torch.float64, generator=seeded(order)), 3, 2
    steps = range(0, 13, gap)
    found = feed(kind(order), steps, features).predict(12 + x)
    wanted = 0
    for i in range(order + 1):
        difference = np.diff(features[::gap].numpy(), n=i, axis=0)[-1] / gap**i
        basis = x**i if kind is Taylor else 0.5**i * eval_hermite(i, 0.5 * x)
        wanted = wanted + difference * basis / factorial(i)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0])
def test_spectrum_is_ridge_regression_on_chebyshev_polynomials_and_a_line(w):
    steps, total = [0, 1, 2, 5, 9, 14], 20
    features = torch.randn(total, 7, dtype=torch.float64, generator=seeded(3))
    found = feed(Chebyshev(total, w=w), steps, features).predict(17)

    def design(s):
        return np.polynomial.chebyshev.chebvander(2 * np.array(s) / total - 1, 4)

    ridge = Ridge(alpha=0.1, fit_intercept=False).fit(design(steps), features[steps])
    line = features[14] + (17 - 14) / (14 - 9) * (features[14] - features[9])
    np.testing.assert_allclose(found, w * ridge.predict(design([17]))[0] + (1 - w) * line.numpy(), rtol=1e-9)


def test_one_computed_step_is_held_by_every_forecaster_of_a_line():
    feature = torch.randn(1, 3, generator=seeded())
    assert torch.equal(feed(Taylor(2), [0], feature).predict(5), feature[0])
    assert torch.allclose(feed(Chebyshev(9, w=0.0), [0], feature).predict(5), feature[0])


def test_windows_of_the_paper_compute_as_often_as_it_says():
    assert (sum(rivals.windows(50, 5, 2, 0.75)), sum(rivals.windows(50, 5, 2, 3.0))) == (14, 10)


def test_intervals_compute_the_last_of_each():
    assert [i for i, computes in enumerate(rivals.every(12, 4, 2)) if computes] == [0, 1, 5, 9]
    assert all(rivals.every(7, 1))


def test_magnitudes_that_stay_reuse_until_too_many_in_a_row():
    plan = rivals.magnitudes(20, [1.0] * 20, 0.1, most=3)
    assert plan == [True] * 4 + [False, False, False, True] * 4
    assert all(rivals.magnitudes(20, [0.8] * 20, 0.1, most=3))


def outputs(model, steps=6):
    labels, x = torch.tensor([1, 4]), torch.randn(steps, 2, 3, 8, 8, generator=seeded(1))
    with torch.inference_mode():
        return torch.stack([model(x[i], torch.full((2,), 900 - 100 * i), labels) for i in range(steps)])


@pytest.mark.parametrize("place", ["branches", "last", "residual"])
def test_a_plan_that_always_computes_changes_nothing_and_leaves_nothing(model, place):
    plain, rival = outputs(model), Rival([True] * 6, place, Hold)
    with rival.applied(rivals.sites(model)):
        assert torch.equal(outputs(model), plain)
    assert rival.calls == 6 and torch.equal(outputs(model), plain)
    assert not any("forward" in vars(module) for module in model.modules())


def hooked(module, inputs):
    kept = []
    return kept, module.register_forward_hook(lambda _, args, out: kept.append(args[0] if inputs else out))


@pytest.mark.parametrize("place", ["last", "residual"])
def test_what_enters_the_final_layer_of_a_reused_step(model, place):
    """Held: the last block's output of step 1, or that less the first block's input then plus the one now."""
    first, one = hooked(model.blocks[0], inputs=True)
    last, two = hooked(model.blocks[-1], inputs=False)
    outputs(model)
    one.remove(), two.remove()
    entered, three = hooked(model.final_layer, inputs=True)
    rival = Rival([True, True, False, True, False, False], place, Hold)
    with rival.applied(rivals.sites(model)):
        outputs(model)
    three.remove()
    for step, kept in ((2, 1), (4, 3), (5, 3)):
        wanted = last[kept] - first[kept] + first[step] if place == "residual" else last[kept]
        torch.testing.assert_close(entered[step], wanted)
    assert rival.calls == 3


def test_branches_of_a_reused_step_are_forecast(model):
    kept, hook = hooked(model.blocks[1].mlp, inputs=False)
    rival = Rival([True, True, False, True, False, False], "branches", lambda: Taylor(1))
    with rival.applied(rivals.sites(model)):
        outputs(model)
    hook.remove()
    torch.testing.assert_close(kept[2], 2 * kept[1] - kept[0])
    torch.testing.assert_close(kept[5], kept[3] + 2 * (kept[3] - kept[1]) / 2)


def test_magnitudes_are_noted_for_each_step(model):
    noted = rivals.Magnitudes()
    with Rival([True] * 6, "residual", lambda: noted).applied(rivals.sites(model)):
        outputs(model)
    first, one = hooked(model.blocks[0], inputs=True)
    last, two = hooked(model.blocks[-1], inputs=False)
    outputs(model)
    one.remove(), two.remove()
    sizes = torch.stack([(b - a).norm(dim=-1) for a, b in zip(first, last)])
    wanted = [1.0, *(sizes[1:] / sizes[:-1]).mean(dim=(1, 2)).tolist()]
    assert noted.ratios == pytest.approx(wanted, rel=1e-5)
