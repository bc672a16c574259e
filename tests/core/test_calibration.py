import json
import os
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.calibration.pool import CandidatePool, collect_pool, collect_statistics, is_cached_layer
from qandc_core.caching.attach import apply_cache_to_dit, feature_cache
from qandc_core.calibration.file import Calibration, fingerprint, load_calibration, read_sampling
from qandc_core.calibration.statistics import BINS, LayerStatistics, add_products
from qandc_core.checkpoints import save_dit
from qandc_core.compensation.correction import VarianceCompensation
from qandc_core.diffusion.noise import image_seed
from qandc_core.diffusion.process import SamplingConfig
from qandc_core.models import DiT, DiTConfig
from qandc_core.models.layers import named_linears
from qandc_core.quantization.clipping import activation_bounds
from qandc_core.quantization.model import QuantizationConfig, quantize_model
from qandc_core.sampling.generate import generate

TINY = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=10)
TOKENS = 16


pytestmark = pytest.mark.usefixtures("no_grad")


def dit(seed=0):
    torch.manual_seed(seed)
    return DiT(TINY).eval()


# Statistics of one layer.


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(0, 2**31)), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_statistics_against_numpy(batches):
    # Values in the middle of the finest bins stay inside one bin however often the range doubles.
    statistics, seen = LayerStatistics.empty(6, hessian=True), []
    for shift, rows, seed in batches:
        middle = np.random.default_rng(seed).integers(-1024, 1024, (rows, 6)) + 0.5
        seen.append((middle / 2**shift).astype(np.float32))
        statistics.update(torch.from_numpy(seen[-1]))
    x = np.concatenate(seen)
    assert statistics.count == len(x)
    assert np.array_equal(statistics.low.numpy(), x.min(0)) and np.array_equal(statistics.high.numpy(), x.max(0))
    assert np.allclose(statistics.mean.numpy(), x.mean(0), rtol=1e-5, atol=1e-3)
    exact = x.astype(np.float64).T @ x.astype(np.float64)
    assert np.allclose(statistics.hessian.numpy(), exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max())
    assert statistics.reach / 2 < np.abs(x).max() <= statistics.reach
    assert np.log2(statistics.reach) % 1 == 0
    counts, _ = np.histogram(x, BINS, (-statistics.reach, statistics.reach))
    assert np.array_equal(statistics.histogram.numpy(), counts)


@pytest.mark.parametrize("width", [3, 130, 1100])
def test_products_are_added_by_halves(width):
    x, before = torch.randn(40, width), torch.randn(width, width)
    before += before.T.clone()
    found = add_products(before.clone(), x)
    torch.testing.assert_close(found, before + x.T @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found, found.T, rtol=1e-5, atol=1e-5)


def test_every_value_is_counted_however_wide_the_range():
    statistics, x = LayerStatistics.empty(8), torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for scale in (1e-5, 1.0, 1e4, 0.0, 3e7):
        statistics.update(x * scale)
    assert float(statistics.histogram.sum()) == 5 * 50 * 8
    assert float(statistics.low.min()) >= -statistics.reach and float(statistics.high.max()) <= statistics.reach


def test_one_bin_counts_beyond_what_float32_holds():
    statistics = LayerStatistics.empty(24929)
    statistics.update(torch.zeros(1, 1).expand(673, 24929))
    assert float(statistics.histogram.max()) == 673 * 24929 == 2**24 + 1


def test_updates_accept_half_precision_and_do_not_depend_on_the_batches():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, parts = LayerStatistics.empty(5, True), LayerStatistics.empty(5, True)
    whole.update(x)
    for part in x.split(7):
        parts.update(part)
    assert torch.equal(whole.histogram, parts.histogram) and torch.equal(whole.low, parts.low)
    assert torch.allclose(whole.mean, parts.mean, atol=1e-6) and torch.allclose(whole.hessian, parts.hessian, atol=1e-3)


def gathered(x):
    statistics = LayerStatistics.empty(x.shape[1])
    statistics.update(x)
    return statistics


def heavy_tailed(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4000, 4, generator=generator) + 0.3
    x[:3] *= 12
    return x


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_bounds_leave_out_that_share(percentile):
    x = heavy_tailed()
    statistics = gathered(x)
    low, high = activation_bounds(statistics, "percentile", percentile=percentile)
    bin_width, share, values = 2 * statistics.reach / BINS, 1 - percentile / 100, x.flatten()
    assert float(((values < low) | (values > high)).float().mean()) <= share
    inner = (values < low + bin_width) | (values > high - bin_width)
    assert float((values < low + bin_width).float().mean()) >= share / 2
    assert float((values > high - bin_width).float().mean()) >= share / 2
    assert float(inner.float().mean()) >= share


def test_minmax_and_the_hundredth_percentile_are_the_extremes():
    x = heavy_tailed()
    extremes = float(x.min()), float(x.max())
    assert activation_bounds(gathered(x), "minmax") == extremes
    assert activation_bounds(gathered(x), "percentile", percentile=100) == extremes
    with pytest.raises(ValueError, match="clipping must be one of minmax, percentile, mse"):
        activation_bounds(gathered(x), "entropy")


def clipping_errors(statistics, bits, symmetric):
    """Squared error of the histogram for each candidate fraction of the extremes, from Eq. 1-3 in float64."""
    width = 2 * statistics.reach / BINS
    x = (np.arange(BINS) + 0.5) * width - statistics.reach
    weights, errors = statistics.histogram.numpy(), []
    for fraction in np.linspace(0.2, 1.0, 81):
        low, high = float(statistics.low.min()) * fraction, float(statistics.high.max()) * fraction
        if symmetric:
            top = 2 ** (bits - 1) - 1
            scale = max(-low, high) / top
            rounded = np.clip(np.round(x / scale), -top, top) * scale
        else:
            low, high, levels = min(low, 0), max(high, 0), 2**bits - 1
            scale = (high - low) / levels
            zero = np.clip(np.round(-low / scale), 0, levels)
            rounded = scale * (np.clip(np.round(x / scale) + zero, 0, levels) - zero)
        errors.append(float((weights * (rounded - x) ** 2).sum()))
    return np.array(errors)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_bounds_are_the_best_of_the_candidates(bits, symmetric):
    for seed in range(3):
        statistics = gathered(heavy_tailed(seed))
        low, high = activation_bounds(statistics, "mse", bits, symmetric=symmetric)
        fraction = high / float(statistics.high.max())
        assert low == pytest.approx(fraction * float(statistics.low.min()))
        errors = clipping_errors(statistics, bits, symmetric)
        chosen = int(np.abs(np.linspace(0.2, 1.0, 81) - fraction).argmin())
        assert errors[chosen] <= errors.min() * 1.001
    assert fraction < 0.9 or bits == 8


def test_mse_bounds_lower_the_real_error():
    x = heavy_tailed()

    def error(clipping):
        linear = nn.Linear(4, 4, bias=False)
        linear.weight.copy_(torch.eye(4))
        model = nn.Sequential(linear)
        calibration = Calibration(fingerprint(model), {"0": gathered(x)})
        quantize_model(model, 8, 4, calibration=calibration, config=QuantizationConfig(clipping=clipping))
        return float((model(x) - x).square().mean())

    assert error("mse") < 0.5 * error("minmax")


# The pool.


def sampling(sampler="ddpm", **overrides):
    return SamplingConfig(**{"steps": 6, "sampler": sampler, "cfg_scale": 2.0, **overrides})


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("cache", [{}, {"cache_interval": 3}, {"steps": [0, 1, 4]}, {"cache_interval": 2, "order": 1}])
def test_pool_holds_what_generate_passes_through(sampler, cache):
    model, labels, config = dit(), [3, 0, 10], sampling(sampler)
    if cache:
        apply_cache_to_dit(model, **cache)
    seen = []
    generate(model, labels, 6, 2.0, sampler, seed=5, callback=lambda info: seen.append((info.x, info.computed)))
    pool = collect_pool(model, labels, config, seed=5)

    assert len(pool) == 6 * 3 and pool.features.shape == (18, 4 * 8 * 8)
    assert pool.steps.tolist() == [i for i in range(6) for _ in labels]
    assert pool.labels.tolist() == labels * 6
    assert pool.timesteps.tolist() == [t for t in config.schedule().timesteps for _ in labels]
    assert pool.computed.tolist() == [computed for _, computed in seen for _ in labels]
    expected = {None: 6, 2: 3, 3: 2}[cache.get("cache_interval")] if "steps" not in cache else 3
    assert int(pool.computed.sum()) == expected * 3
    later = torch.cat([x for x, _ in seen[:-1]])  # the callback sees the sample after its step
    assert torch.equal(pool.samples[3:], later)
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(image_seed(i, 5))) for i in range(3)]
    assert torch.equal(pool.samples[:3], torch.stack(noise))


def by_image(pool, images, steps, batch):
    """Samples as (images, steps, ...), from the order in which batches were run."""
    parts = pool.samples.split([steps * min(batch, images - at) for at in range(0, images, batch)])
    return torch.cat([part.unflatten(0, (steps, -1)).transpose(0, 1) for part in parts])


def test_batches_and_shards_change_no_sample():
    model, labels = apply_cache_to_dit(dit(), 3), [1, 2, 3, 4, 5]
    whole = by_image(collect_pool(model, labels, sampling(), seed=7), 5, 6, 64)
    parts = by_image(collect_pool(model, labels, sampling(), seed=7, batch_size=2), 5, 6, 2)
    shard = by_image(collect_pool(model, labels[3:], sampling(), seed=7, first_index=3), 2, 6, 64)
    assert (whole - parts).abs().max() <= 1e-4 * whole.abs().max()
    assert (whole[3:] - shard).abs().max() <= 1e-4 * whole.abs().max()


def test_pool_of_another_cache_differs():
    plain = collect_pool(dit(), [1], sampling(), seed=7)
    cached = collect_pool(apply_cache_to_dit(dit(), 3), [1], sampling(), seed=7)
    assert torch.equal(plain.samples[:2], cached.samples[:2]) and not torch.equal(plain.samples, cached.samples)


def test_pool_reports_progress_and_an_interrupt_leaves_no_features():
    model, calls = apply_cache_to_dit(dit(), 3), []

    def interrupt(step, total):
        calls.append((step, total))
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_pool(model, [1, 2], sampling(), batch_size=1, callback=interrupt)
    assert calls == [(i, 12) for i in range(8)]
    assert feature_cache(model).num_bytes == 0


def test_pool_refuses_labels_out_of_range():
    with pytest.raises(ValueError, match="class id 11 is out of range"):
        collect_pool(dit(), [11], sampling())


def test_subset():
    pool = collect_pool(apply_cache_to_dit(dit(), 3), [1, 2], sampling())
    part = pool.subset(torch.tensor([11, 0, 3]))
    for field in fields(CandidatePool):
        assert torch.equal(getattr(part, field.name), getattr(pool, field.name)[[11, 0, 3]])


# Statistics over the pool.


def rows_of(name):
    return 1 if "adaLN" in name or name.startswith("t_embedder") else TOKENS


@pytest.mark.parametrize("reuse", ["branch", "block"])
@pytest.mark.parametrize("cfg_scale, conditions", [(4.0, 2), (1.0, 1)])
def test_skipped_layers_see_only_computed_steps(reuse, cfg_scale, conditions):
    model = apply_cache_to_dit(dit(), 3, reuse=reuse)
    pool = collect_pool(model, [1, 2, 3], sampling(), seed=1)
    selected = pool.subset(torch.arange(0, 18, 2))
    computed = int(selected.computed.sum())
    assert 0 < computed < len(selected) == 9
    statistics = collect_statistics(model, selected, cfg_scale=cfg_scale, batch_size=2)
    assert list(statistics) == [name for name, _ in named_linears(model)]
    for name, layer in statistics.items():
        inside = name.startswith("blocks.") and (reuse == "block" or "adaLN" not in name)
        assert is_cached_layer(name, reuse) == inside
        assert layer.count == conditions * rows_of(name) * (computed if inside else len(selected)), name
        assert layer.hessian is None


def test_statistics_are_those_of_the_inputs_of_both_conditions():
    model = apply_cache_to_dit(dit(), 3)
    selected = collect_pool(model, [1, 2], sampling(), seed=1).subset(torch.tensor([0, 1, 4, 6, 9]))
    statistics = collect_statistics(model, selected, cfg_scale=2.0, hessians=True, batch_size=3)

    plain, rows = dit(), {name: [] for name in statistics}
    for name, layer in named_linears(plain):
        layer.register_forward_pre_hook(lambda _, args, name=name: rows[name].append(args[0].flatten(0, -2)))
    for i in range(len(selected)):
        if selected.computed[i]:
            x, t = selected.samples[i : i + 1], selected.timesteps[i : i + 1]
            for label in (selected.labels[i : i + 1], torch.tensor([10])):
                plain(x, t, label)
    for name, layer in statistics.items():
        if not is_cached_layer(name):
            continue
        x = torch.cat(rows[name])
        assert layer.count == len(x)
        for ours, expected in [
            (layer.low, x.amin(0)),
            (layer.high, x.amax(0)),
            (layer.mean, x.mean(0)),
            (layer.hessian, x.T @ x),
        ]:
            assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def test_skip_patterns_and_the_model_left_as_it_was():
    model, pool = apply_cache_to_dit(dit(), 3), collect_pool(dit(), [1], sampling())
    statistics = collect_statistics(model, pool, skip_patterns=["pos_embed", "norm"])
    assert list(statistics) == [n for n, _ in named_linears(model, ["pos_embed", "norm"])]
    assert feature_cache(model).enabled and feature_cache(model).num_bytes == 0
    assert all(not m._forward_pre_hooks for n, m in model.named_modules() if n)
    one, two = (generate(m, [1], 6)[0] for m in (model, apply_cache_to_dit(dit(), 3)))
    assert torch.equal(one, two)


def test_statistics_refuse_what_they_cannot_use():
    model = apply_cache_to_dit(dit(), 3)
    pool = collect_pool(model, [1], sampling())
    reused = pool.subset((~pool.computed).nonzero().flatten())
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv \(8 layers in all\); select more samples"):
        collect_statistics(model, reused)
    broken = replace(pool, samples=torch.full_like(pool.samples, float("nan")))
    with pytest.raises(ValueError, match="are not finite"):
        collect_statistics(model, broken)
    assert all(not m._forward_pre_hooks for n, m in model.named_modules() if n) and feature_cache(model).enabled
    with pytest.raises(ValueError, match="No linear layer is left to observe"):
        collect_statistics(quantize_model(dit()), pool)


def test_calibrated_static_model_follows_the_full_precision_one():
    model = apply_cache_to_dit(dit(), 3)
    pool = collect_pool(model, [1, 2, 3], sampling("ddim"), seed=1)
    statistics = collect_statistics(model, pool, cfg_scale=2.0)
    exact, _ = generate(model, [1, 2, 3], 6, 2.0, "ddim", seed=1)
    quantize_model(model, calibration=Calibration(fingerprint(model), statistics))
    image, report = generate(model, [1, 2, 3], 6, 2.0, "ddim", seed=1)
    assert report.computed_steps == 2
    assert float((image - exact).norm() / exact.norm()) < 0.05


# The file.


def full_calibration():
    torch.manual_seed(0)
    model = dit()
    pool = collect_pool(apply_cache_to_dit(dit(), 3), [1, 2], sampling())
    return Calibration(
        fingerprint(model),
        collect_statistics(model, pool, hessians=True),
        schedule=(0, 2, 5),
        variance=VarianceCompensation(
            torch.tensor([9.5, 1 / 3, 0.1], dtype=torch.float64), torch.randn(3, 4), torch.rand(3, 4), "paper"
        ),
        sampling=replace(sampling("ddim", steps=2), guidance_channels=3, sigmas=(14.6, 1 / 3, 0.0)),
        notes={"seed": 3, "classes": [1, 2], "selection": {"method": "tap", "alpha": 0.5}, "made": "\u00e9 1.0"},
    )


def assert_equal(left, right):
    for name in ("model", "schedule", "sampling", "notes"):
        assert getattr(left, name) == getattr(right, name)
    assert (left.distances is None) == (right.distances is None)
    assert right.distances is None or torch.equal(left.distances, right.distances)
    assert list(left.statistics) == sorted(right.statistics)
    pairs = [(left.statistics[n], right.statistics[n]) for n in right.statistics]
    pairs += [] if right.variance is None else [(left.variance, right.variance)]
    assert (left.variance is None) == (right.variance is None)
    for one, two in pairs:
        for field in fields(two):
            a, b = getattr(one, field.name), getattr(two, field.name)
            if isinstance(b, torch.Tensor):
                assert a.dtype == b.dtype and torch.equal(a, b)
            else:
                assert a == b and type(a) is type(b)


def test_file_round_trip_is_exact(tmp_path):
    calibration = full_calibration()
    for name, part in {
        "all": calibration,
        "none": Calibration("abc"),
        "statistics": Calibration("abc", calibration.statistics),
        "schedule": Calibration("abc", schedule=(0, 1)),
        "variance": Calibration("abc", variance=calibration.variance),
        "sampling": Calibration("abc", sampling=SamplingConfig()),
        "distances": Calibration("abc", distances=torch.rand(5, 5, dtype=torch.float64)),
        "no Hessians": Calibration("abc", {n: replace(s, hessian=None) for n, s in calibration.statistics.items()}),
    }.items():
        path = tmp_path / name / "calibration.safetensors"
        part.save(path)
        assert_equal(load_calibration(path), part)
        assert_equal(load_calibration(str(path)), part)
        assert os.listdir(path.parent) == ["calibration.safetensors"]


def test_steps_that_a_file_holds_beside_sigmas_say_nothing():
    values = {**asdict(SamplingConfig()), "steps": 20, "spacing": "trailing", "sigmas": [14.6, 1 / 3, 0.0]}
    assert read_sampling(values) == SamplingConfig(sigmas=(14.6, 1 / 3, 0.0))


def test_a_calibration_without_distances_says_what_to_do():
    assert "calibrate without a cache" in Calibration("abc").missing_distances


def test_later_stages_never_change_the_earlier_calibration(tmp_path):
    first = full_calibration()
    before = (first.schedule, first.variance, dict(first.statistics))
    variance = VarianceCompensation(torch.ones(1), torch.zeros(1, 4), torch.ones(1, 4))
    second, third = first.with_variance(variance), replace(first, schedule=(0, 4))
    assert second.variance is variance and second.schedule == (0, 2, 5) and third.schedule == (0, 4)
    assert third.variance is first.variance and second.statistics == first.statistics
    assert (first.schedule, first.variance, dict(first.statistics)) == before
    with pytest.raises(AttributeError):
        first.schedule = (0,)
    first.save(tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    second.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == content
    third.save(tmp_path / "a")
    assert load_calibration(tmp_path / "a").schedule == (0, 4)


def test_failed_save_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    calibration, path = full_calibration(), tmp_path / "calibration.safetensors"
    calibration.save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        replace(calibration, notes={"made": object()}).save(path)

    def full_disk(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("qandc_core.files.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        calibration.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def refused(path, words, error=ValueError):
    with pytest.raises(error, match=words) as caught:
        load_calibration(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "calibration.safetensors"
    full_calibration().save(path)
    content = path.read_bytes()
    for size in (0, 7, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        refused(path, "not a complete safetensors file")
    path.write_bytes(np.random.default_rng(0).bytes(3000))
    refused(path, "not a complete safetensors file")
    save_dit(dit(), path)
    refused(path, "not a calibration file")
    refused(tmp_path / "absent", "There is no calibration file", FileNotFoundError)
    refused(tmp_path, "There is no calibration file", FileNotFoundError)


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda t, h: h.update(version=99), "has calibration format 99, this version reads 1"),
        (lambda t, h: h.update(format="qandc-quantized-dit"), "not a calibration file"),
        (lambda t, h: t.pop("statistics/blocks.0.attn.qkv/low"), "lacks 'statistics/blocks.0.attn.qkv/low'"),
        (lambda t, h: t.pop("statistics/blocks.1.mlp.fc1/count"), "lacks 'statistics/blocks.1.mlp.fc1/count'"),
        (lambda t, h: t.pop("variance/mean"), "lacks 'variance/mean'"),
        (lambda t, h: h.pop("model"), "lacks 'model'"),
    ],
)
def test_edited_files_are_refused_in_one_sentence(tmp_path, edit, words):
    path = tmp_path / "calibration.safetensors"
    full_calibration().save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["qandc"])
    edit(tensors, header)
    save_file(tensors, path, {"qandc": json.dumps(header)})
    refused(path, words)


# Fingerprints.


def test_fingerprint_depends_on_the_weights_alone(tmp_path):
    model = dit()
    expected = fingerprint(model)
    assert len(expected) == 32
    assert fingerprint(dit()) == fingerprint(apply_cache_to_dit(dit(), 3)) == fingerprint(dit().train()) == expected
    for name, tensor in model.state_dict().items():
        kept = tensor.clone()
        tensor.add_(0.01)
        assert fingerprint(model) != expected, name
        tensor.copy_(kept)
    assert fingerprint(model) == expected


def test_calibration_of_another_model_is_refused_in_one_sentence():
    calibration = full_calibration()
    calibration.check_model(dit())
    with pytest.raises(ValueError, match="made for another model") as caught:
        calibration.check_model(dit(seed=1))
    message = str(caught.value)
    assert "\n" not in message and calibration.model[:8] in message and fingerprint(dit(seed=1))[:8] in message
    with pytest.raises(ValueError, match="made for another model"):
        quantize_model(dit(seed=1), calibration=calibration)
    with pytest.raises(ValueError, match="no statistics for absent"):
        calibration.layer("absent")
