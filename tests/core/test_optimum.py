"""Planned steps against every subset of steps, priced with predictions instead of their distances."""

from itertools import combinations
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qandc_core import DiT, apply_cache_to_dit, fuse_dit, generate
from qandc_core.caching.forecast import CURVATURE, coefficients, forecast_rows
from qandc_core.caching.optimum import LONGEST, lengths_of, missed, optimal_schedule, squared_norm
from qandc_core.caching.policies import Speedup, StepCount
from qandc_core.caching.presets import Preset
from qandc_core.caching.runs import StepDistances
from qandc_core.calibration.distances import prediction_distances
from qandc_core.models.dit import DiTConfig

NARROW = DiTConfig(
    patch_size=8, hidden_size=160, depth=6, num_heads=5, in_channels=3, num_classes=10, learn_sigma=False
)

seeds, orders = st.integers(0, 2**31), st.integers(1, 2)


def trajectory(total, seed):
    """Predictions (T, V) that drift, and by what their errors are divided (T,)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(total, 5, generator=generator, dtype=torch.float64).cumsum(dim=0)
    return values, torch.rand(total, generator=generator, dtype=torch.float64) + 0.2


def distances_of(values, lengths):
    return torch.cdist(values, values) / lengths


def forecast_error(values, lengths, steps, order):
    """What the reused steps miss in sum, each forecast from the predictions of the latest computed ones."""
    missing = 0.0
    for step in sorted(set(range(len(values))) - set(steps)):
        known = [earlier for earlier in sorted(steps) if earlier < step][-1 - order :]
        forecast = sum(weight * values[at] for weight, at in zip(coefficients(known, step), known))
        missing += float((values[step] - forecast).norm() / lengths[step])
    return missing


@given(st.integers(1, 8), st.data(), orders, seeds)
@settings(deadline=None, max_examples=80)
def test_the_plan_is_the_best_of_all_subsets_for_the_forecast_that_is_executed(total, data, order, seed):
    count = data.draw(st.integers(1, total))
    forced = data.draw(st.none() | st.sets(st.integers(0, total - 1), max_size=count - 1))
    values, lengths = trajectory(total, seed)
    steps = optimal_schedule(distances_of(values, lengths), count, order=order, forced=forced)
    must = {0} | (forced if forced is not None else {total - 1} if count > 1 else set())
    if count > 1:
        assert must <= set(steps)
    assert steps[0] == 0 and len(steps) == count and list(steps) == sorted(set(steps))
    choices = ((0, *rest) for rest in combinations(range(1, total), count - 1))
    allowed = [choice for choice in choices if must <= set(choice) or count == 1]
    best = min(forecast_error(values, lengths, choice, order) for choice in allowed)
    assert forecast_error(values, lengths, steps, order) == pytest.approx(best, abs=1e-9)


@given(st.integers(2, 9), orders, seeds)
@settings(deadline=None, max_examples=60)
def test_distances_alone_give_the_norm_of_what_a_forecast_misses(total, order, seed):
    values, _ = trajectory(total + 3, seed)
    squares = torch.cdist(values, values).square()
    known, at = [torch.tensor(step) for step in (0, 1, 2)][-1 - order :], torch.arange(3, total + 3)
    found = squared_norm(missed(known, at), squares)
    for step, square in zip(at.tolist(), found):
        weights = coefficients([int(step) for step in known], step)
        direct = values[step] - sum(weight * values[int(place)] for weight, place in zip(weights, known))
        assert float(square) == pytest.approx(float(direct.square().sum()), rel=1e-9)


@given(st.integers(2, 9), seeds)
@settings(deadline=None, max_examples=40)
def test_a_full_matrix_says_by_what_its_columns_were_divided(total, seed):
    values, lengths = trajectory(total, seed)
    found = lengths_of(distances_of(values, lengths))
    torch.testing.assert_close(found / found[0], lengths / lengths[0], rtol=1e-9, atol=0)


def test_saved_distances_are_full_and_older_triangular_ones_are_measured_by_the_noise_levels():
    values, _ = trajectory(8, 3)
    values = values / values.norm(dim=1, keepdim=True)  # equally long, as older files have to be taken
    sigmas = torch.linspace(9, 0, 9)
    full = prediction_distances(values, sigmas)
    known = StepDistances(full.triu(1), tuple(sigmas.tolist()))
    for order in (1, 2):
        expected = optimal_schedule(full, 4, order=order)
        assert optimal_schedule(known.values, 4, order=order, lengths=known.lengths) == expected
    assert StepDistances(full, tuple(sigmas.tolist())).lengths is None
    assert StepDistances(full.triu(1)).lengths is None


def test_order_zero_prices_holding_as_before():
    position = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 9.0, 9.2, 9.3])
    distances = (position[None] - position[:, None]).abs()
    assert optimal_schedule(distances, 3) == (0, 3, 5)


def test_runs_too_long_for_an_order_are_placed_by_the_next_lower_one():
    values, lengths = trajectory(LONGEST[2] + 5, 1)
    distances = distances_of(values, lengths)
    assert optimal_schedule(distances, 9, order=2) == optimal_schedule(distances, 9, order=1)


def test_more_forced_steps_than_computed_ones_are_refused():
    with pytest.raises(ValueError, match="must be 4 or more, as many as have to compute, got 3"):
        optimal_schedule(torch.ones(8, 8), 3, order=1, forced={2, 4, 7})


@given(st.integers(3, 12), st.integers(2, 12), orders, seeds, st.sampled_from([(0.0, 1.0), (0.25, 1.0), (0.0, 0.7)]))
@settings(deadline=None, max_examples=60)
def test_calibrated_policies_place_steps_for_their_own_order(total, count, order, seed, part):
    values, lengths = trajectory(total, seed)
    distances = distances_of(values, lengths)
    policy = StepCount(count, order=order, start=part[0], end=part[1], distances=StepDistances(distances))
    inside = policy.inside(total)
    outside = set(range(total)) - set(inside)
    steps = policy.plan(total).steps
    wanted = min(max(count - len(outside), 1), len(inside)) + len(outside) if inside else total
    assert outside <= steps and len(steps) >= min(wanted, total)
    if part == (0.0, 1.0) and count <= total:
        assert steps == set(optimal_schedule(distances, count, order=order))
    assert 0 in steps and (total - 1 in steps or wanted - len(outside) <= 1)


def test_a_speedup_that_holds_because_the_sampler_adds_noise_is_planned_for_holding():
    values, lengths = trajectory(12, 4)
    distances = distances_of(values, lengths)
    plan = Speedup(3.0, order=1, distances=StepDistances(distances)).plan(12, noisy=True)
    assert plan.steps == set(optimal_schedule(distances, 4))


@given(st.lists(st.booleans(), min_size=3, max_size=12))
@settings(deadline=None)
def test_a_forecast_is_exact_for_lines_and_takes_its_share_of_a_parabola(computed):
    computed = [True, *computed]
    kept = [step for step, computes in enumerate(computed) if computes]
    for step, row in enumerate(forecast_rows(computed, 2)):
        assert sum(row) == pytest.approx(1)
        known = [earlier for earlier in kept if earlier < step][-3:]
        if computed[step] or len(known) < 2:
            continue
        at = [*reversed(known), 0, 0][:3]
        assert sum(weight * (3 * place - 1) for weight, place in zip(row, at)) == pytest.approx(3 * step - 1)
        if len(known) == 3:
            line = sum(weight * place**2 for weight, place in zip(forecast_rows(computed, 1)[step], at))
            parabola = sum(weight * place**2 for weight, place in zip(row, at))
            assert parabola - line == pytest.approx(CURVATURE * (step**2 - line))


# Presets


@pytest.mark.parametrize(
    "sampler, least",
    [("euler", 5), ("dpmpp_2m", 7), ("unipc", 13), ("heun", 15), ("deis", 20), ("x", 20), ("dpm_fast", 10**9)],
)
@pytest.mark.parametrize("total", [4, 8, 12, 20, 30, 50])
@pytest.mark.parametrize("level, speedup", [("safe", 1.5), ("balanced", 2), ("auto", 2), ("fast", 3)])
def test_presets_compute_more_where_fewer_steps_are_as_good(sampler, least, total, level, speedup):
    known = f"{sampler}_function" if sampler == "dpm_fast" else sampler
    plan = Preset(level=level).plan(total, sampler=known, noisy=False, guided=True)
    count = max(int(total / speedup), least, ceil(total / 2) if sampler == "deis" else 0)
    if total < 1.25 * count:
        assert plan.steps == set(range(total))
        name = sampler.replace("unipc", "uni_pc")
        assert plan.review(plan.steps) == [
            f"{total} steps of {name}: nothing to gain; use {int(total / speedup)} steps"
        ]
    else:
        assert len(plan.steps) == count and {0, total - 1} <= plan.steps
        told = plan.review(plan.steps)
        assert bool(told) == (total / count < 0.95 * speedup)
        assert all("no better than fewer steps" in text for text in told)


@pytest.mark.parametrize("name", ["ipndm", "ipndm_v", "ipndm_cfg_pp"])
def test_presets_stay_within_what_a_sampler_of_high_order_bears(name):
    """20 of 50 steps were worse than 20 steps."""
    assert len(Preset(level="fast").plan(50, sampler=name, noisy=False, guided=True).steps) == 25


@pytest.mark.parametrize("total, two, three", [(8, 6, 8), (12, 8, 12), (20, 14, 13), (30, 20, 13), (50, 34, 16)])
def test_presets_compute_more_where_several_predictions_meet_noise(total, two, three):
    counts = {
        name: len(Preset(level="fast").plan(total, sampler=name, noisy=True, guided=True).steps)
        for name in ("dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu")
    }
    assert list(counts.values()) == [two, two, two, three, three]


@pytest.mark.parametrize(
    "sampler, noisy, pays",
    [
        ("euler_cfg_pp", False, True),
        ("euler_ancestral_cfg_pp", True, True),
        ("dpmpp_2m_cfg_pp", False, False),
        ("dpmpp_2s_ancestral_cfg_pp", True, False),
        ("res_multistep_ancestral_cfg_pp", True, False),
    ],
)
def test_presets_leave_cfg_plus_plus_alone_on_flow_models_where_it_does_not_converge(sampler, noisy, pays):
    facts = {"sampler": sampler, "noisy": noisy, "guided": True}
    assert len(Preset().plan(30, flow=False, **facts).steps) == 15
    plan = Preset().plan(30, flow=True, **facts)
    assert len(plan.steps) == (15 if pays else 30)
    assert (plan.review(plan.steps) == [f"30 steps of {sampler}: nothing to gain; use 15 steps"]) == (not pays)


def test_presets_forecast_by_what_the_sampler_and_the_steps_allow():
    assert Preset(level="fast").plan(20, sampler="euler", noisy=False).order == 1
    assert Preset(level="balanced").plan(50, sampler="ddpm", noisy=True).order == 0


def test_auto_leaves_distilled_models_alone_and_the_others_do_as_they_are_told():
    plan = Preset().plan(8, sampler="euler", noisy=False, guided=False)
    assert plan.steps == set(range(8)) and plan.review(plan.steps) == [
        "8 steps without guidance: taken for a distilled model, nothing is reused"
    ]
    assert len(Preset(level="safe").plan(8, sampler="euler", noisy=False, guided=False).steps) == 5
    assert len(Preset().plan(30, sampler="euler", noisy=False, guided=False).steps) == 15


def test_presets_take_a_calibration_of_their_run():
    values, lengths = trajectory(20, 5)
    distances = StepDistances(distances_of(values, lengths))
    plan = Preset(level="safe", distances=distances).plan(20, sampler="euler", noisy=False)
    assert plan.order == 2 and plan.steps == set(optimal_schedule(distances.values, 13, order=2))
    assert Preset(level="safe", distances=distances).detail() != Preset(level="safe").detail()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("reuse", ["branch", "prediction"])
def test_presets_run_in_every_loop_of_the_engine(fused, reuse):
    if reuse == "prediction" and not fused:
        pytest.skip("only a FusedDiT reuses predictions")
    model = DiT(NARROW).eval()
    cached = apply_cache_to_dit(fuse_dit(model) if fused else model, Preset("fast"), reuse=reuse)
    dear = reuse == "branch"  # a reused step of so narrow a model costs something, so one more is reused
    for sampler, steps, computed in (("ddim", 21, 7 - dear), ("ddpm", 9, 4), ("ddim", 5, 5)):
        found, report = generate(cached, [3], steps, 1.5, sampler, seed=1)
        assert sum(report.computed) == computed and bool(found.isfinite().all())


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="level must be one of auto, safe, balanced, fast, got 'quick'"):
        Preset(level="quick")
