import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qandc_core import DiT, DiTConfig, SamplingConfig, apply_cache_to_dit, generate
from qandc_core.caching.attach import feature_cache
from qandc_core.compensation.factors import METHODS as VC_METHODS
from qandc_core.diffusion.noise import image_seed
from qandc_core.evaluation import calibration_choice, experiment, variants
from qandc_core.evaluation.calibration_choice import METHODS
from qandc_core.evaluation.variants import (
    CALIBRATION_SEED,
    FIT_SEED,
    CalibrationPlan,
    Variant,
    Workbench,
    balanced_labels,
    block_features,
    select,
)
from qandc_core.models.dit import modulate
from qandc_core.quantization.model import quantized_layers

CONFIG = DiTConfig(
    input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=False
)  # fmt: skip
STEPS, TOKENS, TRAJECTORIES = 6, 16, 4
SAMPLING = SamplingConfig(steps=STEPS, cfg_scale=2.0)
PLAN = CalibrationPlan(trajectories=TRAJECTORIES, samples=10, clusters=3, pairs=4, batch=3)
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
    return Workbench(model, SAMPLING, PLAN)


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
    bench = Workbench(model, SAMPLING, PLAN)
    for variant in (FORA, replace(BOTH, rounding="gptq", compensation="variance_match", selection="tap")):
        bench.build(variant)
    block_features(model, bench.pool(FORA))
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


def trajectory(model, labels):
    """x before every step (T, N, C, H, W), by the sampling loop's own callback."""
    seen = []
    config = {"steps": STEPS, "cfg_scale": 2.0, "seed": CALIBRATION_SEED}
    generate(model, labels, **config, callback=lambda info: seen.append(info.x.clone()))
    start = torch.stack([
        torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(image_seed(i, CALIBRATION_SEED)))
        for i in range(len(labels))
    ])  # fmt: skip
    return torch.stack([start, *seen[:-1]])


def test_the_pool_holds_cached_trajectories(bench):
    pool = bench.pool(FORA)
    labels = balanced_labels(TRAJECTORIES, CONFIG.num_classes)
    cached = trajectory(apply_cache_to_dit(copy.deepcopy(bench.model), 3), labels)
    plain = trajectory(bench.model, labels)
    assert len(pool) == STEPS * TRAJECTORIES
    for i in range(STEPS):
        at = pool.steps == i
        torch.testing.assert_close(pool.samples[at], cached[i], rtol=1e-4, atol=1e-5)
        assert torch.equal(pool.labels[at], labels)
        assert (pool.computed[at] == (i % 3 == 0)).all()
        assert set(pool.timesteps[at].tolist()) == {SAMPLING.schedule().timesteps[i]}
    # Steps 0 and 1 were computed from the same x; the first reused step is 1, so x differs from step 2 on.
    assert torch.allclose(cached[1], plain[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(cached[2], plain[2], rtol=1e-2, atol=1e-3)


def test_the_pool_of_full_precision_is_computed_everywhere(bench):
    assert bench.pool(FULL).computed.all()


def test_pools_are_shared_by_variants_with_the_same_trajectories(bench):
    assert bench.pool(FORA) is bench.pool(replace(BOTH, selection="tap", compensation="paper"))
    others = [{"interval": 2}, {"reuse": "block"}, {"order": 1}, {"sampler": "ddim"}, {"optimal": True}, {"steps": 5}]
    pools = [bench.pool(replace(FORA, **change)) for change in others]
    assert len({id(pool) for pool in [*pools, bench.pool(FORA)]}) == len(others) + 1


def test_seeds_of_calibration_fit_and_judged_images_share_no_noise():
    judged = [1, 2, 3, calibration_choice.IMAGE_SEED, calibration_choice.TEST_SEED]
    seeds = [CALIBRATION_SEED, FIT_SEED, *judged]
    drawn = [image_seed(i, seed) for seed in seeds for i in range(5000)]
    assert len(set(drawn)) == len(drawn)
    assert set(experiment.Evaluation().seeds) == {1, 2, 3}


def test_statistics_count_the_rows_that_reach_a_layer(bench):
    pool, chosen = bench.pool(FORA), torch.arange(len(bench.pool(FORA)))
    statistics = bench.calibrate(BOTH, pool, chosen).statistics
    conditions, runs = 2, int(pool.computed.sum())
    assert statistics["blocks.0.attn.qkv"].count == runs * TOKENS * conditions
    assert statistics["blocks.1.mlp.fc2"].count == runs * TOKENS * conditions
    assert statistics["final_layer.linear"].count == len(pool) * TOKENS * conditions


def test_calibration_belongs_to_the_model_and_follows_the_selection(bench):
    made = bench.calibration(BOTH)
    made.check_model(bench.model)
    assert made.sampling == SAMPLING
    selected = bench.calibrate(BOTH, bench.pool(BOTH), select("random", bench.pool(BOTH), PLAN))
    for name, layer in selected.statistics.items():
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
    bench = Workbench(model, SAMPLING, PLAN)
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
    variant = replace(BOTH, bits=(4, 8), rounding="gptq", selection="tap@5-computed", compensation="variance_match")
    results = []
    for _ in range(2):
        built, compensation = Workbench(model, SAMPLING, PLAN).build(variant)
        results.append(images(built, compensation)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_every_selection_draws_the_samples_asked_for(bench, method, seed):
    pool = bench.pool(FORA)
    blocks = block_features(bench.model, pool)
    for samples in (5, 8):
        plan = replace(PLAN, samples=samples)
        chosen = select(method, pool, plan, seed, blocks)
        assert chosen.dtype == torch.int64 and chosen.shape == (samples,) and len(chosen.unique()) == samples
        assert 0 <= int(chosen.min()) and int(chosen.max()) < len(pool)
        assert torch.equal(chosen, select(method, pool, plan, seed, blocks))
        if method.endswith("-computed"):
            assert pool.computed[chosen].all()
    everything = select(method, pool, replace(PLAN, samples=10**6), seed, blocks)
    assert len(everything) == (int(pool.computed.sum()) if method.endswith("-computed") else len(pool))


@pytest.mark.parametrize("method", [m for m in METHODS if not m.endswith("-computed")])
def test_without_computed_a_selection_reaches_reused_steps(bench, method):
    pool = bench.pool(FORA)
    blocks = block_features(bench.model, pool)
    draws = torch.cat([select(method, pool, PLAN, seed, blocks) for seed in range(3)])
    assert not pool.computed[draws].all() and pool.computed[draws].any()


def test_stratified_takes_every_step_equally(bench):
    pool = bench.pool(FORA)
    assert pool.steps[select("stratified", pool, replace(PLAN, samples=12))].bincount().tolist() == [2] * STEPS
    computed = pool.steps[select("stratified-computed", pool, replace(PLAN, samples=6))].bincount(minlength=STEPS)
    assert computed.tolist() == [3, 0, 0, 3, 0, 0]


def test_draws_differ_between_seeds(bench):
    pool = bench.pool(FORA)
    for method in ("random", "stratified", "tap@5"):
        draws = {tuple(select(method, pool, replace(PLAN, samples=6), seed).tolist()) for seed in range(5)}
        assert len(draws) > 1, method


@pytest.mark.parametrize(
    ("method", "scale", "source"),
    [("tap", 1.0, "pixels"), ("tap@5", 5.0, "pixels"), ("tap@0.5", 0.5, "pixels"), ("tap-blocks@20", 20.0, "blocks")],
)
def test_tap_clusters_what_its_name_says(bench, monkeypatch, method, scale, source):
    pool, seen = bench.pool(FORA), {}
    original = variants.tap_select

    def spy(features, timesteps, *args, **kwargs):
        seen.update(kwargs, features=features, timesteps=timesteps, args=args)
        return original(features, timesteps, *args, **kwargs)

    monkeypatch.setattr(variants, "tap_select", spy)
    blocks = torch.randn(len(pool), 7, generator=torch.Generator().manual_seed(0))
    select(method, pool, PLAN, 4, blocks)
    assert torch.equal(seen["features"], blocks if source == "blocks" else pool.samples.flatten(1))
    assert torch.equal(seen["timesteps"], pool.steps) and seen["time_scale"] == scale and seen["seed"] == 4
    assert seen["args"] == (PLAN.samples, PLAN.clusters)


@pytest.mark.parametrize(
    "method", ["", "best", "TAP", "tap@", "tap@0", "tap@-1", "tap@x", "tap@inf", "random@5", "tap-"]
)
def test_unknown_selections_are_refused_in_one_sentence(bench, method):
    for name in (method, f"{method}-computed"):
        with pytest.raises(ValueError, match="selection must be one of random, stratified, tap, tap-blocks"):
            select(name, bench.pool(FORA), PLAN)


def test_block_features_are_token_means_of_the_attention_inputs(bench):
    pool = bench.pool(FORA)
    found = block_features(bench.model, pool, batch=5)
    assert found.shape == (len(pool), CONFIG.depth * CONFIG.hidden_size)
    torch.testing.assert_close(found, block_features(bench.model, pool), rtol=1e-3, atol=1e-4)
    net = bench.model
    with torch.inference_mode():
        x = net.x_embedder(pool.samples) + net.pos_embed
        c = net.t_embedder(pool.timesteps, x.dtype) + net.y_embedder(pool.labels)
        means = []
        for block in net.blocks:
            shift, scale = block.adaLN_modulation(c).chunk(6, dim=1)[:2]
            means.append(modulate(block.norm1(x), shift, scale).mean(1))
            x = block(x, c)
    expected = torch.cat(means, 1)
    expected = (expected - expected.mean(0)) / expected.std(0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_block_features_ignore_an_attached_cache(bench):
    pool = bench.pool(FORA)
    cached = apply_cache_to_dit(copy.deepcopy(bench.model), 3)
    # Batches of three hold one step each, so that the cache would skip the attention of most.
    assert torch.equal(block_features(cached, pool, batch=3), block_features(bench.model, pool, batch=3))
