"""Compensation where the sampler owns the sample: shifted predictions, latents of several parts, the fit by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qandc_core import SamplingConfig, VarianceCompensation, generate, load_dit, variance_factors
from qandc_core.compensation.correction import (
    check_falling,
    compensate,
    compensate_parts,
    preserved_scale,
    shifted,
    split_parts,
)
from qandc_core.compensation.fit import SequentialFit
from qandc_core.numerics import ratio, relative_error

PARTS = [(4, 2, 3, 5), (2, 7), (3, 4, 4)]  # video, sound, an image
CHANNELS = sum(shape[0] for shape in PARTS)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def joined(parts):
    """As ComfyUI packs a nested latent: (N, 1, all elements)."""
    return torch.cat([part.reshape(part.shape[0], 1, -1) for part in parts], dim=-1)


# Steps of ComfyUI's samplers, as k-diffusion writes them


def euler(x, denoised, sigma, following):
    return x + (x - denoised) / sigma * (following - sigma)


def ddpm(x, denoised, sigma, following):
    """The posterior's mean, in k-diffusion's units: generic_step_sampler on x / sqrt(1 + sigma^2)."""
    alpha_bar, before = 1 / (1 + sigma**2), 1 / (1 + following**2)
    alpha = alpha_bar / before
    scaled, noise = x / math.sqrt(1 + sigma**2), (x - denoised) / sigma
    mean = (scaled - (1 - alpha) * noise / math.sqrt(1 - alpha_bar)) / math.sqrt(alpha)
    return mean * math.sqrt(1 + following**2)


@given(st.floats(0.05, 80), st.floats(0, 0.99))
def test_a_step_with_the_shifted_prediction_ends_where_a_step_of_the_corrected_sample_does(sigma, share):
    following = sigma * share
    x, corrected, denoised = randn(3, 2, 3, 4, 4)
    for name, step in (("ddim", euler), ("ddpm", ddpm)):
        found = step(x, shifted(denoised, x, corrected, name, sigma, following), sigma, following)
        expected = step(corrected, denoised, sigma, following)
        assert relative_error(found, expected) < 1e-8, name


def test_the_last_step_shifts_nothing():
    x, corrected, denoised = randn(3, 2, 3, 4, 4)
    assert torch.equal(shifted(denoised, x, corrected, "ddim", 2.0, 0.0), denoised)


@pytest.mark.parametrize("sigmas", [[3.0, 3.0, 0.0], [3.0, 1.0, 2.0, 0.0], [math.inf, 1.0], [3.0, math.nan, 0.0]])
def test_schedules_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(ValueError, match="fall from step to step.*choose another scheduler or sampler[.]$"):
        check_falling(sigmas)
    with pytest.raises(ValueError, match="needs falling noise levels"):
        shifted(randn(1, 1), randn(1, 1), randn(1, 1), "ddim", 2.0, 2.0)


def test_falling_schedules_pass():
    for sigmas in ([3.0, 1.0, 0.0], [3.0, 0.0], [3.0, 1.0], []):
        check_falling(sigmas)


def test_samples_are_scaled_to_unit_variance_where_noise_adds():
    assert preserved_scale(3.0, flow=True) == 1
    assert preserved_scale(3.0, flow=False) == pytest.approx(1 / math.sqrt(10))


# Parts


def test_parts_are_views_of_what_was_joined():
    parts = [randn(2, *shape, seed=i) for i, shape in enumerate(PARTS)]
    packed = joined(parts)
    assert all(torch.equal(a, b) for a, b in zip(split_parts(packed, PARTS), parts))
    assert split_parts(packed) == [packed]


def test_parts_are_corrected_channel_by_channel():
    parts = [randn(2, *shape, seed=i) for i, shape in enumerate(PARTS)]
    mean, factor = randn(CHANNELS, seed=8), 1 + 0.1 * randn(CHANNELS, seed=9)
    edges = [0, 4, 6, 9]
    expected = [compensate(x, mean[a:b], factor[a:b]) for x, a, b in zip(parts, edges, edges[1:])]
    assert torch.equal(compensate_parts(joined(parts), mean, factor, PARTS), joined(expected))
    same = compensate_parts(joined(parts), mean, torch.ones(CHANNELS), PARTS)
    assert torch.equal(same, joined(parts))


# The fit


def pairs(step, batches=2):
    """Paired samples of three parts that drift further with every step."""
    found = []
    for batch in range(batches):
        reference = [randn(3, *shape, seed=17 * batch + i) for i, shape in enumerate(PARTS)]
        other = [x * (1 + 0.1 * step) + 0.05 * randn(*x.shape, seed=90 + batch) for x in reference]
        found.append((reference, other))
    return found


@pytest.mark.parametrize("method", ["variance_match", "least_squares", "paper"])
def test_parts_are_fitted_as_each_alone(method):
    fit = SequentialFit(3, method)
    for step in range(3):
        fit.step(3.0 - step, [(joined(a), joined(b)) for a, b in pairs(step)], PARTS)
    found = fit.result()
    assert found.factor.shape == (3, CHANNELS) and torch.equal(found.factor[0], torch.ones(CHANNELS))
    edges = [0, 4, 6, 9]
    for step in (1, 2):
        for part in range(3):
            both = [torch.cat([pair[side][part] for pair in pairs(step)]) for side in (0, 1)]
            flat = [x.reshape(*x.shape[:2], -1, 1) for x in both]
            mean, factor = variance_factors(*flat, method)
            torch.testing.assert_close(found.mean[step, edges[part] : edges[part + 1]], mean.float())
            torch.testing.assert_close(found.factor[step, edges[part] : edges[part + 1]], factor.float())


@pytest.mark.parametrize(
    "start, end, corrected",
    [(0, 1, [1, 2, 3, 4, 5]), (0.5, 0.84, [3, 4, 5]), (0.4, 0.5, []), (0.17, 0.5, [2]), (0.9, 1.0, [])],
)
def test_the_chosen_part_of_the_run(start, end, corrected):
    fit = SequentialFit(6, start=start, end=end)
    for step in range(6):
        fit.step(6.0 - step, [(joined(a), joined(b)) for a, b in pairs(step, 1)], PARTS)
    assert [i for i, factor in enumerate(fit.result().factor) if (factor != 1).any()] == corrected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"start": 0.6, "end": 0.4}, "begin before it ends"),
        ({"start": 0.5, "end": 0.5}, "begin before it ends"),
        ({"start": -0.1}, "within 0 and 1"),
        ({"end": 1.5}, "within 0 and 1"),
        ({"start": math.nan}, "within 0 and 1"),
        ({"end": math.nan}, "within 0 and 1"),
        ({"eps": math.nan}, "eps must be above 0"),
        ({"eps": math.inf}, "eps must be above 0"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"method": "mean"}, "method must be one of"),
    ],
)
def test_nonsense_is_refused_before_anything_is_sampled(arguments, message):
    with pytest.raises(ValueError, match=message):
        SequentialFit(6, **arguments)


def test_samples_that_are_not_finite_are_told():
    fit, bad = SequentialFit(4), randn(2, 3, 4, 4)
    fit.step(3.0, [(bad, bad)])
    bad[1, 2] = math.nan
    for pair in ((bad, randn(2, 3, 4, 4)), (randn(2, 3, 4, 4), bad)):
        with pytest.raises(ValueError, match="not finite before step 2 of 4"):
            fit.step(2.0, [pair])


# What is saved and loaded


def compensation(**changes):
    values = {"sigmas": torch.tensor([3.0, 1.0]), "mean": torch.zeros(2, 4), "factor": torch.ones(2, 4)}
    return VarianceCompensation(**{**values, **changes})


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5, 1e9])
@pytest.mark.parametrize("name", ["factor", "mean", "sigmas"])
def test_nonsense_in_a_compensation_is_refused(name, value):
    tensor = getattr(compensation(), name).clone()
    tensor.view(-1)[-1] = value
    if name == "mean" and math.isfinite(value):
        compensation(mean=tensor)
        return
    with pytest.raises(ValueError, match="fit it again, with more pairs[.]$"):
        compensation(**{name: tensor})


def test_least_squares_may_turn_a_channel_over_and_a_deviation_may_not():
    factor = torch.full((2, 4), -0.5)
    assert torch.equal(compensation(factor=factor, method="least_squares").factor, factor)
    with pytest.raises(ValueError, match="not between 0 and 1000"):
        compensation(factor=factor)


@pytest.mark.parametrize(
    "changes", [{"mean": torch.zeros(3, 4)}, {"factor": torch.ones(2, 5)}, {"sigmas": torch.ones(2, 1)}]
)
def test_tensors_that_do_not_fit_together_are_refused(changes):
    with pytest.raises(ValueError, match=r"sigmas \(S,\), mean and factor \(S, C\)"):
        compensation(**changes)


@pytest.mark.parametrize("cfg", [math.nan, math.inf])
def test_a_guidance_that_is_no_number_is_refused(cfg):
    with pytest.raises(ValueError, match="cfg_scale is .*, expected a number"):
        generate(load_dit("demo"), [3], 4, cfg_scale=cfg)
    with pytest.raises(ValueError, match="cfg_scale is .*, expected a number"):
        replace(SamplingConfig(), cfg_scale=cfg)


# One relative error


def test_relative_error():
    a = randn(4, 5)
    assert relative_error(1.25 * a, a) == pytest.approx(0.25) and relative_error(a, a) == 0
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0 and ratio(0.0, 0.0) == 0
    assert relative_error(torch.ones(3), torch.zeros(3)) == math.inf
    assert relative_error(torch.ones(3, dtype=torch.float16), torch.full((3,), 2.0)) == 0.5
