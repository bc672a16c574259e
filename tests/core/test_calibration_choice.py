"""The laboratory of benchmarks/calibration: pools that are kept whole, and draws from them."""

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.calibration import choice
from benchmarks.calibration.choice import METHODS, block_features, choice_table, select
from benchmarks.calibration.pool import CandidatePool, collect_pool
from qandc_core import CalibrationConfig, DiT, DiTConfig, SamplingConfig, apply_cache_to_dit, generate, quantize_model
from qandc_core.diffusion.noise import image_seed
from qandc_core.evaluation.variants import Workbench, balanced_labels
from qandc_core.models.dit import modulate

CONFIG = DiTConfig(
    input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=False
)  # fmt: skip
STEPS, TRAJECTORIES, SEED = 6, 4, 501
SAMPLING = SamplingConfig(steps=STEPS, cfg_scale=2.0)
PLAN = CalibrationConfig(trajectories=TRAJECTORIES, samples=10, clusters=3, batch_size=3, held_out=0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DiT(CONFIG).eval()


@pytest.fixture(scope="module")
def pool(model):
    cached = apply_cache_to_dit(copy.deepcopy(model), 3)
    return collect_pool(cached, balanced_labels(TRAJECTORIES, 5), SAMPLING, batch_size=3, seed=SEED)


def trajectory(model, labels):
    """x before every step (T, N, C, H, W), by the sampling loop's own callback."""
    seen = []
    config = {"steps": STEPS, "cfg_scale": 2.0, "seed": SEED}
    generate(model, labels, **config, callback=lambda info: seen.append(info.x.clone()))
    start = torch.stack([
        torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(image_seed(i, SEED)))
        for i in range(len(labels))
    ])  # fmt: skip
    return torch.stack([start, *seen[:-1]])


def test_the_pool_holds_cached_trajectories(model, pool):
    labels = balanced_labels(TRAJECTORIES, CONFIG.num_classes)
    cached = trajectory(apply_cache_to_dit(copy.deepcopy(model), 3), labels)
    plain = trajectory(model, labels)
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


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_every_selection_draws_the_samples_asked_for(model, pool, method, seed):
    blocks = block_features(model, pool)
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
def test_without_computed_a_selection_reaches_reused_steps(model, pool, method):
    blocks = block_features(model, pool)
    draws = torch.cat([select(method, pool, PLAN, seed, blocks) for seed in range(3)])
    assert not pool.computed[draws].all() and pool.computed[draws].any()


def test_stratified_takes_every_step_equally(model, pool):
    assert pool.steps[select("stratified", pool, replace(PLAN, samples=12))].bincount().tolist() == [2] * STEPS
    computed = pool.steps[select("stratified-computed", pool, replace(PLAN, samples=6))].bincount(minlength=STEPS)
    assert computed.tolist() == [3, 0, 0, 3, 0, 0]


def test_draws_differ_between_seeds(model, pool):
    for method in ("random", "stratified", "tap@5"):
        draws = {tuple(select(method, pool, replace(PLAN, samples=6), seed).tolist()) for seed in range(5)}
        assert len(draws) > 1, method


@pytest.mark.parametrize(
    ("method", "scale", "source"),
    [("tap", 1.0, "pixels"), ("tap@5", 5.0, "pixels"), ("tap@0.5", 0.5, "pixels"), ("tap-blocks@20", 20.0, "blocks")],
)
def test_tap_clusters_what_its_name_says(pool, monkeypatch, method, scale, source):
    seen = {}
    original = choice.tap_select

    def spy(features, timesteps, *args, **kwargs):
        seen.update(kwargs, features=features, timesteps=timesteps, args=args)
        return original(features, timesteps, *args, **kwargs)

    monkeypatch.setattr(choice, "tap_select", spy)
    blocks = torch.randn(len(pool), 7, generator=torch.Generator().manual_seed(0))
    select(method, pool, PLAN, 4, blocks)
    assert torch.equal(seen["features"], blocks if source == "blocks" else pool.samples.flatten(1))
    assert torch.equal(seen["timesteps"], pool.steps) and seen["time_scale"] == scale and seen["seed"] == 4
    assert seen["args"] == (PLAN.samples, PLAN.clusters)


@pytest.mark.parametrize(
    "method", ["", "best", "TAP", "tap@", "tap@0", "tap@-1", "tap@x", "tap@inf", "random@5", "tap-"]
)
def test_unknown_selections_are_refused_in_one_sentence(model, pool, method):
    for name in (method, f"{method}-computed"):
        with pytest.raises(ValueError, match="selection must be one of random, stratified, tap, tap-blocks"):
            select(name, pool, PLAN)


def test_block_features_are_token_means_of_the_attention_inputs(model, pool):
    found = block_features(model, pool, batch=5)
    assert found.shape == (len(pool), CONFIG.depth * CONFIG.hidden_size)
    torch.testing.assert_close(found, block_features(model, pool), rtol=1e-3, atol=1e-4)
    net = model
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


def test_block_features_ignore_an_attached_cache(model, pool):
    cached = apply_cache_to_dit(copy.deepcopy(model), 3)
    # Batches of three hold one step each, so that the cache would skip the attention of most.
    assert torch.equal(block_features(cached, pool, batch=3), block_features(model, pool, batch=3))


# --- how well each draw calibrates ------------------------------------------------------------------------------------


DIGITS = DiTConfig(patch_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=10, learn_sigma=False)


@pytest.fixture(scope="module")
def digit_model():
    torch.manual_seed(0)
    return DiT(DIGITS).eval()


def make_pool(steps, each, seed=0):
    index = torch.arange(steps).repeat_interleave(each)
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(len(index), 3, 32, 32, generator=generator)
    return CandidatePool(samples, index, 999 - index * 10, index % 10, index % 3 == 0)


@pytest.mark.parametrize(("steps", "each"), [(50, 8), (10, 30), (6, 40)])
@pytest.mark.parametrize("share", [0.95, 0.5])
def test_the_biased_pool_is_late_by_its_share(steps, each, share):
    pool = make_pool(steps, each)
    part = choice.biased(pool, share)
    late = (part.steps >= 2 * steps / 3).double().mean()
    assert len(part) <= len(pool) // 2 and abs(float(late) - share) <= 1 / len(part)
    assert len({x.sum().item() for x in part.samples}) == len(part), "a sample was drawn twice"
    assert part.computed.any() and (part.computed == (part.steps % 3 == 0)).all()
    assert torch.equal(part.samples, choice.biased(pool, share).samples)
    assert not torch.equal(part.samples, choice.biased(pool, share, seed=1).samples)


ALL_BUT_ONE = ("attn", "fc1", "norm", "pos_embed", "proj_out", "t_embedder", "transformer_blocks.0.")


def test_layer_error_against_brute_force(digit_model):
    test = make_pool(6, 3)
    quantized = quantize_model(copy.deepcopy(digit_model), 4, 8, ALL_BUT_ONE)
    with torch.inference_mode():
        kept = test.subset(test.computed.nonzero().flatten())
        x = digit_model.x_embedder(kept.samples) + digit_model.pos_embed
        c = digit_model.t_embedder(kept.timesteps, x.dtype) + digit_model.y_embedder(kept.labels)
        x = digit_model.blocks[0](x, c)
        block = digit_model.blocks[1]
        shift_a, scale_a, gate_a, shift, scale, _ = block.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * block.attention_branch(x, shift_a, scale_a)
        mlp = block.mlp
        inputs = torch.nn.functional.gelu(mlp.fc1(modulate(block.norm2(x), shift, scale)), approximate="tanh").double()
        weight, bias = mlp.fc2.weight.double(), mlp.fc2.bias.double()
        step_w = weight.abs().amax(1, keepdim=True) / 7
        step_x = inputs.abs().amax(-1, keepdim=True) / 127
        rounded = (inputs / step_x).round() * step_x @ ((weight / step_w).round() * step_w).T + bias
        exact = inputs @ weight.T + bias
        expected = float((rounded - exact).norm() / exact.norm())
    assert choice.layer_error(digit_model, quantized, test, ALL_BUT_ONE) == pytest.approx(expected, rel=0.01)
    assert expected > 0.02


def test_layer_error_falls_with_the_bits_and_is_0_for_the_layers_themselves(digit_model, monkeypatch):
    test, skip = make_pool(6, 2), ("pos_embed", "norm")
    models = [quantize_model(copy.deepcopy(digit_model), bits, 8, skip) for bits in (8, 6, 4, 2)]
    errors = [choice.layer_error(digit_model, quantized, test, skip) for quantized in models]
    assert 0 < errors[0] < 0.02 and errors == sorted(errors)
    assert not any(m._forward_hooks for m in digit_model.modules())
    monkeypatch.setattr(choice, "quantized_layers", lambda net: dict(choice.named_linears(net, skip)))
    assert choice.layer_error(digit_model, copy.deepcopy(digit_model), test, skip) == 0


def test_layer_error_reads_computed_steps_only(digit_model):
    test, skip = make_pool(6, 2), ("pos_embed", "norm")
    quantized = quantize_model(copy.deepcopy(digit_model), 4, 8, skip)
    kept = test.subset(test.computed.nonzero().flatten())
    damaged = replace(test, samples=torch.where(test.computed[:, None, None, None], test.samples, torch.nan))
    expected = choice.layer_error(digit_model, quantized, kept, skip)
    assert choice.layer_error(digit_model, quantized, damaged, skip) == pytest.approx(expected, rel=1e-6)


def test_calibration_choice_reports_every_pool_method_and_format(digit_model, monkeypatch):
    monkeypatch.setattr(choice, "METHODS", ("random", "tap@5-computed"))
    monkeypatch.setattr(choice, "BIASED_METHODS", ("stratified",))
    bench = Workbench(digit_model, replace(SAMPLING, steps=6), replace(PLAN, trajectories=8))
    # An interval of 2, so that the last third of six steps holds a computed one.
    monkeypatch.setattr(choice, "FORMATS", tuple(replace(v, steps=6, interval=2) for v in choice.FORMATS))
    sizes, lines = choice.ChoiceSizes(draws=2, samples=12, clusters=3, test_trajectories=2, images=4), []
    results = choice.calibration_choice(bench, sizes, lines.append)
    expected = [("balanced", "random"), ("balanced", "tap@5-computed"), ("95 % late steps", "stratified")]
    assert [(r["pool"], r["method"], r["format"]) for r in results] == [
        (pool, method, v.name) for pool, method in expected for v in choice.FORMATS
    ]
    assert len(lines) == len(results)
    for r in results:
        assert r["draws"] == 2 and 0 < r["layer_error"] < 1 and 0 < r["relative_l2"] and r["layer_error_se"] >= 0
    eight, four = ([r["layer_error"] for r in results if r["format"] == v.name] for v in choice.FORMATS)
    assert max(eight) < min(four)
    table = choice_table(results)
    assert all(f"| {r['pool']} | {r['method']} | {r['format']} |" in table for r in results)
