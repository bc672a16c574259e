import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qandc_core import CalibrationConfig, DiT, DiTConfig, DiTTrajectories, SamplingConfig, calibrate, generate
from qandc_core.caching.attach import feature_cache
from qandc_core.compensation.factors import METHODS as VC_METHODS
from qandc_core.diffusion.noise import image_seed
from qandc_core.evaluation import experiment
from qandc_core.evaluation.variants import (
    CALIBRATION_SEED,
    FIT_SEED,
    Variant,
    Workbench,
    balanced_labels,
)
from qandc_core.quantization.model import quantized_layers

CONFIG = DiTConfig(
    input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=False
)  # fmt: skip
STEPS, TOKENS, TRAJECTORIES = 6, 16, 4
SAMPLING = SamplingConfig(steps=STEPS, cfg_scale=2.0)
PLAN = CalibrationConfig(trajectories=TRAJECTORIES, samples=10, clusters=3, batch_size=3, held_out=0)
FULL = Variant("full", steps=STEPS)
FORA = replace(FULL, name="cache", interval=3)
BOTH = replace(FORA, name="both", bits=(8, 8))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DiT(CONFIG).eval()


@pytest.fixture(scope="module")
def bench(model):
    """Shared: what it has made once only saves time."""
    return Workbench(model, SAMPLING, PLAN, pairs=4)


def images(model, compensation=None, steps=STEPS, **kwargs):
    return generate(model, [0, 1, 4], steps, 2.0, compensation=compensation, **kwargs)


@given(count=st.integers(1, 200), classes=st.integers(1, 40))
def test_every_prefix_of_the_labels_is_balanced(count, classes):
    seen = balanced_labels(count, classes).bincount(minlength=classes)
    assert len(seen) == classes and int(seen.sum()) == count and int(seen.max() - seen.min()) <= 1


@pytest.mark.parametrize("change", [{}, {"reuse": "block"}, {"order": 1}, {"optimal": True}, {"selection": "tap"}])
def test_interval_1_without_bits_is_full_precision_bit_for_bit(bench, change):
    built, compensation = bench.build(replace(FULL, **change))
    assert compensation is None and feature_cache(built) is None
    assert torch.equal(images(built)[0], images(bench.model)[0])


@pytest.mark.parametrize("method", VC_METHODS)
def test_compensating_full_precision_changes_no_bit(bench, method):
    built, compensation = bench.build(replace(FULL, compensation=method))
    assert (compensation.factor == 1).all()
    assert torch.equal(images(built, compensation)[0], images(bench.model)[0])


def test_building_leaves_the_source_model_alone(model):
    before = copy.deepcopy(model.state_dict())
    kinds, hooks = [type(m) for m in model.modules()], [len(m._forward_pre_hooks) for m in model.modules()]
    bench = Workbench(model, SAMPLING, PLAN, pairs=4)
    for variant in (FORA, replace(BOTH, rounding="gptq", compensation="variance_match", selection="tap")):
        bench.build(variant)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert [type(m) for m in model.modules()] == kinds and feature_cache(model) is None
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("variant", [FORA, BOTH, replace(FORA, interval=4), replace(BOTH, reuse="block")])
def test_a_built_model_computes_every_interval_th_step(bench, variant):
    _, report = images(bench.build(variant)[0])
    assert report.computed == [i % variant.interval == 0 for i in range(STEPS)]


def test_the_optimal_schedule_has_the_steps_of_its_interval(bench):
    variant = replace(FORA, optimal=True)
    _, report = images(bench.build(variant)[0])
    assert report.computed_steps == math.ceil(STEPS / 3) and report.computed[0]
    assert tuple(i for i, c in enumerate(report.computed) if c) == bench.schedule(variant)


def test_calibrations_are_shared_by_variants_with_the_same_trajectories(bench):
    assert bench.calibration(BOTH) is bench.calibration(replace(BOTH, bits=(4, 8), compensation="paper"))
    others = [{"interval": 2}, {"reuse": "block"}, {"order": 1}, {"sampler": "ddim"}, {"optimal": True}, {"steps": 5}]
    made = [bench.calibration(replace(BOTH, **change)) for change in others]
    assert len({id(calibration) for calibration in [*made, bench.calibration(BOTH)]}) == len(others) + 1


def test_seeds_of_calibration_fit_and_judged_images_share_no_noise():
    calibrating = [batch.seed for batch in CalibrationConfig(64, 1, seed=CALIBRATION_SEED).batches()]
    seeds = [*calibrating, FIT_SEED, *experiment.Evaluation().seeds]
    drawn = [image_seed(i, seed) for seed in seeds for i in range(1000)]
    assert len(set(drawn)) == len(drawn)


def test_statistics_count_the_tokens_that_reach_a_layer(model):
    everything = replace(PLAN, samples=STEPS * TRAJECTORIES)
    statistics = Workbench(model, SAMPLING, everything).calibration(BOTH).statistics
    conditions, computed = 2, 2 * TRAJECTORIES  # steps 0 and 3
    assert statistics["blocks.0.attn.qkv"].count == computed * TOKENS * conditions
    assert statistics["blocks.1.mlp.fc2"].count == computed * TOKENS * conditions
    assert statistics["final_layer.linear"].count == STEPS * TRAJECTORIES * TOKENS * conditions


def test_calibration_is_calibrates_with_the_selection_of_the_variant(bench):
    made = bench.calibration(replace(BOTH, selection="tap", time_scale=3.0, computed_only=True))
    made.check_model(bench.model)
    assert made.sampling == SAMPLING
    config = replace(PLAN, time_scale=3.0, hessians=False, seed=CALIBRATION_SEED)
    expected = calibrate(DiTTrajectories(bench.cached(BOTH), range(5), SAMPLING), config)
    for name, layer in expected.statistics.items():
        assert layer.count == made.statistics[name].count and torch.equal(layer.high, made.statistics[name].high)
    hessian = bench.calibration(replace(BOTH, rounding="gptq")).statistics["blocks.0.attn.proj"].hessian
    assert made.statistics["blocks.0.attn.proj"].hessian is None and hessian.shape == (32, 32)


@pytest.mark.parametrize(
    ("bits", "static", "rounding", "needed"),
    [
        (None, True, "gptq", False), ((8, 8), True, "nearest", True), ((8, 8), False, "nearest", False),
        ((4, 8), False, "gptq", True),
    ],
)  # fmt: skip
def test_calibration_is_made_only_where_it_is_needed(model, bits, static, rounding, needed):
    variant = replace(FORA, bits=bits, static=static, rounding=rounding)
    assert variant.needs_calibration is needed
    bench = Workbench(model, SAMPLING, PLAN, pairs=4)
    bench.build(variant)
    assert any(key[0] == "calibration" for key in bench.made) is needed


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])
@pytest.mark.parametrize("static", [True, False])
def test_a_built_model_has_the_bits_and_activations_of_its_variant(bench, bits, static):
    layers = quantized_layers(bench.build(replace(BOTH, bits=bits, static=static))[0])
    # attn.qkv, attn.proj, mlp.fc1, mlp.fc2 of every block and the two linears of the timestep embedder.
    assert len({name for name in layers if name.startswith("blocks.")}) == 4 * CONFIG.depth
    assert {(f.w_bits, f.a_bits, f.static) for f in (layer.format for layer in layers.values())} == {(*bits, static)}


def test_fewer_bits_are_further_from_full_precision(bench):
    full = images(bench.model)[0]
    errors = [float((images(bench.build(replace(FULL, bits=b))[0])[0] - full).norm()) for b in ((8, 8), (4, 8), (3, 3))]
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("method", VC_METHODS)
def test_compensation_has_one_row_for_each_step_and_corrects_the_cache(bench, method):
    _, compensation = bench.build(replace(BOTH, compensation=method))
    assert compensation.factor.shape == compensation.mean.shape == (STEPS, 3)
    assert compensation.method == method and compensation.factor.isfinite().all()
    torch.testing.assert_close(compensation.sigmas, torch.tensor(SAMPLING.schedule().sigmas[:-1], dtype=torch.float64))
    assert (compensation.factor[0] == 1).all() and (compensation.factor[-1] != 1).any()


def test_compensation_can_start_late(bench):
    _, late = bench.build(replace(BOTH, compensation="variance_match", compensation_start=0.5))
    assert (late.factor[: STEPS // 2] == 1).all() and (late.factor[STEPS // 2 :] != 1).all()


def test_building_twice_gives_the_same_model(model):
    variant = replace(
        BOTH,
        bits=(4, 8),
        rounding="gptq",
        selection="tap",
        time_scale=5.0,
        computed_only=True,
        compensation="variance_match",
    )
    results = []
    for _ in range(2):
        built, compensation = Workbench(model, SAMPLING, PLAN, pairs=4).build(variant)
        results.append(images(built, compensation)[0])
    assert torch.equal(*results)
