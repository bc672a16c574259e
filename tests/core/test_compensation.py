import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import nn

from qandc_core.caching.attach import apply_cache_to_dit, feature_cache, remove_cache
from qandc_core.compensation.correction import VarianceCompensation, compensate
from qandc_core.compensation.factors import METHODS, VarianceMoments, variance_factors
from qandc_core.compensation.fit import fit_variance_compensation
from qandc_core.diffusion.process import SamplingConfig
from qandc_core.models import DiT, DiTConfig
from qandc_core.sampling.generate import generate

CONFIG = DiTConfig(input_size=8, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=10)
LABELS = [i % 10 for i in range(12)]
SAMPLERS = {
    "ddim": SamplingConfig(8, cfg_scale=2.0, sampler="ddim"),
    "ddpm": SamplingConfig(8, cfg_scale=2.0, sampler="ddpm"),
}


pytestmark = pytest.mark.usefixtures("no_grad")


@st.composite
def pairs(draw):
    """Paired samples (N, C, H, W) whose channels differ in mean, spread and correlation."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    images, channels = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    x, other = torch.randn(2, images, channels, 3, 4, dtype=torch.float64, generator=generator)
    mean, spread, gain, decorrelation = (
        torch.tensor(draw(st.lists(st.floats(low, high), min_size=channels, max_size=channels)))[:, None, None]
        for low, high in ((-3, 3), (0.05, 3), (0.3, 2), (0, 1))
    )
    reference = mean + spread * x
    accelerated = gain * (mean + spread * ((1 - decorrelation) * x + decorrelation * other))
    assume((accelerated.std(dim=(0, 2, 3)) > 1e-3).all())
    return reference, accelerated


def channel(x, c):
    return x[:, c].flatten()


OBJECTIVES = {
    "least_squares": lambda corrected, x, eps: ((corrected - x) ** 2).sum(),
    # rQNSR^2 + MSE with the regularised weight (METHOD, Eq. 11)
    "paper": lambda corrected, x, eps: ((corrected - x) ** 2 / (x**2 + eps) + (corrected - x) ** 2).sum(),
    "variance_match": lambda corrected, x, eps: (corrected.std() - x.std()) ** 2,
}


# The factors


@pytest.mark.parametrize("method", METHODS)
@given(pairs(), st.sampled_from([1e-3, 1e-2, 1.0]))
@settings(deadline=None, max_examples=25)
def test_factor_minimises_its_objective(method, pair, eps):
    reference, accelerated = pair
    mean, factor = variance_factors(reference, accelerated, method, eps)
    for c in range(len(factor)):
        x, xh = channel(reference, c), channel(accelerated, c)
        mu = xh.mean()
        assert float(mean[c]) == pytest.approx(float(mu), rel=1e-9, abs=1e-9)

        def objective(k, x=x, xh=xh, mu=mu):
            return float(OBJECTIVES[method](mu + k * (xh - mu), x, eps))

        bounds = (0, 200) if method == "variance_match" else (-200, 200)  # a standard deviation has no sign
        best = minimize_scalar(objective, bounds=bounds, method="bounded", options={"xatol": 1e-10})
        assert float(factor[c]) == pytest.approx(best.x, rel=1e-4, abs=1e-4)
        assert objective(float(factor[c])) <= best.fun * (1 + 1e-9) + 1e-12


@given(pairs())
@settings(deadline=None, max_examples=25)
def test_variance_match_gives_the_references_deviation(pair):
    reference, accelerated = pair
    mean, factor = variance_factors(reference, accelerated)
    corrected = compensate(accelerated, mean, factor)
    dims = (0, 2, 3)
    torch.testing.assert_close(corrected.std(dim=dims), reference.std(dim=dims), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(corrected.mean(dim=dims), accelerated.mean(dim=dims), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@given(pairs(), st.lists(st.integers(0, 4), max_size=3))
@settings(deadline=None, max_examples=25)
def test_batches_add_up_to_one_batch(method, pair, cuts):
    reference, accelerated = pair
    moments = VarianceMoments(reference.shape[1])
    edges = [0, *sorted(min(c, len(reference)) for c in cuts), len(reference)]
    for a, b in zip(edges, edges[1:]):
        moments.update(reference[a:b], accelerated[a:b])
    for ours, whole in zip(moments.factors(method), variance_factors(reference, accelerated, method)):
        torch.testing.assert_close(ours, whole, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@given(pairs())
@settings(deadline=None, max_examples=25)
def test_identical_samples_give_exactly_one(method, pair):
    reference, _ = pair
    assert variance_factors(reference, reference.clone(), method)[1].tolist() == [1.0] * reference.shape[1]


@pytest.mark.parametrize("method", METHODS)
def test_constant_channels_are_left_alone(method):
    generator = torch.Generator().manual_seed(0)
    reference, accelerated = torch.randn(2, 4, 3, 5, 5, generator=generator)
    for value in (0.0, 1e-20, 0.1, -7.3, 1e6):
        flat = accelerated.clone()
        flat[:, 1] = value
        for other in (reference, flat):
            mean, factor = variance_factors(other, flat, method)
            assert factor.isfinite().all() and mean.isfinite().all()
            assert float(factor[1]) == 1 and torch.equal(compensate(flat, mean, factor)[:, 1], flat[:, 1])


def test_a_narrow_channel_far_from_zero_is_not_constant():
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, factor = variance_factors(100 + 2e-3 * x, 100 + 1e-3 * x)
    assert float(factor) == pytest.approx(2, rel=1e-4)


def printed_factor(x, xh):
    """Eq. 12 as the paper prints it."""
    mu = xh.mean()
    d = xh - mu
    return float((((x - mu) * d).sum() + (d / x).sum()) / ((d**2).sum() + (d**2 / x**2).sum()))


@pytest.mark.parametrize("shift, spread", [(0.5, 1.0), (1.0, 0.3), (-0.2, 1.0), (3.0, 0.5)])
def test_the_printed_formula_collapses_where_the_mean_is_not_zero(shift, spread):
    x = shift + spread * torch.randn(8, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert abs(printed_factor(x, x) - 1) > 0.1
    assert variance_factors(x, x, "paper")[1].tolist() == [1.0]


def test_the_printed_formula_holds_only_for_zero_mean():
    x = torch.randn(8, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert printed_factor(x - x.mean(), x - x.mean()) == pytest.approx(1, abs=1e-6)
    # a mean of 2 % of the deviation already breaks it: the pixels next to zero decide
    assert abs(printed_factor(x - x.mean() + 0.02, x - x.mean() + 0.02) - 1) > 0.1


def test_eps_keeps_single_pixels_from_deciding():
    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.3 * torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=generator)
    xh = x + 0.05 * torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=generator)
    x[0, 0, 0, 0] = 1e-5  # one pixel at the singularity of 1 / x'^2
    alone = float((x - xh.mean())[0, 0, 0, 0] / (xh - xh.mean())[0, 0, 0, 0])
    least_squares = float(variance_factors(x, xh, "least_squares")[1])

    def factor(eps):
        return float(variance_factors(x, xh, "paper", eps)[1])

    assert factor(1e-12) == pytest.approx(alone, rel=1e-3)
    assert abs(alone - least_squares) > 0.5
    assert abs(factor(1e-2) - least_squares) < 0.25 * abs(alone - least_squares)
    assert factor(1e8) == pytest.approx(least_squares, rel=1e-6)
    for method in ("variance_match", "least_squares"):
        assert variance_factors(x, xh, method, 1e-12)[1] == variance_factors(x, xh, method, 1.0)[1]


def test_least_squares_shrinks_decorrelated_samples_and_variance_match_does_not():
    x, noise = torch.randn(2, 16, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    xh = 0.6 * x + 0.8 * noise
    assert variance_factors(x, xh, "least_squares")[1].tolist() == pytest.approx([0.6, 0.6], abs=0.05)
    assert variance_factors(x, xh)[1].tolist() == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize(
    "reference, accelerated, kwargs, message",
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5), {}, r"got \(2, 3, 4, 4\) and \(2, 3, 4, 5\)"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), {}, r"must both be \(N, C, H, W\)"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), {"method": "mean"}, "method must be one of.*got 'mean'"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), {"eps": 0.0}, "eps must be above 0"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), {"eps": -1.0}, "eps must be above 0"),
    ],
)
def test_bad_input_is_one_clear_sentence(reference, accelerated, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        variance_factors(reference, accelerated, **kwargs)
    assert str(caught.value).endswith(".")


# Applying them


@given(st.integers(0, 2**31), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
@settings(deadline=None, max_examples=25)
def test_factor_one_is_bit_identical(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = (30 * torch.randn(2, 3, 4, 5, generator=generator)).to(dtype)
    mean = 100 * torch.randn(3, generator=generator, dtype=torch.float64)
    assert torch.equal(compensate(x, mean, torch.ones(3)), x)


@given(pairs(), st.floats(-2, 2))
@settings(deadline=None, max_examples=25)
def test_compensate_is_equation_10(pair, factor):
    _, x = pair
    mean = x.mean(dim=(0, 2, 3))
    k = torch.full_like(mean, factor)
    expected = mean[:, None, None] + factor * (x - mean[:, None, None])
    torch.testing.assert_close(compensate(x, mean, k), expected, rtol=1e-9, atol=1e-9)


def test_correct_finds_the_noise_level():
    sigmas = torch.tensor([10.0, 3.0, 0.2], dtype=torch.float64)
    mean, factor = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [2.0], [0.5]])
    fitted = VarianceCompensation(sigmas, mean, factor)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fitted.correct(x, 3.0), 1 + 2 * (x - 1))
    torch.testing.assert_close(fitted.correct(x, 0.2 * (1 + 1e-5)), 2 + 0.5 * (x - 2))
    assert torch.equal(fitted.correct(x, 10.0), x)
    for other in (2.9, 0.25, 1e4, 0.0):
        with pytest.raises(ValueError, match="none for sigma") as caught:
            fitted.correct(x, other)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


# The sequential fit


class GaussianDiT(DiT):
    """Random weights around the score of unit Gaussian data, so that samples keep unit size."""

    def forward(self, x, timesteps, y):
        alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)[timesteps]
        out = super().forward(x, timesteps, y)
        return torch.cat([out[:, :4] + (1 - alpha_bar).sqrt()[:, None, None, None] * x, out[:, 4:]], dim=1)


def paired_models(interval=3):
    torch.manual_seed(0)
    reference = GaussianDiT(CONFIG).eval()
    accelerated = copy.deepcopy(reference)
    for p in accelerated.parameters():
        p += 0.05 * p.std() * torch.randn(p.shape)
    return reference, apply_cache_to_dit(accelerated, interval)


def arguments(config):
    return {"steps": config.steps, "cfg_scale": config.cfg_scale, "sampler": config.sampler}


def samples_before_each_step(model, config, compensation=None, seed=0):
    """x_i (corrected where fitted) for i = 1..T - 1, and the images."""
    sigmas, visited = config.schedule().sigmas, []

    def collect(info):
        i = info.index + 1
        visited.append(info.x if compensation is None or i == config.steps else compensation.correct(info.x, sigmas[i]))

    images, _ = generate(model, LABELS, seed=seed, compensation=compensation, callback=collect, **arguments(config))
    return visited[:-1], images


def deviation(x):
    return x.double().std(dim=(0, 2, 3))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_replay_has_the_references_deviation_at_every_step(sampler):
    config = SAMPLERS[sampler]
    reference, accelerated = paired_models()
    fitted = fit_variance_compensation(reference, accelerated, LABELS, config)
    target, _ = samples_before_each_step(reference, config)
    naive, _ = samples_before_each_step(accelerated, config)
    corrected, _ = samples_before_each_step(accelerated, config, fitted)
    for i in range(config.steps - 1):
        torch.testing.assert_close(deviation(corrected[i]), deviation(target[i]), rtol=1e-4, atol=0)
    assert (deviation(naive[-1]) / deviation(target[-1]) - 1).abs().max() > 1e-2


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("method", METHODS)
def test_each_factor_is_measured_on_corrected_trajectories(sampler, method):
    config = SAMPLERS[sampler]
    reference, accelerated = paired_models()
    fitted = fit_variance_compensation(reference, accelerated, LABELS, config, method=method)
    assert fitted.method == method and fitted.factor.shape == fitted.mean.shape == (8, 4)
    assert fitted.factor[0].tolist() == [1] * 4  # both start from the same noise
    target, _ = samples_before_each_step(reference, config)
    raw = []  # before the correction of the step, after those of all earlier ones
    generate(accelerated, LABELS, compensation=fitted, callback=lambda info: raw.append(info.x), **arguments(config))
    for i in range(1, config.steps):
        mean, factor = variance_factors(target[i - 1], raw[i - 1], method)
        torch.testing.assert_close(fitted.mean[i], mean.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fitted.factor[i], factor.float(), rtol=1e-4, atol=1e-5)
    assert (fitted.factor - 1).abs().max() > 1e-2


class LinearModel(nn.Module):
    """The exact noise prediction for Gaussian data, times a gain: what drifts is the variance alone."""

    def __init__(self, gain):
        super().__init__()
        self.config, self.null_class = DiTConfig(input_size=8, in_channels=1, learn_sigma=False, num_classes=10), 10
        self.gain = nn.Parameter(torch.tensor(gain))
        self.register_buffer("pos_embed", torch.zeros(1))

    def forward(self, x, timesteps, y):
        alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)[timesteps][:, None, None, None]
        return self.gain * (1 - alpha_bar).sqrt() * x


def test_sequential_fit_beats_factors_of_uncorrected_runs():
    config = SamplingConfig(10, cfg_scale=1.0, sampler="ddim")
    reference, accelerated = LinearModel(1.0), LinearModel(0.9)
    target, images = samples_before_each_step(reference, config)
    naive, naive_images = samples_before_each_step(accelerated, config)
    measured = [variance_factors(a, b) for a, b in zip(target, naive)]
    mean = torch.stack([torch.zeros(1), *(m for m, _ in measured)])
    factor = torch.stack([torch.ones(1), *(k for _, k in measured)])
    sigmas = torch.tensor(config.schedule().sigmas[:-1], dtype=torch.float64)
    open_loop = VarianceCompensation(sigmas, mean, factor)
    sequential = fit_variance_compensation(reference, accelerated, LABELS, config)

    def error(compensation):
        _, corrected = samples_before_each_step(accelerated, config, compensation)
        return float((corrected - images).square().mean().sqrt())

    assert error(sequential) < 0.5 * error(None) < error(open_loop)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_identical_models_fit_exactly_one(sampler, method):
    reference, _ = paired_models()
    config = SAMPLERS[sampler]
    same = apply_cache_to_dit(copy.deepcopy(reference), 1)
    fitted = fit_variance_compensation(reference, same, LABELS, config, method=method, batch_size=5)
    assert torch.equal(fitted.factor, torch.ones(8, 4))
    plain, _ = generate(same, LABELS, **arguments(config))
    assert torch.equal(generate(same, LABELS, compensation=fitted, **arguments(config))[0], plain)


@pytest.mark.parametrize(
    "start, end, corrected", [(0, 1, range(1, 8)), (0.5, 0.75, (4, 5)), (0.9, 1, ()), (0.6, 1, (5, 6, 7))]
)
def test_only_the_chosen_part_of_the_run_is_corrected(start, end, corrected):
    reference, accelerated = paired_models()
    fitted = fit_variance_compensation(reference, accelerated, LABELS, SAMPLERS["ddim"], start=start, end=end)
    assert [i for i in range(8) if not torch.equal(fitted.factor[i], torch.ones(4))] == list(corrected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_fit_does_not_depend_on_the_batch_size(sampler):
    reference, accelerated = paired_models()
    whole = fit_variance_compensation(reference, accelerated, LABELS, SAMPLERS[sampler], batch_size=64)
    for batch_size in (1, 5, 12):
        other = fit_variance_compensation(reference, accelerated, LABELS, SAMPLERS[sampler], batch_size=batch_size)
        torch.testing.assert_close(other.factor, whole.factor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.mean, whole.mean, rtol=1e-4, atol=1e-5)


def test_fit_uses_the_noise_of_seed_and_index():
    reference, accelerated = paired_models()
    labels, config = [3] * 8, SAMPLERS["ddpm"]
    fits = [
        fit_variance_compensation(reference, accelerated, labels, config, **kwargs).factor
        for kwargs in ({}, {}, {"seed": 1}, {"first_index": 8})
    ]
    assert torch.equal(fits[0], fits[1])
    assert not torch.equal(fits[0], fits[2]) and not torch.equal(fits[0], fits[3])


def test_reference_is_sampled_without_its_cache():
    reference, accelerated = paired_models()
    expected = fit_variance_compensation(reference, accelerated, LABELS, SAMPLERS["ddim"])
    apply_cache_to_dit(reference, 4)
    for batch_size in (12, 5):
        fitted = fit_variance_compensation(reference, accelerated, LABELS, SAMPLERS["ddim"], batch_size=batch_size)
        torch.testing.assert_close(fitted.factor, expected.factor, rtol=1e-4, atol=1e-5)


def test_one_model_with_a_cache_is_compared_with_itself_uncached():
    reference, _ = paired_models()
    cached = apply_cache_to_dit(copy.deepcopy(reference), 3)
    expected = fit_variance_compensation(reference, cached, LABELS, SAMPLERS["ddim"])
    fitted = fit_variance_compensation(cached, cached, LABELS, SAMPLERS["ddim"])
    assert torch.equal(fitted.factor, expected.factor) and (fitted.factor - 1).abs().max() > 1e-3


def test_callback_sees_every_step_and_an_exception_leaves_the_cache_reset():
    reference, accelerated = paired_models()
    seen = []
    fit_variance_compensation(
        reference, accelerated, LABELS[:2], SAMPLERS["ddim"], callback=lambda i, n: seen.append((i, n))
    )  # fmt: skip
    assert seen == [(i, 8) for i in range(8)]
    cache = feature_cache(accelerated)
    assert cache.num_bytes == 0

    def interrupt(step, steps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_variance_compensation(reference, accelerated, LABELS[:2], SAMPLERS["ddim"], callback=interrupt)
    assert cache.num_bytes == 0 and cache.run.step == -1


def test_unknown_method_is_refused_before_sampling():
    reference, accelerated = paired_models()
    with pytest.raises(ValueError, match="method must be one of variance_match, paper, least_squares, got 'mean'"):
        fit_variance_compensation(reference, accelerated, LABELS, SAMPLERS["ddim"], method="mean")


OTHER_LEVELS = {"sigmas": [8.0, 4.0, 0.0], "steps": None, "spacing": SamplingConfig.spacing}


@pytest.mark.parametrize("change", [{"steps": 7}, {"spacing": "linspace"}, {"steps": 4}, OTHER_LEVELS])
def test_generate_refuses_a_fit_of_another_schedule(change):
    reference, accelerated = paired_models()
    config = replace(SAMPLERS["ddim"], spacing="leading")  # the 4 timesteps of 4 steps are among the 8 of 8
    fitted = fit_variance_compensation(reference, accelerated, LABELS[:2], config)
    run = {**arguments(config), "spacing": "leading", **change}
    started = []
    with pytest.raises(ValueError, match="fitted on 8 .*noise levels.*fit it again") as caught:
        generate(accelerated, LABELS, compensation=fitted, callback=started.append, **run)
    assert str(caught.value).endswith(".") and not started


def test_a_run_may_begin_at_a_later_fitted_level():
    reference, accelerated = paired_models()
    config = SAMPLERS["ddim"]
    fitted = fit_variance_compensation(reference, accelerated, LABELS, config)
    remove_cache(accelerated)  # a shortened run would compute other steps
    _, images = samples_before_each_step(accelerated, config, fitted)
    raw = []
    generate(accelerated, LABELS, compensation=fitted, callback=lambda i: raw.append(i.x), **arguments(config))
    sigmas = config.schedule().sigmas[3:]
    tail, _ = generate(
        accelerated,
        LABELS,
        cfg_scale=config.cfg_scale,
        sampler="ddim",
        sigmas=sigmas,
        noise=raw[2],
        compensation=fitted,
    )
    torch.testing.assert_close(tail, images, rtol=1e-4, atol=1e-4)


def test_sigmas_are_those_of_the_run():
    reference, accelerated = paired_models()
    config = SamplingConfig(cfg_scale=1.0, sampler="ddim", sigmas=(5.0, 2.0, 0.5, 0.0))
    fitted = fit_variance_compensation(reference, accelerated, LABELS[:4], config)
    assert fitted.sigmas.tolist() == pytest.approx([5, 2, 0.5])
    images, _ = generate(
        accelerated, LABELS[:4], cfg_scale=1.0, sampler="ddim", sigmas=config.sigmas, compensation=fitted
    )  # fmt: skip
    plain, _ = generate(accelerated, LABELS[:4], cfg_scale=1.0, sampler="ddim", sigmas=config.sigmas)
    assert math.isfinite(float(images.sum())) and not torch.equal(images, plain)
