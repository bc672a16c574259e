"""Where a prediction stands in a schedule, whatever the sampler does with it, and what a run reports."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qandc_core.caching.plans import Plan
from qandc_core.caching.policies import ErrorBudget, Interval, StepCount
from qandc_core.caching.run import SamplingRun
from qandc_core.caching.steps import Steps
from qandc_core.caching.trajectory import NoiseWatch, probe_positions

# Levels at least 2 % apart: closer ones, and what lies between them, may count as the same.
falling = st.lists(st.integers(-150, 150), min_size=1, max_size=12, unique=True).map(
    lambda places: [*(math.exp(place / 50) for place in sorted(places, reverse=True)), 0.0]
)


def located(sigmas, levels):
    steps, found = Steps(sigmas), []
    for level in levels:
        back = steps.locate(level)
        found.append((steps.at, back))
    return found


@given(falling, st.booleans())
def test_every_step_of_a_falling_or_flipped_schedule_is_its_own(sigmas, flipped):
    sigmas = sigmas[::-1] if flipped else sigmas
    assert located(sigmas, sigmas[:-1]) == [(i, False) for i in range(len(sigmas) - 1)]


@given(falling, st.floats(0.01, 0.99))
def test_evaluations_within_a_step_belong_to_it(sigmas, part):
    levels = [level for a, b in zip(sigmas, sigmas[1:]) for level in (a, a + part * (b - a))]
    found = [at for at, _ in located(sigmas, levels)]
    assert found == [i for i in range(len(sigmas) - 1) for _ in range(2)]


@given(falling, st.data())
def test_left_out_steps_are_not_visited(sigmas, data):
    kept = sorted(data.draw(st.sets(st.integers(0, len(sigmas) - 2), min_size=1)))
    assert [at for at, _ in located(sigmas, [sigmas[i] for i in kept])] == kept


@given(falling, st.data())
def test_going_up_again_begins_a_new_pass(sigmas, data):
    total = len(sigmas) - 1
    down = data.draw(st.integers(0, total - 1))
    up = data.draw(st.integers(0, down))
    levels = [*sigmas[: down + 1], *sigmas[up:-1]]
    found = located(sigmas, levels)
    assert [at for at, _ in found] == [*range(down + 1), *range(up, total)]
    assert [i for i, (_, back) in enumerate(found) if back] == ([down + 1] if up < down else [])


def test_a_schedule_that_rises_in_its_middle_is_two_passes():
    sigmas = [14.0, 3.0, 1.0, 0.3, 3.0, 1.0, 0.0]
    assert located(sigmas, sigmas[:-1]) == [(i, i == 4) for i in range(6)]


def test_a_repeated_level_is_two_steps():
    sigmas = [5.0, 5.0, 3.0, 3.0, 3.0, 0.0]
    assert located(sigmas, sigmas[:-1]) == [(i, False) for i in range(5)]


@given(st.lists(st.floats(0, 30), max_size=6), st.lists(st.floats(0, 30), max_size=20))
def test_no_schedule_and_no_order_of_levels_breaks_a_run(sigmas, levels):
    run = SamplingRun(Plan(max(len(sigmas) - 1, 0), 1, set()), sigmas)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for number, level in enumerate(levels):
        run.begin_prediction(level)
        run.sample = x
        call = run.identify(x, [("prompt", 0)], ())
        cache = run.place(x, call)
        value = torch.full((1,), float(number))
        if cache.run.reusing:
            assert cache.recall("denoised").isfinite().all()
        elif cache.needs(run.step):
            cache.store("denoised", value)
        run.record(cache, call)
        run.end_prediction(x)
    actions = run.actions()
    assert len(actions) == run.width >= run.total
    assert run.not_visited + actions.count("C") + sum(action in "RF" for action in actions) == len(actions)
    assert "computed" in run.counts()


def euler(run, predict, sigmas, x, extra=None):
    for sigma, following in zip(sigmas, sigmas[1:]):
        level = run.noise_level(torch.tensor([sigma]), x)
        run.begin_prediction(level)
        run.sample = x
        call = run.identify(x, [("prompt", 0)], ())
        cache = run.place(x, call)
        if cache.run.reusing:
            denoised = cache.recall("denoised")
        else:
            denoised = predict(x, sigma)
            if cache.needs(run.step):
                cache.store("denoised", denoised)
        run.record(cache, call)
        run.end_prediction(denoised)
        run.keep_values(denoised)
        x = denoised + (x - denoised) * (following / sigma)
        if extra is not None:
            x = extra(x, sigma, following)
    return x


def gaussian(x, sigma, variance=0.25):
    return x * variance / (variance + sigma**2)


def start(sigma, seed=0):
    return sigma * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


SIGMAS = [14.0, 9.0, 6.0, 4.0, 2.7, 1.8, 1.2, 0.8, 0.5, 0.3, 0.2, 0.1]


@pytest.mark.parametrize("order", [0, 1])
def test_a_restarted_run_reports_what_happened_and_begins_its_features_anew(order):
    """Two passes over steps 4 to 6, with noise between them: forecasts never use the pass before."""
    calls = []

    def predict(x, sigma):
        calls.append(sigma)
        return gaussian(x, sigma)

    plan = Interval(2, order=order).plan(11)
    run = SamplingRun(plan, SIGMAS)
    x = euler(run, predict, SIGMAS[:8], start(14.0))
    x = x + start(2.0, seed=1)
    euler(run, predict, SIGMAS[4:], x)
    r = "F" if order else "R"
    letters = run.timeline["positive"]
    assert letters == f"CRC{r}C{r}C{r}C{r}C" + "CRC"
    assert len(calls) == letters.count("C") == sum(run.computed()) and run.not_visited == 0
    assert "of them again after the noise level turned back" in run.counts()


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("budget", [0.05, 0.5, 5.0])
def test_an_error_budget_survives_a_restart(budget, order):
    """What it observed in the first pass does not lead into the second."""
    calls = []

    def predict(x, sigma):
        calls.append(sigma)
        return gaussian(x, sigma)

    run = SamplingRun(ErrorBudget(budget, order=order).plan(11), SIGMAS)
    x = euler(run, predict, SIGMAS[:8], start(14.0))
    x = euler(run, predict, SIGMAS[4:], x + start(2.0, seed=1))
    letters = run.timeline["positive"]
    assert x.isfinite().all() and len(letters) == 11 + 3 and "." not in letters and letters[0] == letters[11] == "C"
    assert len(calls) == letters.count("C") == sum(run.computed())


@pytest.mark.parametrize("policy", [Interval(2, order=1), ErrorBudget(0.5, order=1)])
def test_a_flipped_schedule_is_cached_by_its_steps(policy):
    sigmas = SIGMAS[::-1]
    run = SamplingRun(policy.plan(11), sigmas)
    x = euler(run, gaussian, sigmas, start(0.1))
    assert x.isfinite().all() and len(run.timeline["positive"]) == 11
    if policy.decided_before:
        assert run.timeline["positive"] == "CRCFCFCFCFC"
        full = euler(SamplingRun(Plan(11, 0, set(range(11))), sigmas), gaussian, sigmas, start(0.1))
        assert (x - full).norm() < 0.2 * full.norm()


def test_steps_that_were_left_out_did_not_compute():
    run = SamplingRun(Plan(11, 0, {0, 3}), SIGMAS)
    kept = [SIGMAS[i] for i in (0, 1, 3, 4, 5)]
    euler(run, gaussian, [*kept, 0.8], start(14.0))
    assert run.timeline == {"positive": "CR.CRR....."} and run.not_visited == 6
    assert run.computed() == [i in (0, 3) for i in range(11)]
    assert run.counts() == "2 of 11 steps computed, 3 reused, 6 not visited"


@pytest.mark.parametrize("sigmas", [[], [1.0], [1.0, 0.0]])
def test_runs_of_no_step_and_of_one(sigmas):
    run = SamplingRun(StepCount(3).plan(max(len(sigmas) - 1, 0)), sigmas)
    euler(run, gaussian, sigmas, start(1.0))
    assert run.computed() == [True] * max(len(sigmas) - 1, 0)


# Noise


def noised(amount, seed=3, first=0):
    generator = torch.Generator().manual_seed(seed)

    def add(x, sigma, following):
        return x + (amount * following if sigma <= SIGMAS[first] else 0) * torch.randn(x.shape, generator=generator)

    return add


def watched(extra=None, steps=(0, 2, 4, 6, 8), mask=None):
    run = SamplingRun(Plan(11, 1, set(steps)), SIGMAS, sampler="mine")
    run.watch_noise(start(1.0), mask)
    euler(run, gaussian, SIGMAS, start(14.0), extra)
    return run


def test_forecasts_go_on_without_noise_and_end_with_the_first():
    assert "".join(watched().timeline["positive"]).count("F") == 5 and not watched().warnings
    for amount in (0.01, 0.3, 1.0):
        run = watched(noised(amount))
        assert set(run.timeline["positive"]) == {"C", "R"} and run.plan.order == 0
        assert run.warnings == ["order 1 is not used with mine, which adds noise between steps; using order 0"]
    later = watched(noised(0.5, first=5)).timeline["positive"]
    assert later[:6] == "CRCFCF" and set(later[6:]) == {"C", "R"}


@pytest.mark.parametrize("churn", [0.0, 0.02, 0.2])
def test_going_back_at_every_step_is_noise_only_between_the_levels_of_the_schedule(churn):
    """Heun++ evaluates this level, the next and the one after it, then steps to the next; churn raises the level."""
    run = SamplingRun(Plan(11, 1, {0}), SIGMAS, sampler="mine")
    run.watch_noise(start(1.0))
    for i in range(len(SIGMAS) - 2):
        sigmas = [SIGMAS[i] * (1 + churn), *SIGMAS[i + 1 : i + 3]]
        euler(run, gaussian, [*sigmas, 0.05], start(sigmas[0]))
    assert (run.plan.order == 0) == (churn > 0) == bool(run.warnings)


def test_a_mask_that_sets_the_rest_of_the_sample_is_no_noise():
    free = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    free[..., :4] = True
    other = torch.randn(11, 2, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    at = iter(range(11))
    paint = lambda x, sigma, following: torch.where(free, x, other[next(at)])  # noqa: E731
    assert watched(paint, mask=free).plan.order == 1


def test_noise_level_takes_one_transfer(monkeypatch):
    """The number of waits for the device: what leaves it, for each prediction."""
    waits = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: waits.append(1) or cpu(self))
    run = watched()
    assert len(waits) == len(SIGMAS) - 1
    assert run.plan.order == 1


coefficients = st.lists(st.floats(-2, 2), min_size=6, max_size=6)


@given(coefficients, st.integers(0, 2**31), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_any_multistep_formula_follows_and_noise_does_not(weights, seed, amount):
    generator = np.random.default_rng(seed)
    watch, history = NoiseWatch(), []
    sample = generator.standard_normal(512)
    for step in range(8):
        noisy = watch.see(sample.astype(np.float32).astype(np.float64), 1.0)
        prediction = generator.standard_normal(512)
        watch.predicted(prediction)
        history = [prediction, *history][:4]
        sample = weights[0] * sample + sum(w * p for w, p in zip(weights[1:], history))
        sample = sample / max(np.abs(sample).max(), 1) if step < 7 else sample
        if amount > 0.01:
            sample = sample + amount * generator.standard_normal(512)
    assert noisy == (amount > 0.01)


@given(st.integers(1, 10**7))
def test_probe_positions_lie_inside_and_never_change(size):
    positions = probe_positions(size)
    assert positions.min() >= 0 and positions.max() < size and len(positions) >= min(size, 200)
    assert torch.equal(positions, probe_positions(size))


# Within a step


@given(st.integers(0, 9), st.floats(0, 0.99), st.booleans())
def test_an_evaluation_between_two_levels_has_its_share_of_the_step(step, part, flipped):
    sigmas = SIGMAS[::-1] if flipped else SIGMAS
    run = SamplingRun(Plan(11, 1, set()), sigmas)
    level = sigmas[step] + part * (sigmas[step + 1] - sigmas[step])
    run.begin_prediction(level)
    assert run.step == step and run.position == pytest.approx(step + part, abs=1e-9)


@given(st.floats(0.01, 0.98), st.floats(-3, 3), st.floats(-3, 3))
def test_a_forecast_within_a_step_lies_on_the_line_at_its_place(part, offset, slope):
    """Steps 0 and 2 compute what is linear in the position; an evaluation within step 3 is on that line."""
    run, x = SamplingRun(Plan(11, 1, {0, 2}), SIGMAS), start(1.0)
    for level in (*SIGMAS[:4], SIGMAS[3] + part * (SIGMAS[4] - SIGMAS[3])):
        run.begin_prediction(level)
        run.sample = x
        cache = run.place(x, run.identify(x, [("prompt", 0)], ()))
        if not cache.run.reusing:
            cache.store("denoised", torch.tensor([offset + slope * run.position], dtype=torch.float64))
        run.end_prediction(x)
    assert cache.run.reusing and cache.recall("denoised").item() == pytest.approx(offset + slope * (3 + part), abs=1e-9)


def test_heuns_corrector_belongs_to_the_step_that_it_ends():
    run = SamplingRun(Plan(11, 0, {0, 1, 2}), SIGMAS, corrects=True)
    found = []
    for i in range(4):
        for level in SIGMAS[i : i + 2]:
            run.begin_prediction(level)
            found.append(run.step)
    assert found == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_sampler_that_changes_the_size_adds_no_noise():
    def grow(x, sigma, following):
        return x.repeat(1, 1, 2, 2) if sigma == SIGMAS[4] else x

    run = watched(grow)
    assert run.plan.order == 1 and not run.warnings


def test_a_step_that_reused_a_part_says_so():
    run, x = SamplingRun(Plan(2, 0, {0}), [2.0, 1.0, 0.0]), start(1.0)
    for level, prompts in ((2.0, "a"), (1.0, "ab")):
        run.begin_prediction(level)
        run.sample = x
        for prompt in prompts:
            call = run.identify(x, [(prompt, 0)], ())
            cache = run.place(x, call)
            if not cache.run.reusing:
                cache.store("denoised", x)
            run.record(cache, call)
        run.end_prediction(x)
    assert run.timeline == {"positive": "CR", "positive #2": ".C"}
    assert run.counts() == "2 of 2 steps computed (1 in part), 0 reused" and run.reused_any
