import copy
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from qandc_core.calibration.file import Calibration, fingerprint
from qandc_core.calibration.statistics import LayerStatistics
from qandc_core.checkpoints import load_dit, save_dit
from qandc_core.checkpoints.quantized import load_quantized, save_quantized
from qandc_core.models import DiT, DiTConfig, preset
from qandc_core.models.layers import named_linears
from qandc_core.quantization.clipping import CLIPPINGS, activation_bounds
from qandc_core.quantization.gptq import gptq_codes
from qandc_core.quantization.grids import (
    affine_grid,
    dequantize,
    pack_int4,
    quantize,
    symmetric_grid,
    token_grid,
    unpack_int4,
    weight_grid,
)
from qandc_core.quantization.linear import LinearFormat, QuantizedLinear
from qandc_core.quantization.model import QuantizationConfig, linear_weight_bytes, quantize_model, quantized_layers

SKIP = ["pos_embed", "norm"]
TINY = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=10)

BITS = st.integers(2, 8)
VALUES = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40)


pytestmark = pytest.mark.usefixtures("no_grad")


def dit(config=TINY, seed=0):
    torch.manual_seed(seed)
    return DiT(config).eval()


def inputs(config=TINY, count=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, config.in_channels, config.input_size, config.input_size, generator=generator)
    t = torch.randint(0, 1000, (count,), generator=generator)
    return x, t, torch.arange(count) % (config.num_classes + 1)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def calibrated(model, hessians=False, batches=3):
    """Calibration of every linear layer on random inputs of the model, and those inputs by layer."""
    seen = {name: [] for name, _ in named_linears(model)}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, layer in named_linears(model)
    ]
    for _ in range(batches):
        model(*inputs(model.config, 4))
    for handle in handles:
        handle.remove()
    rows = {name: torch.cat(parts) for name, parts in seen.items()}
    statistics = {name: LayerStatistics.empty(x.shape[1], hessians) for name, x in rows.items()}
    for name, x in rows.items():
        statistics[name].update(x)
    return Calibration(fingerprint(model), statistics), rows


# Eq. 1-3 as METHOD.md states them, unsigned.


def paper_affine(x, bits, low, high):
    levels = np.float32(2**bits - 1)
    low, high = min(np.float32(low), np.float32(0)), max(np.float32(high), np.float32(0))
    scale = max((high - low) / levels, np.float32(1e-12))
    zero = np.clip(np.round(-low / scale), 0, levels)
    codes = np.clip(np.round(x / scale) + zero, 0, levels)
    return codes, scale, zero


def paper_symmetric(x, bits, absmax):
    high = np.float32(2 ** (bits - 1) - 1)
    scale = max(np.float32(absmax) / high, np.float32(1e-12))
    return np.clip(np.round(x / scale), -high, high), scale


@given(VALUES, BITS)
@settings(max_examples=150, deadline=None)
def test_affine_quantizer_is_that_of_the_paper(values, bits):
    x = np.array(values, dtype=np.float32)
    codes, scale, zero = paper_affine(x, bits, x.min(), x.max())
    grid = affine_grid(torch.tensor(x.min()), torch.tensor(x.max()), bits)
    ours = quantize(torch.from_numpy(x), grid)
    half = 2 ** (bits - 1)
    assert np.array_equal(ours.numpy(), codes - half)
    assert float(grid.scale) == scale and float(grid.zero) == zero - half
    assert np.array_equal(dequantize(ours, grid).numpy(), scale * (codes - zero))


@given(VALUES, BITS)
@settings(max_examples=150, deadline=None)
def test_symmetric_quantizer_against_numpy(values, bits):
    x = np.array(values, dtype=np.float32)
    codes, scale = paper_symmetric(x, bits, np.abs(x).max())
    grid = symmetric_grid(torch.from_numpy(x).abs().max(), bits)
    ours = quantize(torch.from_numpy(x), grid)
    assert np.array_equal(ours.numpy(), codes)
    assert np.array_equal(dequantize(ours, grid).numpy(), scale * codes)
    assert quantize(3 * grid.high * grid.scale * torch.tensor([-1, 1]), grid).tolist() == [-grid.high, grid.high]


@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32), BITS)
@settings(max_examples=150, deadline=None)
def test_zero_is_exact_and_the_error_within_bounds_is_half_a_step(a, b, bits):
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    x = torch.lerp(low.clamp(max=0), high.clamp(min=0), torch.linspace(0, 1, 101))
    for grid in (affine_grid(low, high, bits), symmetric_grid(torch.maximum(-low, high), bits)):
        assert float(dequantize(quantize(torch.zeros(1), grid), grid)) == 0
        error = (dequantize(quantize(x, grid), grid) - x).abs().max()
        assert float(error) <= float(grid.scale) * 0.5001
        assert quantize(x, grid).unique().numel() <= 2**bits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_weights_have_one_grid_for_each_output_channel(symmetric, bits):
    torch.manual_seed(0)
    weight = torch.randn(6, 20) * torch.logspace(-3, 2, 6)[:, None] + 0.1
    codes = quantize(weight, weight_grid(weight, bits, symmetric))
    for row, ours in zip(weight.numpy(), codes.numpy()):
        if symmetric:
            expected, _ = paper_symmetric(row, bits, np.abs(row).max())
        else:
            expected = paper_affine(row, bits, row.min(), row.max())[0] - 2 ** (bits - 1)
        assert np.array_equal(ours, expected)


def test_tokens_have_one_symmetric_grid_each():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    scaled = x * torch.tensor([1, 2, 1024, 2**-9, 1])[:, None]  # powers of two change no code
    assert torch.equal(quantize(x, token_grid(x, 8)), quantize(scaled, token_grid(scaled, 8)))
    expected = [paper_symmetric(row, 8, np.abs(row).max())[0] for row in x.numpy()]
    assert np.array_equal(quantize(x, token_grid(x, 8)).numpy(), np.stack(expected))


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_int4_packing_round_trip(rows, pairs, seed):
    codes = torch.randint(-8, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (rows, pairs) and packed.dtype == torch.uint8
    assert torch.equal(unpack_int4(packed), codes)
    assert torch.equal(packed & 15, (codes[:, ::2] + 8).to(torch.uint8))  # even columns in the low nibble


# The layer.


def linear(width=24, out=10, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(width, out, bias)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("symmetric_weights", [True, False])
@pytest.mark.parametrize("lean", [1, -1])
def test_static_layer_against_numpy(clipping, symmetric, symmetric_weights, lean):
    model, x = nn.Sequential(linear()), torch.randn(200, 24) * 2 + lean
    statistics = LayerStatistics.empty(24)
    statistics.update(x)
    config = QuantizationConfig(
        clipping=clipping, symmetric_activations=symmetric, symmetric_weights=symmetric_weights, percentile=99
    )
    low, high = activation_bounds(statistics, clipping, 8, 99, symmetric)
    weight, bias = model[0].weight.numpy(), model[0].bias.numpy()
    quantize_model(model, calibration=Calibration(fingerprint(model), {"0": statistics}), config=config)

    if symmetric:
        codes, scale = paper_symmetric(x.numpy(), 8, max(-low, high))
        rounded = codes * scale
    else:
        codes, scale, zero = paper_affine(x.numpy(), 8, low, high)
        rounded = scale * (codes - zero)
    rows = []
    for row in weight:
        if symmetric_weights:
            codes, scale = paper_symmetric(row, 8, np.abs(row).max())
            rows.append(codes * scale)
        else:
            codes, scale, zero = paper_affine(row, 8, row.min(), row.max())
            rows.append((codes - zero) * scale)
    expected = rounded.astype(np.float64) @ np.stack(rows).astype(np.float64).T + bias
    assert np.abs(model(x).numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.allclose(model[0].weight.numpy(), np.stack(rows), rtol=1e-6, atol=0)


def test_dynamic_layer_treats_each_token_alone():
    model = quantize_model(nn.Sequential(linear(bias=False)))
    x = torch.randn(7, 24)
    x[3] *= 1000
    together = model(x)
    assert torch.equal(together, torch.cat([model(row[None]) for row in x]))
    assert torch.equal(model(x * 4), together * 4)
    assert torch.equal(model(torch.zeros(2, 24)), torch.zeros(2, 10))


def test_odd_width_falls_back_to_eight_bits():
    model = quantize_model(nn.Sequential(linear(25)), w_bits=4)
    assert model[0].format.w_bits == 8 and model[0].weight_codes().shape == (10, 25)


def test_more_bits_are_closer():
    x, t, y = inputs()
    exact = dit()(x, t, y)
    errors = [relative(quantize_model(dit(), w_bits=b)(x, t, y), exact) for b in (8, 6, 4, 2)]
    assert errors == sorted(errors) and errors[0] < 0.02


# GPTQ.


def correlated(width, rows=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 3, width, generator=generator)
    return torch.randn(rows, width // 3, generator=generator) @ mix + 0.1 * torch.randn(
        rows, width, generator=generator
    )


def hessian_error(weight, codes, grid, hessian):
    gap = (weight - dequantize(codes, grid)).double()
    return float(torch.einsum("nk,kj,nj->", gap, hessian.double(), gap))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_beats_nearest_rounding_on_correlated_inputs(bits, symmetric, seed):
    x, weight = correlated(48, seed=seed), linear(48, 16, seed=seed).weight
    grid, hessian = weight_grid(weight, bits, symmetric), x.T @ x
    nearest = hessian_error(weight, quantize(weight, grid), grid, hessian)
    assert hessian_error(weight, gptq_codes(weight, hessian, grid), grid, hessian) < 0.7 * nearest


def textbook_gptq(weight, hessian, scale, high, damping=0.01):
    """Optimal brain surgeon, one column after the other, with a fresh inverse each time."""
    w, h = weight.astype(np.float64).copy(), hessian.astype(np.float64)
    h = h + damping * np.diag(h).mean() * np.eye(len(h))
    codes = np.zeros_like(w)
    for j in range(w.shape[1]):
        inverse = np.linalg.inv(h[j:, j:])
        codes[:, j] = np.clip(np.round(w[:, j] / scale), -high, high)
        error = (w[:, j] - scale * codes[:, j]) / inverse[0, 0]
        w[:, j:] -= np.outer(error, inverse[0])
    return codes


@pytest.mark.parametrize("block", [1, 7, 16, 128])
def test_gptq_is_the_textbook_algorithm_for_every_block_size(block):
    x, weight = correlated(40), linear(40, 12).weight
    grid = weight_grid(weight, 4, True)
    codes = gptq_codes(weight, x.T @ x, grid, block=block).numpy()
    assert np.array_equal(codes, textbook_gptq(weight.numpy(), (x.T @ x).numpy(), grid.scale[:, 0].numpy(), 7))


def test_gptq_with_uncorrelated_inputs_is_nearest_rounding():
    weight = linear(40, 12).weight
    for symmetric in (True, False):
        grid = weight_grid(weight, 4, symmetric)
        codes = gptq_codes(weight, torch.diag(torch.rand(40) + 0.1), grid)
        assert torch.equal(codes, quantize(weight, grid))


def test_gptq_rounds_inputs_that_never_occur_to_nearest():
    x, weight = correlated(24), linear().weight
    x[:, [0, 5, 23]] = 0
    grid = weight_grid(weight, 4, True)
    codes, alive = gptq_codes(weight, x.T @ x, grid), [k for k in range(24) if k not in (0, 5, 23)]
    assert torch.equal(codes[:, [0, 5, 23]], quantize(weight, grid)[:, [0, 5, 23]])
    assert torch.equal(codes[:, alive], gptq_codes(weight[:, alive], x[:, alive].T @ x[:, alive], grid))
    assert torch.equal(gptq_codes(weight, torch.zeros(24, 24), grid), quantize(weight, grid))


def test_gptq_through_quantize_model_lowers_the_layer_errors():
    model = dit()
    calibration, rows = calibrated(model, hessians=True)

    def error(rounding):
        config = QuantizationConfig(static=False, rounding=rounding)
        layers = quantized_layers(quantize_model(dit(), 4, 8, SKIP, calibration, config))
        return {n: relative(rows[n] @ layer.weight.T, rows[n] @ named[n].weight.T) for n, layer in layers.items()}

    named = dict(named_linears(model))
    nearest, gptq = error("nearest"), error("gptq")
    assert len(gptq) == 2 * 4 + 2 and all(gptq[name] < nearest[name] for name in gptq)


# quantize_model.


def narrow_diffusers(depth):
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=depth, sample_size=8, num_embeds_ada_norm=10
    ).eval()


def test_counts_on_the_published_sizes():
    ours = DiT(preset("DiT-XL/2"), device="meta")
    with torch.device("meta"):
        theirs = DiTTransformer2DModel(out_channels=8)
    assert len(list(named_linears(ours, SKIP))) == 28 * 4 + 2 == 114
    assert len(list(named_linears(theirs, SKIP))) == 28 * 6 + 2 == 170


def test_quantizes_28_blocks_in_place():
    ours = dit(DiTConfig(input_size=8, hidden_size=16, depth=28, num_heads=2, num_classes=10))
    theirs = narrow_diffusers(28)
    for model, count in ((ours, 114), (theirs, 170)):
        left = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        chosen = {n for n, _ in named_linears(model, SKIP)}
        kept = {n: model.get_submodule(n) for n in left - chosen}
        x, t, y = inputs(TINY)
        exact = model(x, t, y)
        assert quantize_model(model, w_bits=8, a_bits=8, skip_patterns=SKIP) is model
        assert set(quantized_layers(model)) == chosen and len(chosen) == count
        assert all(model.get_submodule(n) is layer for n, layer in kept.items())
        out = model(x, t, y)
        out, exact = (out, exact) if model is ours else (out.sample, exact.sample)
        assert torch.isfinite(out).all() and relative(out, exact) < 0.05


def test_without_patterns_every_linear_layer_is_quantized():
    for model in (dit(), narrow_diffusers(2)):
        quantize_model(model)
        assert not any(isinstance(m, nn.Linear) for m in model.modules())
        assert torch.isfinite(torch.as_tensor(model(*inputs())[0])).all()


@pytest.mark.parametrize("bits", [{"w_bits": 1}, {"w_bits": 9}, {"a_bits": 1}, {"a_bits": 16}])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="between 2 and 8"):
        quantize_model(dit(), **bits)


def test_no_layer_left():
    with pytest.raises(ValueError, match="No linear layer is left"):
        quantize_model(dit(), skip_patterns=[""])
    with pytest.raises(ValueError, match="No linear layer is left"):
        quantize_model(quantize_model(dit()))


def test_unknown_choices():
    with pytest.raises(ValueError, match="rounding must be one of nearest, gptq"):
        QuantizationConfig(rounding="adaround")
    with pytest.raises(ValueError, match="backend must be one of"):
        QuantizationConfig(backend="cublas")
    calibration, _ = calibrated(dit())
    with pytest.raises(ValueError, match="clipping must be one of"):
        quantize_model(dit(), calibration=calibration, config=QuantizationConfig(clipping="entropy"))


@pytest.mark.parametrize("config", [QuantizationConfig(static=True), QuantizationConfig(rounding="gptq")])
def test_choices_that_need_a_calibration(config):
    with pytest.raises(ValueError, match="need calibration="):
        quantize_model(dit(), config=config)


def unchanged(model, before):
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_refused_before_any_layer_is_replaced(value):
    model = dit()
    model.final_layer.linear.weight[0, 0] = value  # the last layer but one
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="final_layer.linear holds values that are not finite"):
        quantize_model(model)
    assert [type(m) for m in model.modules()] == kinds


def test_missing_statistics_leave_the_model_alone():
    model = dit()
    calibration, _ = calibrated(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="calibrate with hessians"):
        quantize_model(model, calibration=calibration, config=QuantizationConfig(rounding="gptq"))
    fewer = {n: s for n, s in calibration.statistics.items() if n != "final_layer.linear"}
    with pytest.raises(ValueError, match="no statistics for final_layer.linear"):
        quantize_model(model, calibration=replace(calibration, statistics=fewer))
    with pytest.raises(ValueError, match="made for another model"):
        quantize_model(dit(seed=1), calibration=calibration)
    assert unchanged(model, before)


def test_quantized_model_has_the_fingerprint_of_its_source():
    model = dit()
    source, other = fingerprint(model), fingerprint(dit(seed=1))
    calibration, _ = calibrated(model)
    quantize_model(model, calibration=calibration)
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) == source != other
    calibration.check_model(model)


# Size, copies, dtypes.


@pytest.mark.parametrize("width, heads", [(768, 12), (128, 4)])
@pytest.mark.parametrize("static", [True, False])
def test_weights_really_shrink(width, heads, static):
    config = DiTConfig(input_size=8, hidden_size=width, depth=1, num_heads=heads, num_classes=10)
    calibration, _ = calibrated(dit(config), batches=1)
    for bits, limit in ((8, 0.27), (4, 0.16)):
        model = dit(config)
        names = [n for n, _ in named_linears(model, SKIP)]
        before = sum(model.get_submodule(n).weight.nbytes for n in names)
        others = linear_weight_bytes(model) - before
        quantize_model(model, bits, 8, SKIP, calibration, QuantizationConfig(static=static, symmetric_weights=False))
        held = [t for n in names for t in model.get_submodule(n).buffers()]
        assert sum(t.nbytes for t in held) <= limit * before
        assert linear_weight_bytes(model) - others <= limit * before


@pytest.mark.parametrize("static", [True, False])
def test_deep_copies_and_state_dicts_work(static):
    calibration = calibrated(dit())[0] if static else None
    model, batch = quantize_model(dit(), 4, 8, SKIP, calibration), inputs()
    out, twin = model(*batch), copy.deepcopy(model)
    assert torch.equal(twin(*batch), out)
    twin.blocks[0].attn.qkv.weight_scale.zero_()
    assert torch.equal(model(*batch), out) and not torch.equal(twin(*batch), out)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(*batch), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_stay_float32_when_the_model_is_cast(dtype):
    calibration, _ = calibrated(dit())
    model = quantize_model(dit(), skip_patterns=SKIP, calibration=calibration)
    before = {n: layer.row_sums.clone() for n, layer in quantized_layers(model).items()}
    x, t, y = inputs()
    out = model(x, t, y)
    model.to(dtype)
    for name, layer in quantized_layers(model).items():
        assert {b.dtype for b in layer.buffers()} == {torch.int8, torch.float32}
        assert torch.equal(layer.row_sums, before[name]) and layer.bias.dtype == dtype
    assert relative(model(x.to(dtype), t, y).float(), out) < 0.02
    assert model(x.to(dtype), t, y).dtype == dtype


# Files.


def quantized(tmp_path, w_bits=4, static=True, **config):
    calibration = calibrated(dit())[0]
    model = quantize_model(dit(), w_bits, 8, SKIP, calibration, QuantizationConfig(static=static, **config))
    path = tmp_path / "new" / "model.safetensors"
    save_quantized(model, path)
    return model, path


@pytest.mark.parametrize("w_bits", [8, 7, 4])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_file_round_trip_is_exact(tmp_path, w_bits, static, symmetric):
    model, path = quantized(tmp_path, w_bits, static, symmetric_weights=symmetric)
    for loaded in (load_quantized(path), load_dit(path), load_dit(str(path))):
        assert isinstance(loaded, DiT) and loaded.config == model.config and not loaded.training
        assert [(n, layer.format) for n, layer in quantized_layers(loaded).items()] == [
            (n, layer.format) for n, layer in quantized_layers(model).items()
        ]
        assert {layer.backend for layer in quantized_layers(loaded).values()} == {"auto"}
        assert unchanged(loaded, model.state_dict())
        assert torch.equal(loaded(*inputs()), model(*inputs()))
        assert fingerprint(loaded) == fingerprint(dit())
    assert os.listdir(path.parent) == ["model.safetensors"]


def test_file_keeps_what_shapes_do_not_tell(tmp_path):
    config = replace(TINY, num_heads=2, mlp_ratio=2.5, learn_sigma=False, norm2_eps=1.3e-5, frequency_shift=1)
    model = quantize_model(dit(config).bfloat16(), w_bits=4)
    save_quantized(model, tmp_path / "a.safetensors")
    loaded = load_dit(tmp_path / "a.safetensors")
    assert loaded.config == config and loaded.pos_embed.dtype == torch.bfloat16
    x, t, y = inputs()
    assert torch.equal(loaded(x.bfloat16(), t, y), model(x.bfloat16(), t, y))
    wide = load_dit(tmp_path / "a.safetensors", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert wide(x, t, y).dtype == torch.float32
    assert {p.device.type for p in load_dit(tmp_path / "a.safetensors", device="meta").parameters()} == {"meta"}


def test_file_is_small(tmp_path):
    config = replace(TINY, hidden_size=128, num_heads=4)
    model = dit(config)
    save_dit(model, tmp_path / "full.safetensors")
    save_quantized(quantize_model(model, w_bits=4), tmp_path / "four.safetensors")
    assert os.path.getsize(tmp_path / "four.safetensors") < 0.25 * os.path.getsize(tmp_path / "full.safetensors")


def test_quantized_model_loaded_from_a_file_matches_its_calibration(tmp_path):
    _, path = quantized(tmp_path)
    calibrated(dit())[0].check_model(load_dit(path))


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    model, path = quantized(tmp_path)
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("qandc_core.files.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_quantized(model, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["model.safetensors"]


def test_only_quantized_dits_are_saved(tmp_path):
    for model in (dit(), quantize_model(narrow_diffusers(1))):
        with pytest.raises(ValueError, match="DiT with quantized layers"):
            save_quantized(model, tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


def refused(path, words, load=load_quantized, error=ValueError):
    with pytest.raises(error, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_are_refused_in_one_sentence(tmp_path):
    _, path = quantized(tmp_path)
    content = path.read_bytes()
    for size in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        refused(path, "truncated or not a safetensors file")
        refused(path, "truncated or not a safetensors file", load_dit)
    path.write_text("not a model")
    refused(path, "truncated or not a safetensors file")
    refused(tmp_path / "absent.safetensors", "no quantized DiT", error=FileNotFoundError)
    save_dit(dit(), path)
    refused(path, "not a quantized DiT")
    save_file({"a": torch.zeros(1)}, path, {"qandc": "not json"})
    refused(path, "not a quantized DiT")


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda t, h: t.pop("blocks.0.attn.qkv.codes"), "lacks blocks.0.attn.qkv.codes"),
        (lambda t, h: t.update(extra=torch.zeros(1)), "should not hold extra"),
        (lambda t, h: t.update({"pos_embed": torch.zeros(1, 4, 32)}), r"pos_embed has the shape \(1, 4, 32\)"),
        (lambda t, h: t.update({"pos_embed": t["pos_embed"].int()}), "of torch.int32, expected"),
        (lambda t, h: h["config"].update(hidden_size=64), "has the shape"),
        (lambda t, h: h.update(version=2), "has format 2, this version reads 1"),
        (lambda t, h: h.update(format="other"), "not a quantized DiT"),
    ],
)
def test_edited_files_are_refused_in_one_sentence(tmp_path, edit, words):
    _, path = quantized(tmp_path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["qandc"])
    edit(tensors, header)
    save_file(tensors, path, {"qandc": json.dumps(header)})
    refused(path, words)


def test_load_dit_leaves_other_sources_alone(tmp_path):
    model = dit()
    save_dit(model, tmp_path / "plain.safetensors")
    loaded = load_dit(tmp_path / "plain.safetensors")
    assert not quantized_layers(loaded) and unchanged(loaded, model.state_dict())
    with pytest.raises(FileNotFoundError, match="no DiT checkpoint"):
        load_dit(tmp_path / "absent.safetensors")


def test_layer_describes_itself():
    layer = QuantizedLinear(8, 4, True, LinearFormat(4, 8, static=True), "simulated")
    assert layer.extra_repr() == "8, 4, W4A8, activations static, simulated"
