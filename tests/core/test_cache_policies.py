"""What decides which steps compute: spacings, plans of every policy, forecasts, and the times they go by."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.polynomial import Polynomial
from scipy.interpolate import KroghInterpolator, interp1d

from qandc_core.caching.features import NEAREST, FeatureCache
from qandc_core.caching.policies import (
    NEGLIGIBLE,
    WARM_UP,
    CachePolicy,
    ErrorBudget,
    Plan,
    SpeedupPlan,
    affordable,
    divided_difference,
    newton_term,
)
from qandc_core.caching.schedule import CacheConfig, optimal_schedule, spaced_steps
from qandc_core.sampling.clock import CallTimes

LINEAR, HELD = CacheConfig(order=1), CacheConfig(order=0)
parts = st.tuples(st.floats(0, 1), st.floats(0, 1))
seeds = st.integers(0, 2**31)


def computed_by(plan):
    return {step for step in range(plan.total) if plan.computes(step)}


def inside(step, total, start, end):
    return start * total <= step < end * total


# Default spacing


@given(st.integers(1, 200), st.data())
@settings(deadline=None)
def test_spaced_steps_are_as_many_as_asked_and_hold_both_ends(total, data):
    computed = data.draw(st.integers(1, total))
    steps = spaced_steps(total, computed)
    assert len(steps) == computed
    assert list(steps) == sorted(set(steps))
    assert steps[0] == 0
    assert steps[-1] == (total - 1 if computed > 1 else 0)


@given(st.integers(2, 200), st.data())
@settings(deadline=None)
def test_spaced_steps_lie_closer_together_towards_the_end(total, data):
    steps = spaced_steps(total, data.draw(st.integers(2, total)))
    gaps = [b - a for a, b in zip(steps, steps[1:])]
    assert all(later <= earlier + 1 for earlier, later in zip(gaps, gaps[1:]))
    half = len(gaps) // 2
    assert sum(gaps[:half]) >= sum(gaps[len(gaps) - half :])


@pytest.mark.parametrize("computed", [0, 11])
def test_impossible_numbers_of_steps_are_refused(computed):
    with pytest.raises(ValueError, match=f"between 1 and 10, got {computed}"):
        spaced_steps(10, computed)


# Plans that are known before the run


def read_steps(plan):
    """Every step that some reused step reads: the last order + 1 that were computed before it."""
    read = set()
    for step in set(range(plan.total)) - computed_by(plan):
        read.update(sorted(s for s in computed_by(plan) if s < step)[-1 - plan.order :])
    return read


@given(st.integers(1, 25), st.sets(st.integers(0, 24)), st.integers(0, 1))
@settings(deadline=None)
def test_a_plan_keeps_exactly_what_a_reused_step_reads(total, steps, order):
    plan = Plan(total, order, steps)
    assert {step for step in computed_by(plan) if plan.keeps(step)} == read_steps(plan)


@given(st.sets(st.integers(0, 24)), st.integers(0, 40))
@settings(deadline=None)
def test_a_plan_computes_the_first_step_and_all_past_the_last(steps, beyond):
    plan = Plan(25, 0, steps)
    assert plan.computes(0) and plan.computes(25 + beyond)
    assert computed_by(plan) == steps | {0}


@given(st.integers(1, 60), parts, st.one_of(st.integers(1, 9), st.frozensets(st.integers(0, 59))))
@settings(deadline=None)
def test_interval_and_chosen_steps_hold_inside_their_part_and_all_steps_outside_compute(total, part, when):
    config = CacheConfig(steps=when) if isinstance(when, frozenset) else CacheConfig(when)
    plan = CachePolicy(config, start=part[0], end=part[1]).plan(total)
    for step in range(1, total):
        assert plan.computes(step) == (not inside(step, total, *part) or config.computes(step))


policies = st.one_of(
    st.builds(CacheConfig, st.integers(1, 9)).map(CachePolicy),
    st.frozensets(st.integers(0, 59)).map(lambda steps: CachePolicy(CacheConfig(steps=steps))),
    st.integers(1, 80).map(lambda computed: CachePolicy(computed=computed)),
    st.floats(1, 20).map(lambda speedup: CachePolicy(speedup=speedup)),
    st.floats(0, 1).map(lambda error: CachePolicy(max_error=error)),
)


@given(policies, st.integers(1, 60), parts)
@settings(deadline=None)
def test_every_policy_computes_the_first_step_and_all_outside_its_part(policy, total, part):
    plan = replace(policy, start=part[0], end=part[1]).plan(total)
    computed = run_through(plan, lambda x, sigma: torch.zeros(2), torch.ones(2), [*range(total, 0, -1), 0])[1]
    assert computed[0]
    for step in range(total):
        assert computed[step] or inside(step, total, *part)


@given(st.integers(0, 60), st.integers(1, 80), parts)
@settings(deadline=None)
def test_the_number_of_steps_counts_those_outside_the_part(total, computed, part):
    found = computed_by(CachePolicy(computed=computed, start=part[0], end=part[1]).plan(total))
    outside = {step for step in range(total) if not inside(step, total, *part)}
    assert outside <= found
    assert len(found) == min(max(computed, len(outside) + 1), total)  # at least one inside, where features begin


def test_the_number_of_steps_of_a_whole_run_is_the_default_spacing():
    assert computed_by(CachePolicy(computed=20).plan(50)) == set(spaced_steps(50, 20))


def random_distances(total, seed):
    return torch.rand(total, total, generator=torch.Generator().manual_seed(seed)).triu(1)


@given(st.integers(1, 20), st.integers(1, 25), seeds)
@settings(deadline=None)
def test_with_distances_the_number_of_steps_lies_at_the_optimum(total, computed, seed):
    distances = random_distances(total, seed)
    plan = CachePolicy(computed=computed, distances=distances).plan(total)
    assert computed_by(plan) == set(optimal_schedule(distances, min(computed, total)))
    assert not plan.warnings


@given(st.integers(1, 20), st.integers(1, 25), parts, seeds)
@settings(deadline=None)
def test_distances_change_which_steps_compute_and_not_how_many(total, computed, part, seed):
    policy = CachePolicy(computed=computed, start=part[0], end=part[1])
    calibrated = replace(policy, distances=random_distances(total, seed)).plan(total)
    assert len(computed_by(calibrated)) == len(computed_by(policy.plan(total)))
    assert all(calibrated.computes(step) for step in range(total) if not inside(step, total, *part))


def test_distances_of_another_number_of_steps_fall_back_to_the_spacing_with_a_warning():
    plan = CachePolicy(computed=8, distances=random_distances(50, 0)).plan(30)
    assert computed_by(plan) == set(spaced_steps(30, 8))
    assert plan.warnings == ["the calibration is of 50 steps and this run has 30: default spacing"]


@pytest.mark.parametrize(
    "policy",
    [CachePolicy(CacheConfig(1)), CachePolicy(speedup=1.0), CachePolicy(max_error=0.0)],
    ids=lambda policy: policy.describe(),
)
def test_policies_that_reuse_nothing_are_off(policy):
    assert policy.off


@given(policies)
@settings(deadline=None)
def test_policies_that_reuse_something_are_on(policy):
    trivial = policy.speedup == 1 or policy.max_error == 0 or policy == CachePolicy(CacheConfig(1))
    assert policy.off == trivial


@given(policies, policies)
@settings(deadline=None)
def test_policies_are_told_apart_by_their_details(first, second):
    assert (first.detail() == second.detail()) == (first == second)


# Speedup


@given(st.integers(1, 200), st.floats(1, 50), st.floats(0, 0.99))
@settings(deadline=None)
def test_the_affordable_steps_keep_the_time_and_one_more_does_not(total, speedup, cost):
    def time(n):
        return n + (total - n) * cost

    n, limit = affordable(total, speedup, cost), total / speedup
    assert 1 <= n <= total
    assert n == 1 or time(n) <= limit * (1 + 1e-9)
    assert n == total or time(n + 1) > limit * (1 - 1e-9)


@given(st.integers(1, 200), st.floats(1, 50), st.floats(1, 9))
@settings(deadline=None)
def test_where_reuse_saves_nothing_one_step_is_affordable(total, speedup, cost):
    assert affordable(total, speedup, cost) == 1


@given(st.integers(2, 60), st.floats(1, 20), st.integers(0, 59), st.floats(1e-6, 2), parts)
@settings(deadline=None)
def test_measured_times_never_change_a_past_decision(total, speedup, now, reused, part):
    plan = CachePolicy(LINEAR, start=part[0], end=part[1], speedup=speedup).plan(total)
    now = min(now, total - 1)
    for step in range(now + 1):
        plan.begin(step, float(step), 1.0, 0.5)
    before = [plan.computes(step) for step in range(now + 1)]
    plan.time(1.0, reused)
    assert [plan.computes(step) for step in range(now + 1)] == before
    assert plan.computes(0)
    assert all(plan.computes(step) for step in range(total) if not inside(step, total, *part))


def replanned(total, speedup, cost, at=4):
    plan = SpeedupPlan(total, 1, range(total), speedup)
    plan.begin(at, float(at), 1.0, 0.5)
    plan.time(1.0, cost)
    return plan


@given(st.integers(5, 80), st.floats(1, 10), st.integers(0, 6), st.floats(-0.3, 0.3), st.floats(-0.3, 0.3))
@settings(deadline=None)
def test_noise_in_the_times_changes_nothing(total, speedup, power, first, second):
    middle = NEGLIGIBLE * 2 ** (power - 0.5)  # between two powers of two, which lie 0.5 away in the exponent
    plans = [replanned(total, speedup, middle * 2**noise) for noise in (first, second)]
    assert computed_by(plans[0]) == computed_by(plans[1])


@given(st.integers(5, 80), st.floats(1, 10), st.floats(1e-9, 1))
@settings(deadline=None)
def test_dearer_reuse_leaves_fewer_steps_to_compute(total, speedup, cost):
    dearer, cheaper = replanned(total, speedup, cost), replanned(total, speedup, cost / 4)
    assume(not dearer.warnings)
    assert len(computed_by(dearer)) <= len(computed_by(cheaper))


@given(st.integers(20, 200), st.floats(1.2, 4), st.floats(1e-6, NEGLIGIBLE, exclude_max=True))
@settings(deadline=None)
def test_cheap_reuse_reaches_the_speedup_but_for_its_own_cost(total, speedup, cost):
    plan = replanned(total, speedup, cost)
    computed = len(computed_by(plan))
    assert computed == max(1, int(total / speedup))  # planned like this at once
    assert total / (computed + (total - computed) * cost) >= speedup / (1 + speedup * cost)
    assert not plan.warnings


@given(st.integers(5, 80), st.integers(2, 20), st.floats(1, 3))
@settings(deadline=None)
def test_a_speedup_out_of_reach_is_said_and_measured_no_more(total, speedup, dearer):
    plan = replanned(total, speedup, dearer / speedup)
    share = f"{100 * dearer / speedup:.0f} %"
    assert plan.warnings == [f"{speedup}x may be out of reach: a reused step takes {share} of a computed one"]
    assert computed_by(plan) == computed_by(SpeedupPlan(total, 1, range(total), speedup))  # as if reuse were free
    assert not plan.measures


def test_only_the_speedup_wants_times():
    assert CachePolicy(speedup=2.0).plan(20).measures
    assert not CachePolicy(computed=5).plan(20).measures and not CachePolicy(max_error=0.1).plan(20).measures


# Error budget, on Gaussian data, whose denoiser is known


def ve_sigmas(steps, smallest=0.03, largest=15.0):
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return [*(largest ** (1 / 7) + ramp * (smallest ** (1 / 7) - largest ** (1 / 7))).pow(7).tolist(), 0.0]


def flow_sigmas(steps, shift=1.0):
    times = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    return [*(shift * times / (1 + (shift - 1) * times)).tolist(), 0.0]


SPREAD = torch.logspace(-2, 0.5, 256, dtype=torch.float64)
DATA = {"one variance": torch.ones(256, dtype=torch.float64), "many variances": SPREAD, "small": 0.05 + 0 * SPREAD}
SCHEDULES = {
    "25 steps": (ve_sigmas(25), False), "50 steps": (ve_sigmas(50), False), "100 steps": (ve_sigmas(100), False),
    "flow, 25 steps": (flow_sigmas(25), True), "flow, 50 steps": (flow_sigmas(50), True),
    "flow, shifted": (flow_sigmas(50, 3.0), True),
}  # fmt: skip
BUDGETS = (0.003, 0.01, 0.03, 0.1)
every_schedule = pytest.mark.parametrize("sigmas, flow", SCHEDULES.values(), ids=SCHEDULES)
every_data = pytest.mark.parametrize("variance", DATA.values(), ids=DATA)


def denoise(variance, flow, x, sigma):
    """The mean of Gaussian images with these variances given x = image (1 - sigma if flow) + sigma noise."""
    scale = 1 - sigma if flow else 1.0
    return x * scale * variance / (scale**2 * variance + sigma**2)


def noise(variance, sigmas, flow):
    scale = 1 - sigmas[0] if flow else 1.0
    drawn = torch.randn(256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return drawn * (scale**2 * variance + sigmas[0] ** 2).sqrt()


def run_through(plan, predict, x, sigmas):
    """Euler steps under the plan, features kept as in a run: the sample and which steps computed."""
    cache, computed = FeatureCache(plan), []
    for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        plan.begin(step, float(step), sigma, following)
        computed.append(not cache.place(step, ["all"]))
        if computed[-1]:
            denoised = predict(x, sigma)
            if cache.needs(step):
                cache.store("denoised", denoised)
            plan.observe(float(step), denoised)
        else:
            denoised = cache.recall("denoised")
        x = denoised + (x - denoised) * following / sigma
    return x, computed


def budget_run(budget, order, variance, sigmas, flow, **choices):
    """Relative error of the final sample against all steps computed, and which steps computed."""
    predict, x, total = partial(denoise, variance, flow), noise(variance, sigmas, flow), len(sigmas) - 1
    full, _ = run_through(Plan(total, order, set(range(total))), predict, x, sigmas)
    plan = CachePolicy(CacheConfig(order=order), max_error=budget, **choices).plan(total, flow)
    found, computed = run_through(plan, predict, x, sigmas)
    return float((found - full).norm() / full.norm()), computed


@every_schedule
@every_data
@pytest.mark.parametrize("order", [0, 1])
def test_the_error_of_the_sample_stays_within_the_budget(sigmas, flow, variance, order):
    for budget in BUDGETS:
        error, _ = budget_run(budget, order, variance, sigmas, flow)
        assert error <= 1.25 * budget  # the error is estimated


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("order", [0, 1])
def test_the_estimate_is_what_an_exact_solver_makes_of_the_forecast_error(order, flow):
    first, last = torch.randn(2, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    course = [first + 0.01 * last * at ** (order + 1) for at in range(8)]  # a forecast of this order misses it by
    gap = {0: course[6] - course[3], 1: course[6] - (4 * course[3] - 3 * course[2])}[order]
    plan, signal = ErrorBudget(20, order, range(20), 1.0, 4, flow), course[3].square().mean()
    for at in range(4):
        plan.observe(float(at), course[at])
    sigma, following = 0.6, 0.5
    x, fine = noise(signal, [following], flow), [*torch.linspace(following, 0, 4000, dtype=torch.float64).tolist()]
    predict, every = partial(denoise, signal, flow), Plan(3999, 0, set(range(3999)))
    clean, off = (run_through(every, predict, start, fine)[0] for start in (x, x + gap * (1 - following / sigma)))
    scale = x.norm() / (256 * ((1 - following * flow) ** 2 * signal + following**2)).sqrt()  # of this one draw
    expected = float((off - clean).norm() / clean.norm() * scale)
    assert plan.estimate(6.0, sigma, following) == pytest.approx(expected, rel=1e-3)


@every_schedule
@every_data
@pytest.mark.parametrize("order", [0, 1])
def test_smaller_budgets_compute_more(sigmas, flow, variance, order):
    counts = [sum(budget_run(budget, order, variance, sigmas, flow)[1]) for budget in BUDGETS]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


@every_schedule
def test_at_the_same_budget_forecasts_compute_less_than_holding(sigmas, flow):
    held, linear = (sum(budget_run(0.01, order, SPREAD, sigmas, flow)[1]) for order in (0, 1))
    assert linear < held


@given(st.floats(0, 1), st.integers(1, 6), st.integers(0, 1), st.sampled_from(sorted(SCHEDULES)))
@settings(deadline=None, max_examples=40)
def test_an_error_budget_keeps_its_limits(budget, max_reused, order, schedule):
    sigmas, flow = SCHEDULES[schedule]
    _, computed = budget_run(budget, order, SPREAD, sigmas, flow, max_reused=max_reused)
    assert all(computed[:WARM_UP]) and computed[-1]
    runs = "".join("CR"[not step] for step in computed).split("C")
    assert max(map(len, runs)) <= max_reused


@pytest.mark.parametrize("order", [0, 1])
def test_a_denoiser_that_the_forecast_meets_exactly_reuses_up_to_the_limits(order):
    start, slope = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigmas, total = ve_sigmas(40), 40

    def predict(x, sigma):
        return start + order * slope * sigmas.index(sigma)

    plan = CachePolicy(CacheConfig(order=order), max_error=1e-3, max_reused=3).plan(total)
    found, computed = run_through(plan, predict, torch.zeros_like(start), sigmas)
    assert computed == [i < WARM_UP or i == total - 1 or (i - WARM_UP) % 4 == 3 for i in range(total)]
    torch.testing.assert_close(found, start + order * slope * (total - 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("order", [0, 1])
def test_predictions_that_are_not_finite_are_never_reused(value, order):
    plan = CachePolicy(CacheConfig(order=order), max_error=1.0).plan(20)
    _, computed = run_through(plan, lambda x, sigma: torch.full((4,), value), torch.zeros(4), ve_sigmas(20))
    assert all(computed)


def test_a_sample_that_grows_in_mid_run_is_computed_until_its_course_is_known():
    plan, computed = ErrorBudget(20, 1, range(20), 1.0, 4, False), []
    cache = FeatureCache(plan)
    for step, size in enumerate((4, 4, 4, 8, 8, 8, 8)):
        plan.begin(step, float(step), 2.0, 1.0)
        if not cache.place(step, [size]):
            computed.append(step)
            cache.store("denoised", torch.ones(size))
            plan.observe(float(step), torch.ones(size))
    assert computed == [0, 1, 2, 3, 4, 5]


# Divided differences and forecasts

nodes = st.lists(st.integers(-20, 60), min_size=1, max_size=5, unique=True).map(lambda x: [v / 2 for v in sorted(x)])


@given(nodes, seeds)
@settings(deadline=None)
def test_a_divided_difference_is_the_leading_coefficient_of_the_polynomial_through_the_points(at, seed):
    values = torch.randn(len(at), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = divided_difference(list(zip(at, values)))
    for column in range(3):
        expected = Polynomial.fit(at, values[:, column].numpy(), len(at) - 1, domain=[-1, 1]).coef[-1]
        assert float(found[column]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(nodes.filter(lambda at: len(at) > 1), st.floats(30.5, 35), seeds)
@settings(deadline=None)
def test_a_newton_term_is_what_its_oldest_point_adds_to_the_interpolation(at, position, seed):
    values = torch.randn(len(at), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    whole = KroghInterpolator(at, values.numpy())(position)
    without = KroghInterpolator(at[1:], values[1:].numpy())(position)
    found = newton_term(list(zip(at, values)), position).numpy()
    np.testing.assert_allclose(found, whole - without, rtol=1e-6, atol=1e-7 * np.abs(whole).max() + 1e-9)


def filled(entries, order=1, offloaded_from=None):
    """A cache that computed the value at each position and now stands one step after the last."""
    cache = FeatureCache(CacheConfig(1000, order=order), offloaded_from=offloaded_from)
    for position, value in entries:
        cache.place(int(position), ["a"], position)
        cache.store("branch", value)
    cache.place(int(entries[-1][0]) + 1, ["a"], entries[-1][0] + 1)
    return cache


@given(st.lists(st.floats(NEAREST, 5), min_size=2, max_size=6), st.floats(0, 5), seeds)
@settings(deadline=None)
def test_forecasts_continue_the_line_through_the_last_two_positions(gaps, ahead, seed):
    at = np.cumsum(gaps)
    assume(np.diff(at).min() > NEAREST and np.diff(at.astype(int)).min() >= 1)
    values = torch.randn(len(at), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cache = filled(list(zip(at.tolist(), values)))
    cache.place(int(at[-1] + ahead), ["a"], at[-1] + ahead)
    line = interp1d(at[-2:], values[-2:].numpy(), axis=0, fill_value="extrapolate")
    np.testing.assert_allclose(cache.recall("branch").numpy(), line(at[-1] + ahead), rtol=1e-6, atol=1e-9)


@given(st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_of_two_features_of_one_step_the_newer_replaces_the_older(gap):
    assume(4 + gap < 5)
    cache = filled([(0.0, torch.tensor([0.0])), (4.0, torch.tensor([100.0])), (4 + gap, torch.tensor([4 + gap]))])
    assert len(cache.run.features["a", "branch"]) == 2
    assert cache.recall("branch").item() == pytest.approx(5 + gap)  # the line through the first and the last


@pytest.mark.parametrize("order, forecasts", [(0, [False, False]), (1, [False, True])])
def test_a_call_is_a_forecast_once_two_features_are_known(order, forecasts):
    entries = [(float(i), torch.ones(1)) for i in range(2)]
    assert [filled(entries[:count], order).forecasts for count in (1, 2)] == forecasts


def test_a_forecast_of_one_condition_says_nothing_of_another():
    cache = filled([(0.0, torch.ones(1)), (1.0, torch.ones(1))])
    cache.place(2, ["b"])
    cache.store("branch", torch.ones(1))
    cache.place(3, ["b"])
    assert not cache.forecasts
    cache.place(3, ["a", "b"])
    assert cache.forecasts


@given(seeds)
@settings(deadline=None)
def test_features_that_wait_in_main_memory_return_unchanged(seed):
    entries = [(float(i), v) for i, v in enumerate(torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)))]
    home = torch.device("cpu")
    kept, offloaded = filled(entries), filled(entries, offloaded_from=home)
    assert all(t.device.type == "cpu" for history in offloaded.run.features.values() for _, t in history)
    assert offloaded.recall("branch").device == home
    assert torch.equal(offloaded.recall("branch"), kept.recall("branch"))


def test_dropped_features_are_forgotten_and_the_place_in_the_run_stays():
    cache = filled([(0.0, torch.ones(1)), (1.0, torch.ones(1))])
    assert cache.num_bytes and cache.run.reusing
    cache.drop()
    assert cache.num_bytes == 0 and cache.run.step == 2
    assert not cache.place(2, ["a"])


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 5), st.integers(0, 1))
@settings(deadline=None)
def test_a_condition_is_reused_only_if_the_latest_computed_step_evaluated_it(present, interval, order):
    cache = FeatureCache(CacheConfig(interval, order=order))
    latest = {}
    for step, here in enumerate(present):
        for name in ("always", "sometimes") if here else ("always",):
            reuses = step % interval > 0 and latest.get(name, -1) >= step - step % interval
            assert cache.place(step, [name]) == reuses
            if not reuses:
                cache.store("branch", torch.ones(1))
                latest[name] = step


# Times


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=9), st.lists(st.floats(1e-3, 0.4), min_size=1, max_size=9))
@settings(deadline=None)
def test_the_speedup_is_the_time_of_all_calls_computed_over_that_of_the_run(computed, reused):
    times, clock = CallTimes(), 100.0
    for seconds, kind in [(s, False) for s in computed] + [(s, True) for s in reused]:
        times.add(clock, clock + seconds, kind)
        clock += seconds
    calls, whole = len(computed + reused), sum(computed + reused)
    assert min(computed) * calls / whole * 0.99 <= times.speedup() <= max(computed) * calls / whole * 1.01
    assert times.seconds(True) == pytest.approx(reused)


def test_one_slow_first_call_does_not_count_as_what_computing_costs():
    times = CallTimes()
    for seconds, reused in ((50.0, False), (2.0, False), (1.0, False), (0.0, True), (0.0, True), (0.0, True)):
        times.add(0.0, seconds, reused)
    assert times.speedup() == pytest.approx(2 * 6 / 53)


@pytest.mark.parametrize("kind", [False, True])
def test_there_is_no_speedup_before_both_kinds_of_call_were_seen(kind):
    times = CallTimes()
    assert times.speedup() is None
    times.add(0.0, 1.0, kind)
    assert times.speedup() is None


def test_marks_on_the_cpu_are_seconds():
    times, cpu = CallTimes(), torch.device("cpu")
    begun = times.mark(cpu)
    times.add(begun, times.mark(cpu), False)
    assert 0 <= times.seconds(False)[0] < 60


def test_calls_on_a_device_without_a_clock_stay_unknown():
    times, device = CallTimes(), torch.device("meta")
    for reused in (False, True):
        times.add(times.mark(device), times.mark(device), reused)
    assert not times.known and times.speedup() is None
