"""What decides which steps compute: spacings, plans of every policy, forecasts; and the times that are reported."""

import statistics
import time
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.polynomial import Polynomial
from scipy.interpolate import KroghInterpolator, interp1d

import qandc_core
from qandc_core.caching.attach import PolicyConfig, feature_cache
from qandc_core.caching.cost import reuse_cost
from qandc_core.caching.features import NEAREST, FeatureCache
from qandc_core.caching.plans import (
    FEW_STEPS,
    KEPT,
    WARM_UP,
    BudgetPlan,
    Plan,
    divided_difference,
    few_steps,
    newton_term,
)
from qandc_core.caching.policies import (
    ChosenSteps,
    ErrorBudget,
    Interval,
    Speedup,
    StepCount,
)
from qandc_core.caching.runs import TOLERANCE, StepDistances
from qandc_core.caching.schedule import CacheConfig, affordable, optimal_schedule, spaced_steps, spread
from qandc_core.sampling.clock import CallTimes, mark

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


def test_the_exponent_of_the_default_spacing():
    """(49 (k / 19)^0.7) rounded, as shipped: saved compensations were fitted on these steps."""
    assert spaced_steps(50, 20) == (0, 6, 10, 13, 16, 19, 22, 24, 27, 29, 31, 33, 36, 38, 40, 42, 43, 45, 47, 49)
    share = [step / 99999 for step in spaced_steps(100000, 101)]
    exponents = [np.log(share[k]) / np.log(k / 100) for k in range(1, 100)]
    np.testing.assert_allclose(exponents, 0.7, atol=1e-3)


def cost_of_holding(steps, distances):
    """What the reused steps err by, each reading the latest computed one before it."""
    return sum(float(distances[max(s for s in steps if s <= j), j]) for j in range(len(distances)) if j not in steps)


@given(st.integers(1, 9), st.integers(1, 10), parts, seeds)
@settings(deadline=None, max_examples=60)
def test_the_placed_steps_are_the_best_of_all_choices_within_their_part(total, computed, part, seed):
    """Against every subset: the part begins with a computed step, and outside it all compute."""
    distances = random_distances(total, seed)
    within = [step for step in range(total) if inside(step, total, *part)]
    steps = spread(total, computed, range(within[0], within[-1] + 1) if within else range(0), distances)
    outside = set(range(total)) - set(within)
    assert outside <= steps
    if not within:
        return
    count = len(steps) - len(outside)
    choices = ({within[0], *rest} for rest in combinations(within[1:], count - 1))
    best = min(cost_of_holding(outside | choice, distances) for choice in choices)
    assert cost_of_holding(steps, distances) == pytest.approx(best)


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
    policy = ChosenSteps(when) if isinstance(when, frozenset) else Interval(when)
    plan = replace(policy, start=part[0], end=part[1]).plan(total)
    for step in range(1, total):
        chosen = step in when if isinstance(when, frozenset) else step % when == 0
        assert plan.computes(step) == (not inside(step, total, *part) or chosen)


policies = st.one_of(
    st.builds(Interval, st.integers(1, 9), order=st.integers(0, 1)),
    st.builds(ChosenSteps, st.frozensets(st.integers(0, 59))),
    st.builds(StepCount, st.integers(1, 80), order=st.integers(0, 1)),
    st.builds(Speedup, st.floats(1, 20)),
    st.builds(ErrorBudget, st.floats(0, 1), st.integers(1, 6)),
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
    found = computed_by(StepCount(computed, start=part[0], end=part[1]).plan(total))
    outside = {step for step in range(total) if not inside(step, total, *part)}
    assert outside <= found
    assert len(found) == min(max(computed, len(outside) + 1), total)  # at least one inside, where features begin


def test_the_number_of_steps_of_a_whole_run_is_the_default_spacing():
    assert computed_by(StepCount(20).plan(50)) == set(spaced_steps(50, 20))


def random_distances(total, seed):
    return torch.rand(total, total, generator=torch.Generator().manual_seed(seed)).triu(1)


@given(st.integers(1, 20), st.integers(1, 25), seeds)
@settings(deadline=None)
def test_with_distances_the_number_of_steps_lies_at_the_optimum(total, computed, seed):
    distances = random_distances(total, seed)
    plan = StepCount(computed, distances=StepDistances(distances)).plan(total)
    assert computed_by(plan) == set(optimal_schedule(distances, min(computed, total)))
    assert not plan.warnings


@given(st.integers(1, 20), st.integers(1, 25), parts, seeds)
@settings(deadline=None)
def test_distances_change_which_steps_compute_and_not_how_many(total, computed, part, seed):
    policy = StepCount(computed, start=part[0], end=part[1])
    calibrated = replace(policy, distances=StepDistances(random_distances(total, seed))).plan(total)
    assert len(computed_by(calibrated)) == len(computed_by(policy.plan(total)))
    assert all(calibrated.computes(step) for step in range(total) if not inside(step, total, *part))


@pytest.mark.parametrize("policy", [StepCount(8), Speedup(3.75)])
def test_distances_of_another_number_of_steps_fall_back_to_the_spacing_with_a_warning(policy):
    plan = replace(policy, distances=StepDistances(random_distances(50, 0))).plan(30)
    assert computed_by(plan) == set(spaced_steps(30, 8))
    assert plan.warnings == [
        "the calibration does not place the steps because it was made for 50 steps and this run has 30; default spacing"
    ]


SIGMAS = [float(sigma) for sigma in np.geomspace(14.6, 0.03, 20)] + [0.0]
OTHER_RUNS = {
    "denoise": dict(sigmas=[sigma * 0.05 for sigma in SIGMAS]),
    "a shift": dict(sigmas=[3 * sigma / (1 + 2 * sigma / SIGMAS[0]) for sigma in SIGMAS]),
    "another spacing": dict(sigmas=[*np.linspace(SIGMAS[0], SIGMAS[-2], 20).tolist(), 0.0]),
    "a run that ends early": dict(sigmas=[*SIGMAS[:-1], SIGMAS[-2] / 2]),
    "one step elsewhere": dict(sigmas=[*SIGMAS[:7], SIGMAS[7] * (1 + 2 * TOLERANCE), *SIGMAS[8:]]),
    "a noisy sampler": dict(sigmas=SIGMAS, noisy=True),
}


@pytest.mark.parametrize("policy", [StepCount(8), Speedup(2.5)])
@pytest.mark.parametrize("run", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_distances_of_another_run_fall_back_to_the_spacing_with_a_warning(policy, run):
    known = StepDistances(random_distances(20, 3), tuple(SIGMAS), False)
    plan = replace(policy, distances=known).plan(20, **{"noisy": False, **run})
    assert computed_by(plan) == set(spaced_steps(20, 8)) and len(plan.warnings) == 1
    assert plan.warnings[0].startswith("the calibration does not place the steps because it was made ")
    assert plan.warnings[0].endswith("; default spacing")


@pytest.mark.parametrize("policy", [StepCount(8), Speedup(2.5)])
@pytest.mark.parametrize(
    "run", [dict(sigmas=SIGMAS, noisy=False), dict(sigmas=[s * (1 + TOLERANCE / 2) for s in SIGMAS]), {}]
)
def test_distances_of_this_run_place_its_steps(policy, run):
    distances = random_distances(20, 3)
    plan = replace(policy, distances=StepDistances(distances, tuple(SIGMAS), False)).plan(20, **run)
    assert computed_by(plan) == set(optimal_schedule(distances, 8)) and not plan.warnings


@pytest.mark.parametrize("policy", [Interval, ChosenSteps, ErrorBudget])
def test_policies_that_place_no_steps_take_no_distances(policy):
    with pytest.raises(TypeError, match="distances"):
        policy(1, distances=StepDistances(random_distances(20, 3)))


@pytest.mark.parametrize("policy", [Interval(1), Speedup(1.0), ErrorBudget(0.0)], ids=lambda policy: policy.describe())
def test_policies_that_reuse_nothing_are_off(policy):
    assert policy.off


@given(policies)
@settings(deadline=None)
def test_policies_that_reuse_something_are_on(policy):
    nothing = {Interval: "interval", Speedup: "speedup", ErrorBudget: "max_error"}.get(type(policy))
    assert policy.off == (nothing is not None and getattr(policy, nothing) == (0 if nothing == "max_error" else 1))


@pytest.mark.parametrize(
    ("policy", "values", "said"),
    [
        (Interval, (0,), "interval must be 1 or more, got 0"),
        (StepCount, (0,), "computed must be 1 or more, got 0"),
        (Speedup, (0.9,), "speedup must be 1 or more, got 0.9"),
        (Speedup, (float("nan"),), "speedup must be 1 or more, got nan"),
        (Speedup, (float("inf"),), "speedup must be 1 or more, got inf"),
        (ErrorBudget, (-0.1,), "max_error must be 0 or more, got -0.1"),
        (ErrorBudget, (0.1, -1), "max_reused must be 0 or more, got -1"),
        (ChosenSteps, ([3, -2],), "Steps are counted from 0, got -2"),
    ],
)
def test_nonsense_is_refused_before_a_run(policy, values, said):
    with pytest.raises(ValueError, match=said):
        policy(*values)


@pytest.mark.parametrize("wrong", [dict(start=-0.1), dict(end=1.5), dict(start=float("nan")), dict(order=3)])
def test_a_part_outside_the_run_and_an_unknown_order_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Interval(3, **wrong)


# Saved compensations name what they were fitted for by these texts.
DETAILS = {
    Interval(3, order=1): "3 None branch 1 None 0.0 1.0",
    ChosenSteps((4, 0, 2), order=1): "1 [0, 2, 4] branch 1 None 0.0 1.0",
    StepCount(20, start=0.25): "1 None branch 0 20 0.25 1.0",
    StepCount(2, distances=StepDistances(torch.tensor([[0.0, 1.5], [0.0, 0.0]]))): "1 None branch 0 2 0.0 1.0"
    " optimum 1.5",
    Speedup(2.0, order=1): "1 None branch 1 None 0.0 1.0 2.0 None 4",
    ErrorBudget(0.02, 3, order=1, end=0.5): "1 None branch 1 None 0.0 0.5 None 0.02 3",
}


@pytest.mark.parametrize("policy", DETAILS, ids=lambda policy: policy.describe())
def test_the_detail_of_a_policy_is_as_in_saved_compensations(policy):
    assert policy.detail() == DETAILS[policy]


def test_only_an_error_budget_is_not_decided_before_the_run():
    assert not ErrorBudget(0.1).decided_before
    assert all(policy.decided_before for policy in (Interval(3), ChosenSteps({1}), StepCount(5), Speedup(2.0)))


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


def counted(plan, cost):
    """The cost of the plan's steps against that of all steps."""
    computed = len(computed_by(plan))
    return plan.total / (computed + (plan.total - computed) * cost)


@given(st.integers(1, 80), st.floats(1, 12), st.floats(0, 1), parts)
@settings(deadline=None)
def test_a_speedup_is_kept_by_what_is_counted_or_the_rest_is_said(total, speedup, cost, part):
    plan = Speedup(speedup, start=part[0], end=part[1]).plan(total, cost=cost)
    left = counted(plan, cost)
    short = left < KEPT * speedup
    said = [text for text in plan.review(computed_by(plan)) if "x requested" in text]
    if short and len(computed_by(plan)) < total and left > 1:
        assert len(said) == 1 and said[0].startswith(f"{speedup:g}x requested, {left:.2g}x possible")
    else:
        assert not said


@given(st.integers(2, 80), st.floats(1.01, 10), st.floats(0, 0.4), st.integers(0, 1))
@settings(deadline=None)
def test_a_speedup_computes_as_many_steps_as_it_affords(total, speedup, cost, order):
    assume(cost < 1 / speedup)
    plan = Speedup(speedup, order=order).plan(total, cost=cost)
    free = affordable(total, speedup, 0.0)
    enough = total / (free + (total - free) * cost) >= KEPT * speedup
    assert len(computed_by(plan)) == (free if enough else affordable(total, speedup, cost))


@given(st.integers(1, 80), st.floats(1, 12), st.floats(0, 1), parts, st.lists(st.floats(1e-9, 1e3), max_size=4))
@settings(deadline=None)
def test_what_is_reused_may_be_known_late_and_gives_the_same_plan(total, speedup, cost, part, before):
    policy = Speedup(speedup, start=part[0], end=part[1])
    plan = policy.plan(total)
    for other in (*before, cost):
        plan.charge(other)
    assert computed_by(plan) == computed_by(policy.plan(total, cost=cost))


@pytest.mark.parametrize("policy", [Interval(3), StepCount(7), Speedup(2.0), ChosenSteps({3, 9}), ErrorBudget(0.05)])
def test_no_clock_decides_a_step(policy, monkeypatch):
    """Every clock raises while plans are made and followed."""
    for name in ("time", "perf_counter", "monotonic", "process_time", "perf_counter_ns", "time_ns", "monotonic_ns"):
        monkeypatch.setattr(time, name, None)
    plans = [replace(policy, order=1).plan(20, cost=0.1) for _ in range(2)]
    runs = [run_through(plan, partial(denoise, SPREAD, False), torch.ones(256), ve_sigmas(20))[1] for plan in plans]
    assert runs[0] == runs[1] and not all(runs[0])


PROMISES = {
    "within its part": (Speedup(2.0, start=0.4, end=0.6), 30, 0.0, "2x requested, 1.2x possible from 0.4 to 0.6"),
    "dear": (Speedup(2.0), 50, 0.6, "2x requested, 1.2x possible: a reused step costs 60 % of a computed one"),
    "few steps": (Speedup(20.0), 10, 0.0, "20x requested, 10x possible with 10 steps"),
    "count": (StepCount(15, start=0.4, end=0.6), 30, 0.0,
              "15 computed steps requested, at least 25 are needed from 0.4 to 0.6"),
    "past the end": (ChosenSteps({0, 4, 30, 31}), 12, 0.0, "chosen steps from 30 on lie past the last step, 11"),
    "nothing between": (Interval(3, start=0.6, end=0.4), 30, 0.0, "no step of 30 lies in the part from 0.6 to 0.4"),
}  # fmt: skip


@pytest.mark.parametrize(("policy", "total", "cost", "said"), PROMISES.values(), ids=PROMISES)
def test_a_promise_that_cannot_be_met_says_what_is_left(policy, total, cost, said):
    plan = policy.plan(total, cost=cost)
    assert plan.review(computed_by(plan)) == [said]


def test_a_run_that_computed_more_than_planned_says_what_was_reached():
    plan = Speedup(2.0).plan(50)
    assert plan.review(range(25)) == [] == plan.review(range(26))
    assert plan.review(range(40)) == ["2x requested, 1.2x reached: 40 of 50 steps were computed"]
    assert StepCount(20).plan(50).review(range(30)) == ["20 computed steps requested, 30 were computed"]


def euler(sigmas, predict, x):
    for sigma, following in zip(sigmas, sigmas[1:]):
        denoised = predict(x, sigma)
        x = denoised + (x - denoised) * following / sigma
    return x


@pytest.mark.parametrize("order", [0, 1])
def test_four_steps_at_twice_the_speed_are_a_run_of_two(order):
    """What the warning says: the same sample as of Euler over the two computed noise levels."""
    sigmas, predict = ve_sigmas(4), partial(denoise, SPREAD, False)
    plan = Speedup(2.0, order=order).plan(4)
    x, computed = run_through(plan, predict, noise(SPREAD, sigmas, False), sigmas)
    fewer = [sigma for sigma, done in zip(sigmas, computed) if done] + [0.0]
    torch.testing.assert_close(x, euler(fewer, predict, noise(SPREAD, sigmas, False)))
    assert plan.review(computed_by(plan)) == ["4 steps with 2 computed are no better than a run of 2"]


@given(st.integers(1, 40), st.sets(st.integers(0, 39)), st.integers(0, 1), st.booleans())
@settings(deadline=None)
def test_few_steps_are_told_where_something_was_reused(total, computed, order, noisy):
    computed = {step for step in computed if step < total} | {0}
    said = few_steps(total, computed, order, noisy)
    assert bool(said) == (len(computed) < total <= (FEW_STEPS // 2 if noisy else FEW_STEPS))


# What a reused step costs


def test_the_cost_of_a_reused_step_is_the_share_of_the_matmuls_over_tokens_that_run():
    model = qandc_core.load_dit("demo")
    config, patch = model.config, model.config.patch_size**2
    around = config.hidden_size * patch * (config.in_channels + config.out_channels)
    blocks = config.depth * config.hidden_size**2 * (4 + 2 * config.mlp_ratio)
    expected = around / (around + blocks)
    assert reuse_cost(model, model.blocks) == pytest.approx(expected)
    for reuse in ("branch", "block"):
        cached = qandc_core.apply_cache_to_dit(model, Speedup(2.0), reuse=reuse)
        assert feature_cache(cached).cost == pytest.approx(expected)
        assert qandc_core.fuse_dit(qandc_core.load_dit("demo")).reuse_cost(reuse) == pytest.approx(expected)


def test_a_network_without_matmuls_saves_nothing():
    assert reuse_cost(torch.nn.Sequential(torch.nn.LayerNorm(4)), []) == 1.0


def test_convolutions_count_and_embeddings_do_not():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 2), torch.nn.Embedding(50, 8), torch.nn.Linear(8, 12))
    assert reuse_cost(network, [network[2]]) == pytest.approx(96 / (96 + 96))


# One policy for every host

HOSTED = [Interval(3, start=0.2), ChosenSteps({0, 3, 7}), StepCount(5), Speedup(2.0)]


@pytest.mark.parametrize("policy", HOSTED, ids=lambda policy: policy.describe())
def test_our_loop_and_the_fused_loop_compute_the_steps_of_the_policy(policy):
    plan = policy.plan(12)
    model = qandc_core.apply_cache_to_dit(qandc_core.load_dit("demo"), policy)
    fused = qandc_core.fuse_dit(qandc_core.load_dit("demo"))
    qandc_core.apply_cache_to_dit(fused, replace(policy, order=1), reuse="prediction")
    for each in (model, fused):
        _, report = qandc_core.generate(each, [1], 12, 1.0, "ddim")
        assert {step for step, done in enumerate(report.computed) if done} == computed_by(plan)


def test_our_loop_follows_an_error_budget_and_the_fused_loop_refuses_it():
    counts = []
    for budget in (0.0001, 0.05, 1.0):
        model = qandc_core.apply_cache_to_dit(qandc_core.load_dit("demo"), ErrorBudget(budget))
        reports = [qandc_core.generate(model, [1], 12, 1.0, "ddim")[1] for _ in range(2)]
        assert reports[0].computed == reports[1].computed
        counts.append(sum(reports[0].computed))
    assert counts[0] == 12 > counts[1] > counts[2]
    fused = qandc_core.fuse_dit(qandc_core.load_dit("demo"))
    qandc_core.apply_cache_to_dit(fused, ErrorBudget(0.05), reuse="prediction")
    with pytest.raises(ValueError, match="decides each step during the run"):
        qandc_core.generate(fused, [1], 12, 1.0, "ddim")


def test_a_loop_of_ones_own_gives_the_number_of_steps():
    model = qandc_core.load_dit("demo")
    x, labels = torch.zeros(1, 3, 32, 32), torch.tensor([1])
    qandc_core.apply_cache_to_dit(model, Speedup(2.0))
    with torch.inference_mode(), pytest.raises(ValueError, match="needs the number of steps"):
        model(x, torch.tensor([999]), labels)
    qandc_core.apply_cache_to_dit(model, Speedup(2.0), num_steps=8)
    with torch.inference_mode():
        for timestep in range(8, 0, -1):
            model(x, torch.tensor([timestep]), labels)
    expected = [Speedup(2.0).plan(8).computes(step) for step in range(8)]
    assert feature_cache(model).run.computed == expected


@pytest.mark.parametrize("contradiction", [dict(steps=[0, 2]), dict(order=1)])
def test_a_policy_and_another_choice_of_steps_are_refused(contradiction):
    with pytest.raises(ValueError, match="A policy holds steps and order itself"):
        qandc_core.apply_cache_to_dit(qandc_core.load_dit("demo"), Speedup(2.0), **contradiction)


def test_an_interval_is_the_same_as_a_policy_and_as_a_number():
    images = []
    for cache in ({"cache_interval": 3}, {"cache_interval": Interval(3)}):
        model = qandc_core.apply_cache_to_dit(qandc_core.load_dit("demo"), **cache)
        images.append(qandc_core.generate(model, [1], 8, 1.0, "ddim")[0])
    assert torch.equal(*images)
    assert PolicyConfig(Interval(3)).for_run(10).steps == {0, 3, 6, 9}


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
    plan = ErrorBudget(budget, order=order, **choices).plan(total, flow)
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
    plan, signal = BudgetPlan(20, order, range(20), 1.0, 4, flow), course[3].square().mean()
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

    plan = ErrorBudget(1e-3, 3, order=order).plan(total)
    found, computed = run_through(plan, predict, torch.zeros_like(start), sigmas)
    assert computed == [i < WARM_UP or i == total - 1 or (i - WARM_UP) % 4 == 3 for i in range(total)]
    torch.testing.assert_close(found, start + order * slope * (total - 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("order", [0, 1])
def test_predictions_that_are_not_finite_are_never_reused(value, order):
    plan = ErrorBudget(1.0, order=order).plan(20)
    _, computed = run_through(plan, lambda x, sigma: torch.full((4,), value), torch.zeros(4), ve_sigmas(20))
    assert all(computed)


def test_a_sample_that_grows_in_mid_run_is_computed_until_its_course_is_known():
    plan, computed = BudgetPlan(20, 1, range(20), 1.0, 4, False), []
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
    calls, each, cheap = len(computed + reused), statistics.median(computed), statistics.median(reused)
    assert times.speedup() == pytest.approx(calls * each / (len(computed) * each + len(reused) * cheap))
    assert 1 < times.speedup() <= calls / len(computed)
    assert times.seconds(True) == pytest.approx(reused)


@pytest.mark.parametrize("slow", [False, True])
def test_one_slow_call_does_not_count_as_what_calls_of_its_kind_cost(slow):
    """The first of either kind pays for what is set up once, and any may be disturbed."""
    times = CallTimes()
    for kind, seconds in ((False, 2.0), (True, 0.5)):
        for i in range(3):
            times.add(0.0, 50.0 if kind is slow and not i else seconds, kind)
    assert times.speedup() == pytest.approx(6 * 2.0 / (3 * 2.0 + 3 * 0.5))


@pytest.mark.parametrize("kind", [False, True])
def test_there_is_no_speedup_before_both_kinds_of_call_were_seen(kind):
    times = CallTimes()
    assert times.speedup() is None
    times.add(0.0, 1.0, kind)
    assert times.speedup() is None


def test_marks_on_the_cpu_are_seconds():
    times, cpu = CallTimes(), torch.device("cpu")
    begun = mark(cpu)
    times.add(begun, mark(cpu), False)
    assert 0 <= times.seconds(False)[0] < 60


def test_calls_on_a_device_without_a_clock_stay_unknown():
    times, device = CallTimes(), torch.device("meta")
    for reused in (False, True):
        times.add(mark(device), mark(device), reused)
    assert not times.known and times.speedup() is None
