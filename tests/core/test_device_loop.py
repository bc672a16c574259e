"""Sampling on the device against loops written by hand from the samplers' own steps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.speed.plain import loop_of
from qandc_core import (
    SamplingConfig,
    apply_cache_to_dit,
    fit_variance_compensation,
    fuse_dit,
    generate,
    load_dit,
)
from qandc_core.caching.forecast import CURVATURE, forecast_rows
from qandc_core.caching.schedule import CacheConfig, spaced_steps
from qandc_core.diffusion.guidance import guided_prediction
from qandc_core.diffusion.process import ReverseProcess
from qandc_core.diffusion.schedule import respaced
from qandc_core.diffusion.steps import step_coefficients
from qandc_core.fused.dit import FusedDiT

LABELS = [3, 7]

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def model():
    return load_dit("demo")


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def implied_noise(x, x0, a):
    return (x - a**0.5 * x0) / (1 - a) ** 0.5


def published_step(sampler, x, x0, a, after, noise):
    """DDIM's Eq. 12 with sigma = 0, and DDPM's Eq. 6-7, as they are printed."""
    if sampler == "ddim":
        return after**0.5 * x0 + (1 - after) ** 0.5 * implied_noise(x, x0, a)
    beta = 1 - a / after
    mean = after**0.5 * beta / (1 - a) * x0 + (1 - beta) ** 0.5 * (1 - after) / (1 - a) * x
    return mean if noise is None else mean + ((1 - after) / (1 - a) * beta) ** 0.5 * noise


@given(st.integers(2, 1000), st.sampled_from(["ddim", "ddpm"]), st.data())
def test_coefficients_are_the_samplers(steps, sampler, data):
    schedule = respaced(steps)
    i = data.draw(st.integers(0, steps - 1))
    a, after = schedule.alpha_bar[i], schedule.alpha_bar[i + 1]
    generator = torch.Generator().manual_seed(i)
    x, x0, noise = torch.randn(3, 64, dtype=torch.float64, generator=generator)
    c = step_coefficients(schedule, sampler, i)
    given = noise if sampler == "ddpm" and after < 1 else None
    assert torch.allclose(c.clean_image(x, implied_noise(x, x0, a)), x0, atol=1e-6)
    expected = published_step(sampler, x, x0, a, after, given)
    assert torch.allclose(c.advance(x, x0, given), expected, atol=1e-6)
    assert torch.allclose(c.keep * x + c.denoise * x0 + c.fresh * noise, expected, atol=1e-6)
    assert torch.equal(c.advance(x, x0, given, 2 * c.fresh), c.advance(x, x0, None if given is None else 2 * given))


def test_forecasts_weigh_the_last_computed_steps():
    computed = [i in (0, 2, 5) for i in range(8)]
    assert forecast_rows(computed, 0) == [[1.0, 0.0, 0.0]] * 8
    assert forecast_rows(computed, 1)[1] == [1.0, 0.0, 0.0]  # one prediction so far: held
    weights = [[3 / 2, -1 / 2, 0], [4 / 2, -2 / 2, 0], [4 / 3, -1 / 3, 0], [5 / 3, -2 / 3, 0]]
    assert [forecast_rows(computed, 1)[i] for i in (3, 4, 6, 7)] == [pytest.approx(row) for row in weights]


def forecast(kept, at, order):
    """The line through the last two, and at order 2 half of what the parabola through the last three adds to it."""
    points = kept[-1 - order :]
    if len(points) == 1:
        return points[-1][1]
    (before, older), (last, newer) = points[-2:]
    line = older + (at - before) / (last - before) * (newer - older)
    if len(points) == 2:
        return line
    steps = [step for step, _ in points]
    basis = [math.prod((at - other) / (step - other) for other in steps if other != step) for step in steps]
    parabola = sum(weight * value for weight, (_, value) in zip(basis, points))
    return line + CURVATURE * (parabola - line)


def by_hand(model, config, cache, seed):
    """Predictions held or forecast over steps, with the engine's guided prediction and sampler steps."""
    process = ReverseProcess(model, LABELS, config)
    source = process.noise_source(seed, range(len(LABELS)))
    x, kept = source.draw(), []
    for i, (timestep, a, after) in enumerate(
        zip(process.schedule.timesteps, process.schedule.alpha_bar, process.schedule.alpha_bar[1:])
    ):
        noise = source.draw() if process.needs_noise(i) else None
        if cache.computes(i):
            t = torch.full((len(x),), timestep)
            x0, _ = guided_prediction(
                model, x, t, process.labels, model.null_class, config.cfg_scale, None, True
            )  # fmt: skip
            kept.append((i, x0))
        else:
            x0 = forecast(kept, i, cache.order)
        x = published_step(config.sampler, x, x0, a, after, noise)
    return x


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_reuses_predictions_as_steps_by_hand(model, sampler, order, fused):
    config = SamplingConfig(12, 1.5, sampler)
    cache = CacheConfig(steps=frozenset(spaced_steps(12, 5)), reuse="prediction", order=order)
    loop = loop_of(fuse_dit(model) if fused else model, len(LABELS), config, cache)
    process = ReverseProcess(model, LABELS, config)
    source = process.noise_source(9, range(len(LABELS)))
    noise = [source.draw() for _ in range(1 + sum(map(process.needs_noise, range(12))))]
    for _ in range(2):  # the second run finds nothing of the first
        seconds = loop.run(process.labels, noise)
        assert relative(loop.x, by_hand(model, config, cache, 9)) < 1e-5
    assert len(seconds) == 12 and sum(loop.computed) == 5
    assert loop.cache_bytes == loop.denoised.nbytes * (1 + order)


def test_generate_takes_predictions_and_compensation(model):
    fused = fuse_dit(model)
    apply_cache_to_dit(fused, 3, reuse="prediction", order=1)
    cache = CacheConfig(3, reuse="prediction", order=1)
    found, report = generate(fused, LABELS, 10, 1.5, "ddim", seed=2)
    assert relative(found, by_hand(model, SamplingConfig(10, 1.5, "ddim"), cache, 2)) < 1e-5
    assert report.computed == [i % 3 == 0 for i in range(10)]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_compensates_as_the_engine_does(model, sampler):
    config = SamplingConfig(8, 1.5, sampler)
    cached = apply_cache_to_dit(load_dit("demo"), 2)
    compensation = fit_variance_compensation(model, cached, list(range(10)), config, seed=5)
    assert float((compensation.factor - 1).abs().max()) > 1e-3
    fused = apply_cache_to_dit(fuse_dit(model), 2)
    settings = dict(steps=8, cfg_scale=1.5, sampler=sampler, seed=3, compensation=compensation)
    expected, _ = generate(cached, LABELS, **settings)
    found, _ = generate(fused, LABELS, **settings)
    plain, _ = generate(fused, LABELS, **{**settings, "compensation": None})
    assert relative(found, expected) < 1e-5 < relative(plain, expected)


def test_callback_sees_every_step(model):
    fused = apply_cache_to_dit(fuse_dit(model), 2, reuse="prediction")
    seen = []
    x, report = generate(fused, LABELS, 6, 1.5, "ddim", seed=1, callback=seen.append)
    assert [info.index for info in seen] == list(range(6))
    assert [info.computed for info in seen] == report.computed
    assert torch.equal(seen[-1].x, x) and not torch.equal(seen[0].x, x)
    assert [info.seconds for info in seen] == pytest.approx(report.seconds, rel=0.5, abs=5e-3)


def test_a_loop_is_made_once_for_the_same_settings(model):
    fused = fuse_dit(model)
    generate(fused, LABELS, 4, 1.5, "ddim", seed=1)
    (loop,) = fused.loops.values()
    generate(fused, LABELS[::-1], 4, 1.5, "ddim", seed=2)
    assert list(fused.loops.values()) == [loop]
    generate(fused, LABELS, 5, 1.5, "ddim", seed=1)
    assert list(fused.loops.values()) != [loop]


def test_refuses_what_needs_the_host(model):
    with pytest.raises(ValueError, match="fixed_small"):
        loop_of(model, 2, SamplingConfig(variance="learned_range"))
    with pytest.raises(ValueError, match="batched_guidance"):
        generate(fuse_dit(model), LABELS, 4, 1.5, batched_guidance=False)
    with pytest.raises(ValueError, match=r"the noise is \(2, 3, 16, 16\)"):
        generate(fuse_dit(model), LABELS, 4, 1.5, noise=torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="reuses predictions only"):
        loop_of(model, 2, SamplingConfig(), CacheConfig(3))


def test_modulations_of_all_steps_come_from_few_products(model, monkeypatch):
    calls, original = [], FusedDiT.modulations
    monkeypatch.setattr(FusedDiT, "modulations", lambda *args: calls.append(len(args[1])) or original(*args))
    generate(fuse_dit(model), LABELS, 10, 1.5, "ddim", seed=1)
    assert calls == [10 * (len(LABELS) + 1)]  # both images share the row without a class
