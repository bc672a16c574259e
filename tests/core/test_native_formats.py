import json
from itertools import product

import comfy_kitchen
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import AsymW4A8Int8Layout, QuantizedTensor, TensorWiseINT8Layout
from torch import nn

from qandc_core.calibration.statistics import SAMPLING_DAMPING, LayerStatistics
from qandc_core.quantization.formats import BY_NAME, finer, fitting, packed_format
from qandc_core.quantization.formats.grouped import Grouped, GroupedGrid
from qandc_core.quantization.formats.w4a8 import W4A8
from qandc_core.quantization.formats.w6a8 import W6A8
from qandc_core.quantization.formats.w8a8 import int8_grid, row_errors
from qandc_core.quantization.grids import quantize, unpack_int4
from qandc_core.quantization.native import (
    NativeConfig,
    dequantize,
    format_of,
    held_out_error,
    kernel_output,
    layer_config,
    output_error,
    quantize_weight,
)
from qandc_core.quantization.rotation import ROTATIONS, hadamard, rotate, rotate_fast, rotate_hessian, rotation_group

FORMATS = tuple(BY_NAME)
SHAPES = ((24, 1152), (32, 256), (16, 48), (12, 16), (8, 320))

pytestmark = pytest.mark.usefixtures("no_grad")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(rows, width, seed=0):
    return torch.randn(rows, width, generator=seeded(seed)) / width**0.5


def heavy(rows, width, seed=0):
    """Cubed normal values: single weights far outside."""
    return torch.randn(rows, width, generator=seeded(seed)) ** 3


def sparse(rows, width, seed=0):
    """Sparse in the rotated basis, where the stock quantizer fits a codebook of its own."""
    kept = torch.rand(rows, width, generator=seeded(seed)) < 0.2
    return rotate(heavy(rows, width, seed + 1) * kept, rotation_group(width))


WEIGHTS = (gaussian, heavy, sparse)


def inputs(width, rows, seed, offset=0.5):
    """Correlated inputs with a mean and eight large channels: one distribution, `seed` draws the sample."""
    shared = seeded(1000)
    mix, mean = torch.randn(width // 4, width, generator=shared), torch.randn(width, generator=shared)
    scale = torch.ones(width).index_fill(0, torch.randperm(width, generator=shared)[:8], 10)
    sample = seeded(seed)
    x = torch.randn(rows, width // 4, generator=sample) @ mix / (width // 4) ** 0.5
    return (x + 0.1 * torch.randn(rows, width, generator=sample) + offset * mean) * scale


def statistics_of(x, hessian=True):
    statistics = LayerStatistics.empty(x.shape[1], hessian)
    statistics.update(x)
    return statistics


def quantized(weight, format="W8A8", rounding="nearest", x=None, bias=None, bias_correction=False, **choices):
    config = NativeConfig(format, rounding, bias_correction=bias_correction, **choices)
    return quantize_weight("blocks.0.fc", weight, bias, config, None if x is None else statistics_of(x))


def wrapped(layer, shape):
    """The tensors as ComfyUI wraps them."""
    tensors, config = layer.tensors, layer.config
    common = {
        "orig_dtype": torch.float32, "orig_shape": tuple(shape), "convrot_groupsize": config["convrot_groupsize"],
    }  # fmt: skip
    if config["format"] == "int8_tensorwise":
        layout = TensorWiseINT8Layout
        params = layout.Params(scale=tensors["weight_scale"], convrot=config["convrot"], **common)
    else:
        layout = AsymW4A8Int8Layout
        params = layout.Params(
            scale=tensors["weight_s_rel"], s_channel=tensors["weight_s_channel"],
            codebook=tensors.get("weight_codebook"), group_size=config["group_size"], **common,
        )  # fmt: skip
    return QuantizedTensor(tensors["weight"], layout.__name__, params)


def relative(a, b):
    return float((a - b).norm() / b.norm())


# The rotation.


@pytest.mark.parametrize("group", ROTATIONS)
def test_rotation_is_symmetric_and_orthogonal(group):
    matrix = hadamard(group)
    assert torch.equal(matrix, matrix.T) and torch.equal(matrix.abs(), torch.full_like(matrix, group**-0.5))
    assert torch.equal(matrix @ matrix, torch.eye(group))
    x = torch.randn(5, 2 * group, generator=seeded(0))
    assert torch.allclose(rotate(rotate(x, group), group), x, atol=1e-5)
    assert torch.allclose(rotate_fast(x, group), rotate(x, group), atol=1e-5)


@pytest.mark.parametrize("group", ROTATIONS)
def test_rotated_layer_computes_the_same(group):
    x, weight = inputs(512, 20, 0), gaussian(8, 512)
    assert torch.allclose(rotate(x, group) @ rotate(weight, group).T, x @ weight.T, atol=1e-4)


def test_rotation_is_that_of_the_kernel():
    """int8_linear rotates the inputs: with an identity for weight it returns them rotated, up to its rounding."""
    for group in ROTATIONS:
        x, identity = torch.randn(4, group, generator=seeded(0)), torch.eye(group, dtype=torch.int8)
        y = comfy_kitchen.int8_linear(x, identity, torch.ones(group), None, torch.float32, True, group)
        assert relative(y, rotate(x, group)) < 0.02


def test_rotation_groups():
    groups = {3072: 256, 1152: 64, 48: 16, 20: 4, 30: None, 7: None}
    assert {width: rotation_group(width) for width in groups} == groups


@pytest.mark.parametrize(("width", "group"), [(48, 16), (256, 64), (512, 256)])
def test_rotated_hessian_is_that_of_rotated_inputs(width, group):
    x = inputs(width, 100, 0).double()
    rotated = rotate(x, group)
    assert torch.allclose(rotate_hessian(x.T @ x, group), rotated.T @ rotated, rtol=1e-9, atol=1e-9)


# The tensors.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("format", FORMATS)
def test_decoder_is_that_of_comfy_kitchen_bit_for_bit(format, weights, shape):
    layer = quantized(weights(*shape), format)
    assert torch.equal(dequantize(layer.tensors), wrapped(layer, shape).dequantize())


@pytest.mark.parametrize("format", FORMATS)
def test_decoder_on_random_codes(format):
    layer = quantized(gaussian(16, 64), format)
    layer.tensors["weight"] = torch.randint(-128, 128, layer.tensors["weight"].shape, dtype=torch.int8)
    assert torch.equal(dequantize(layer.tensors), wrapped(layer, (16, 64)).dequantize())


def test_decoder_without_rotation():
    scale, codes = torch.rand(4, 1), torch.randint(-127, 128, (4, 10), dtype=torch.int8)
    conf = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    tensors = {"weight": codes, "weight_scale": scale, "comfy_quant": conf}
    assert torch.equal(dequantize(tensors), codes.float() * scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_nearest_rounding_without_clipping_is_comfy_kitchens(weights, shape):
    weight = weights(*shape)
    group = rotation_group(shape[1])
    ours = quantized(weight, "W8A8", clip_search=False).tensors
    codes, params = TensorWiseINT8Layout.quantize(weight, per_channel=True, convrot=True, convrot_groupsize=group)
    assert torch.equal(ours["weight"], codes) and torch.equal(ours["weight_scale"], params.scale)
    ours = quantized(weight, "W4A8").tensors
    codes, params = AsymW4A8Int8Layout.quantize(weight, convrot_groupsize=group)
    assert torch.equal(ours["weight"], codes)
    assert torch.equal(ours["weight_s_rel"].float(), params.scale.float())
    assert torch.equal(ours["weight_s_channel"], params.s_channel)
    assert torch.equal(ours["weight_codebook"], params.codebook)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 32 == 0])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_six_bits_are_comfy_kitchens(weights, shape):
    """The stored bytes hold all 64 codes, of which weights use those from 1."""
    weight = weights(*shape)
    ours = quantized(weight, "W6A8").tensors
    codes, params = AsymW4A8Int8Layout.quantize(weight, convrot_groupsize=rotation_group(shape[1]), bits=6)
    assert torch.equal(ours["weight"], codes) and torch.equal(ours["weight_s_channel"], params.s_channel)
    assert torch.equal(ours["weight_s_rel"].float(), params.scale.float()) and params.codebook is None
    assert int(W6A8.unpack(codes).min()) >= 1
    every = torch.arange(64, dtype=torch.int8).expand(3, 64)
    assert torch.equal(W6A8.unpack(W6A8.pack(every)), every)


@pytest.mark.parametrize("rows", [40, 300])
def test_six_bit_gptq_is_the_column_by_column_reference(rows):
    weight, x = gaussian(8, 96), inputs(96, rows, 0)
    rotated, hessian = rotated_by_hand(weight, x, 16)
    layer = quantized(weight, "W6A8", "gptq", x).tensors
    scale, relative_scale = layer["weight_s_channel"].double().numpy(), layer["weight_s_rel"].float().numpy()
    values = [
        np.clip(np.round(np.arange(-31, 32) * relative_scale[:, k // 16, None]), -127, 127) * scale[:, None]
        for k in range(96)
    ]
    expected = reference_codes(rotated, hessian, values, 0.01 + SAMPLING_DAMPING * 96 / rows)
    assert (W6A8.unpack(layer["weight"]).numpy() - 1 != expected).mean() < 0.03


def test_a_comfy_kitchen_without_six_bits(monkeypatch):
    """W6A8 is refused, and promotion goes past it."""

    def older(weight, group_size=16, convrot_groupsize=256):
        raise AssertionError("unused")

    monkeypatch.setattr(comfy_kitchen, "quantize_w4a8_int8_weight", older)
    with pytest.raises(ValueError, match=r"^W6A8 needs comfy-kitchen 0\.2\.36 or newer, this is 0.*, or choose W8A8"):
        quantized(gaussian(8, 32), "W6A8")
    assert [format.name for format in finer(W4A8)] == ["W8A8"]


def test_sparse_weights_have_a_codebook_of_their_own():
    def codebook(weights):
        return quantized(weights(32, 256), "W4A8").tensors["weight_codebook"]

    assert torch.equal(codebook(heavy), codebook(gaussian))
    assert not torch.equal(codebook(sparse), codebook(gaussian))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_tensors_are_those_that_comfyui_reads(rounding):
    weight, bias = gaussian(24, 512), torch.zeros(24)
    int8, w4a8 = (quantized(weight, f, rounding, inputs(512, 600, 0), bias) for f in ("W8A8", "W4A8"))
    described = {name: (tuple(t.shape), t.dtype) for name, t in int8.tensors.items() if name != "comfy_quant"}
    assert described == {
        "weight": ((24, 512), torch.int8), "weight_scale": ((24, 1), torch.float32), "bias": ((24,), torch.float32),
    }  # fmt: skip
    described = {name: (tuple(t.shape), t.dtype) for name, t in w4a8.tensors.items() if name != "comfy_quant"}
    assert described == {
        "weight": ((24, 256), torch.int8),
        "weight_s_rel": ((24, 32), torch.float8_e4m3fn),
        "weight_s_channel": ((24,), torch.float32),
        "weight_codebook": ((16,), torch.float32),
        "bias": ((24,), torch.float32),
    }
    assert int8.tensors["comfy_quant"].numpy().tobytes() == (
        b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
    )
    assert w4a8.tensors["comfy_quant"].numpy().tobytes() == (
        b'{"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 256}'
    )
    for layer in (int8, w4a8):
        assert all(t.is_contiguous() for t in layer.tensors.values())
        assert layer.config == layer_config(layer.tensors) == json.loads(bytes(layer.tensors["comfy_quant"].tolist()))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("format", FORMATS)
def test_linear_on_our_tensors_is_the_int8_kernel(format, rounding):
    weight, bias, x = gaussian(16, 64), torch.randn(16, generator=seeded(3)), inputs(64, 12, 5)
    layer = quantized(weight, format, rounding, inputs(64, 200, 0), bias)
    y = F.linear(x, wrapped(layer, weight.shape), bias)
    if format == "W8A8":
        codes, scale = layer.tensors["weight"], layer.tensors["weight_scale"]
    else:
        scale = layer.tensors["weight_s_channel"]
        codes = (rotate(dequantize(layer.tensors), 64) / scale[:, None]).round().to(torch.int8)
    assert torch.equal(y, comfy_kitchen.int8_linear(x, codes, scale, bias, torch.float32, True, 64))
    assert relative(y, F.linear(x, dequantize(layer.tensors), bias)) < 0.02  # activations in int8


def test_weights_of_half_precision():
    weight = gaussian(16, 64).bfloat16()
    for format in FORMATS:
        layer, exact = quantized(weight, format), quantized(weight.float(), format)
        assert all(torch.equal(layer.tensors[k].float(), exact.tensors[k].float()) for k in exact.tensors)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_of_zeros_stays_zero(format, rounding):
    layer = quantized(torch.zeros(8, 32), format, rounding, inputs(32, 50, 0))
    assert layer.error == 0 and not dequantize(layer.tensors).any()


# The grids.


@pytest.mark.parametrize("weights", WEIGHTS)
def test_clip_search_never_increases_the_error(weights):
    rotated = rotate(weights(40, 256), 64)
    full, clipped = (row_errors(rotated, int8_grid(rotated, search)) for search in (False, True))
    assert (clipped <= full).all()


def test_clip_search_lowers_the_error_of_rows_with_an_outlier():
    rotated = torch.randn(16, 8192, generator=seeded(0))
    rotated[::2, 0] = 8
    full, clipped = int8_grid(rotated, False), int8_grid(rotated, True)
    assert (row_errors(rotated, clipped) < row_errors(rotated, full))[::2].all()
    assert (clipped.scale <= full.scale).all() and (clipped.scale >= 0.89 * full.scale).all()


# The codes.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("width", "format"), list(product((192, 256), FORMATS)))
def test_gptq_lowers_the_error_on_inputs_that_it_has_not_seen(width, format, seed):
    weight, x, unseen = gaussian(48, width, seed), inputs(width, 1024, 2 * seed), inputs(width, 256, 2 * seed + 1)
    nearest, gptq = (quantized(weight, format, rounding, x) for rounding in ("nearest", "gptq"))
    errors = [relative(unseen @ dequantize(layer.tensors).T, unseen @ weight.T) for layer in (nearest, gptq)]
    assert errors[1] < 0.6 * errors[0]
    assert gptq.error < 0.6 * nearest.error


@pytest.mark.parametrize("format", FORMATS)
def test_random_calibration_gains_nothing(format):
    weight, unseen = gaussian(48, 256), inputs(256, 256, 1)
    noise = torch.randn(1024, 256, generator=seeded(7))
    nearest, gptq = (quantized(weight, format, rounding, noise) for rounding in ("nearest", "gptq"))
    errors = [relative(unseen @ dequantize(layer.tensors).T, unseen @ weight.T) for layer in (nearest, gptq)]
    assert errors[1] > 0.85 * errors[0]


@pytest.mark.parametrize("format", FORMATS)
def test_gptq_changes_codes_only(format):
    weight, x = gaussian(16, 64), inputs(64, 300, 0)
    nearest, gptq = (quantized(weight, format, rounding, x).tensors for rounding in ("nearest", "gptq"))
    changed = {name for name in nearest if not torch.equal(nearest[name].float(), gptq[name].float())}
    assert changed == {"weight"}


def reference_codes(weight, hessian, columns, damping):
    """Optimal brain surgeon on values columns[k] (N, levels), one column after the other, with a fresh inverse."""
    w, h = weight.copy(), hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    codes = np.zeros(w.shape, dtype=int)
    for k, levels in enumerate(columns):
        codes[:, k] = np.abs(w[:, k : k + 1] - levels).argmin(1)
        rounded = np.take_along_axis(levels, codes[:, k : k + 1], 1)[:, 0]
        inverse = np.linalg.inv(h[k:, k:])
        w[:, k:] -= np.outer((w[:, k] - rounded) / inverse[0, 0], inverse[0])
    return codes


def rotated_by_hand(weight, x, group):
    rotation = np.kron(np.eye(weight.shape[1] // group), hadamard(group).double().numpy())
    x = x.double().numpy() @ rotation
    return weight.double().numpy() @ rotation, x.T @ x


def loss(weight, values, hessian):
    gap = weight - values
    return np.einsum("nk,kj,nj->", gap, hessian, gap)


@pytest.mark.parametrize("rows", [20, 300])
@pytest.mark.parametrize("width", [48, 144])
def test_gptq_is_the_column_by_column_reference(width, rows):
    """In float32 all but a few codes, at the same loss."""
    weight, x = gaussian(8, width), inputs(width, rows, 0)
    rotated, hessian = rotated_by_hand(weight, x, 16)
    damping = 0.01 + SAMPLING_DAMPING * width / rows

    layer = quantized(weight, "W8A8", "gptq", x, clip_search=False).tensors
    values = np.arange(-127, 128) * layer["weight_scale"].double().numpy()
    expected = reference_codes(rotated, hessian, [values] * width, damping) - 127
    codes, scale = layer["weight"].numpy(), layer["weight_scale"].double().numpy()
    assert (codes != expected).mean() < 0.02
    assert loss(rotated, scale * codes, hessian) == pytest.approx(loss(rotated, scale * expected, hessian), rel=0.05)

    layer = quantized(weight, "W4A8", "gptq", x).tensors
    relative_scale = layer["weight_s_rel"].float().numpy()
    values = [
        np.clip(np.round(layer["weight_codebook"].numpy() * relative_scale[:, k // 16, None]), -127, 127)
        * layer["weight_s_channel"].double().numpy()[:, None]
        for k in range(width)
    ]
    expected = reference_codes(rotated, hessian, values, damping)
    assert (unpack_int4(layer["weight"].view(torch.uint8)).numpy() + 8 != expected).mean() < 0.02


@pytest.mark.parametrize("format", FORMATS)
def test_gptq_with_fewer_samples_than_inputs(format):
    weight, x = gaussian(16, 128), inputs(128, 30, 0)
    x[:, [3, 70]] = 0
    nearest, gptq = (quantized(weight, format, rounding, x).error for rounding in ("nearest", "gptq"))
    assert gptq < 0.6 * nearest


# Errors and the bias.


@pytest.mark.parametrize("format", FORMATS)
def test_output_error_is_that_of_the_outputs(format):
    weight, x = gaussian(16, 64), inputs(64, 200, 0)
    tensors = quantized(weight, format).tensors
    expected = relative(x.double() @ dequantize(tensors).double().T, x.double() @ weight.double().T)
    assert output_error(weight, tensors, x.T @ x) == pytest.approx(expected, rel=1e-3)
    assert output_error(weight, tensors) == pytest.approx(relative(dequantize(tensors), weight), rel=1e-4)
    assert quantized(weight, format).error == output_error(weight, tensors)
    assert quantized(weight, format, x=x).error == output_error(weight, tensors, x.T @ x)


@pytest.mark.parametrize("shape", [(16, 64), (8, 256), (12, 48)])
@pytest.mark.parametrize("format", FORMATS)
def test_held_out_error_is_that_of_the_kernel(format, shape):
    weight, bias, x = gaussian(*shape), torch.randn(shape[0], generator=seeded(1)), inputs(shape[1], 20, 3)
    layer = quantized(weight, format)
    y = F.linear(x, wrapped(layer, shape))
    assert relative(kernel_output(layer.tensors, x), y) < 1e-6
    assert held_out_error(weight, layer.tensors, x) == pytest.approx(relative(y, x @ weight.T), rel=1e-4)

    statistics = statistics_of(inputs(shape[1], 300, 0))
    statistics.held_out = x.bfloat16()
    layer, x = quantize_weight("fc", weight, bias, NativeConfig(format), statistics), statistics.held_out.float()
    y = F.linear(x, wrapped(layer, shape), layer.tensors["bias"])
    assert layer.error == pytest.approx(float((y - x @ weight.T - bias).norm() / (x @ weight.T).norm()), rel=1e-4)


def test_activations_cost_in_the_held_out_error():
    weight, x = gaussian(16, 64), inputs(64, 40, 0)
    tensors = quantized(weight).tensors
    assert held_out_error(weight, tensors, x) > output_error(weight, tensors, x.T @ x)
    assert held_out_error(torch.zeros(16, 64), quantized(torch.zeros(16, 64)).tensors, x) == 0


@pytest.mark.parametrize("format", FORMATS)
def test_rows_serve_as_the_hessian_does(format):
    weight, x, unseen = gaussian(48, 256), inputs(256, 2048, 0), inputs(256, 256, 1)
    rows = LayerStatistics.empty(256, inputs=1024)
    rows.update(x)
    rows.keep_inputs(x[::2])
    layers = [quantized(weight, format, rounding, x) for rounding in ("nearest", "gptq")]
    layers.append(quantize_weight("fc", weight, None, NativeConfig(format), rows))
    nearest, hessian, ours = (held_out_error(weight, layer.tensors, unseen) for layer in layers)
    assert ours < 1.05 * hessian < 0.9 * nearest


def test_fewer_bits_cost_more():
    for weights in WEIGHTS:
        errors = [quantized(weights(32, 256), format).error for format in FORMATS]
        assert errors == sorted(errors) and 0 < 3 * errors[0] < errors[-1] < 0.2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_bytes_are_those_of_the_tensors(format, shape):
    layer = quantized(gaussian(*shape), format)
    taken = sum(tensor.nbytes for name, tensor in layer.tensors.items() if name != "comfy_quant")
    assert BY_NAME[layer.format].bytes(*shape) == taken


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_is_of_the_format_that_it_was_made_in(format, shape):
    """Read from a file, and held by ComfyUI: formats of several widths have one name and one layout."""
    layer = quantized(gaussian(*shape), format)
    assert format_of(layer.tensors).name == packed_format(wrapped(layer, shape)).name == layer.format
    assert packed_format(gaussian(*shape)) is None


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("format", FORMATS)
def test_bias_correction_removes_the_mean_error(format, rounding):
    linear, x, unseen = nn.Linear(256, 32), inputs(256, 1024, 0, offset=2), inputs(256, 1024, 1, offset=2)
    plain, corrected = (
        quantized(linear.weight, format, rounding, x, linear.bias, bias_correction=wanted).tensors
        for wanted in (False, True)
    )
    assert plain["bias"] is not None and torch.equal(plain["bias"], linear.bias)
    assert torch.equal(plain["weight"], corrected["weight"])

    def errors(tensors, x):
        return F.linear(x, dequantize(tensors), tensors["bias"]) - linear(x)

    assert errors(corrected, x).mean(0).abs().max() < 1e-3 * errors(corrected, x).std()
    assert errors(corrected, x).mean(0).norm() < 0.01 * errors(plain, x).mean(0).norm()
    assert errors(corrected, unseen).norm() <= 1.01 * errors(plain, unseen).norm()
    if rounding == "nearest":
        assert errors(corrected, unseen).norm() < 0.8 * errors(plain, unseen).norm()


def test_bias_keeps_its_type_and_is_not_invented():
    weight, x = gaussian(16, 64), inputs(64, 100, 0)
    half = quantized(weight, x=x, bias=torch.ones(16).bfloat16(), bias_correction=True)
    assert half.tensors["bias"].dtype == torch.bfloat16
    assert "bias" not in quantized(weight, x=x, bias_correction=True).tensors
    assert "bias" not in quantized(weight, bias_correction=True).tensors  # needs no statistics then


# Which layers.


def test_promotion():
    for shape in ((64, 1152), (8, 16), (8, 20), (8, 4), (8, 30), (6, 64), (7, 33)):
        for format in FORMATS:
            able = [f for f in (BY_NAME[format], *finer(BY_NAME[format])) if f.takes(*shape)]
            layer = quantized(gaussian(*shape), format)
            assert (layer and layer.format) == (able[0].name if able else None)
    assert quantized(gaussian(6, 64)) is quantized(gaussian(8, 30)) is None
    promoted = quantized(gaussian(8, 20), "W4A8")
    assert promoted.config == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4}
    assert torch.equal(promoted.tensors["weight"], quantized(gaussian(8, 20), "W8A8").tensors["weight"])


# Refusals.


def test_unknown_choices():
    with pytest.raises(ValueError, match=f"format must be one of {', '.join(FORMATS)}, got 'W4A4'"):
        NativeConfig("W4A4")
    with pytest.raises(ValueError, match="rounding must be one of auto, nearest, gptq, got 'adaround'"):
        NativeConfig(rounding="adaround")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_damaged_weights(format, value):
    weight = gaussian(8, 16)
    weight[2, 3] = value
    with pytest.raises(ValueError, match=r"^The weight of blocks\.0\.fc holds values that are not finite"):
        quantized(weight, format)


def test_missing_statistics():
    weight, config = gaussian(8, 16), NativeConfig(rounding="gptq")
    for statistics in (None, statistics_of(inputs(16, 20, 0), hessian=False)):
        with pytest.raises(ValueError, match=r"^gptq rounding needs the input Hessian of blocks\.0\.fc"):
            quantize_weight("blocks.0.fc", weight, None, config, statistics)


def test_auto_takes_what_is_known():
    weight, bias, x = gaussian(8, 32), torch.zeros(8), inputs(32, 100, 0)
    auto, config = NativeConfig("W4A8"), {"bias_correction": True}

    def equal(one, other):
        return all(torch.equal(one.tensors[key].float(), other.tensors[key].float()) for key in other.tensors)

    layer = quantize_weight("fc", weight, bias, auto, statistics_of(x))
    assert equal(layer, quantized(weight, "W4A8", "gptq", x, bias, **config)) and layer.tensors["bias"].any()
    layer = quantize_weight("fc", weight, bias, auto, statistics_of(x, hessian=False))
    assert equal(layer, quantized(weight, "W4A8", bias=bias)) and not layer.tensors["bias"].any()
    layer = quantize_weight("fc", weight, bias, auto)
    assert equal(layer, quantized(weight, "W4A8", bias=bias)) and not layer.tensors["bias"].any()


def test_a_comfy_kitchen_without_w4a8(monkeypatch):
    monkeypatch.delattr(comfy_kitchen, "quantize_w4a8_int8_weight")
    with pytest.raises(ValueError, match=r"^W4A8 needs comfy-kitchen 0\.2\.31 or newer, this is 0.*, or choose W8A8"):
        quantized(gaussian(8, 16), "W4A8")
    assert quantized(gaussian(8, 16)).error > 0


def test_damaged_statistics():
    weight, statistics = gaussian(8, 16), statistics_of(inputs(16, 20, 0))
    statistics.hessian[0, 0] = float("nan")
    for rounding in ("nearest", "gptq"):
        with pytest.raises(ValueError, match=r"^The input Hessian of blocks\.0\.fc holds values that are not finite"):
            quantize_weight("blocks.0.fc", weight, None, NativeConfig(rounding=rounding), statistics)
    statistics.held_out = torch.full((3, 16), float("inf"))
    statistics.hessian = torch.eye(16)
    with pytest.raises(ValueError, match=r"^The held-out inputs of blocks\.0\.fc hold values that are not finite"):
        quantize_weight("blocks.0.fc", weight, None, NativeConfig(), statistics)
    statistics.hessian, statistics.held_out = -torch.eye(16), None
    with pytest.raises(ValueError, match=r"^The Hessian of blocks\.0\.fc has no inverse with damping 0\.058"):
        quantize_weight("blocks.0.fc", weight, None, NativeConfig(rounding="gptq"), statistics)
    statistics.mean[0] = float("nan")
    with pytest.raises(ValueError, match=r"^The corrected bias of blocks\.0\.fc is not finite"):
        quantize_weight("blocks.0.fc", weight, torch.zeros(8), NativeConfig("W8A8", "nearest", True, True), statistics)


@pytest.mark.parametrize("error", [0.5, float("nan"), float("inf")])
def test_collapse(monkeypatch, error):
    monkeypatch.setattr("qandc_core.quantization.native.output_error", lambda *_: error)
    with pytest.raises(ValueError, match=r"^blocks\.0\.fc cannot be quantized to W8A8: .* leave it float"):
        quantized(gaussian(8, 16))


def test_an_input_that_the_grid_cannot_serve_collapses():
    """All of the layer's output comes from one direction in which the rounding error is as large as the weight."""
    weight = torch.full((4, 16), 1e3)
    weight[:, 1::2] *= -1
    weight += 0.1 * gaussian(4, 16)
    x = torch.ones(50, 16)
    with pytest.raises(ValueError, match="cannot be quantized to W4A8"):
        quantized(weight, "W4A8", x=x)


def test_every_level_decodes_to_itself():
    """What gptq takes a code to stand for is what the decoder makes of it."""
    grouped = [format for format in BY_NAME.values() if isinstance(format, Grouped)]
    assert W4A8 in grouped
    for format in grouped:
        tensors = quantized(gaussian(64, 32), format.name).tensors
        values = format.values(tensors)[format.lowest :]
        grid = GroupedGrid(values, tensors["weight_s_rel"], tensors["weight_s_channel"])
        codes = torch.arange(64)[:, None].expand(64, 32) % len(values)
        decoded, scale = format.int8({**tensors, "weight": format.pack((codes + format.lowest).to(torch.int8))})
        assert torch.equal(scale, tensors["weight_s_channel"])
        for group in range(2):
            levels = grid.levels(group)
            assert (levels.diff(dim=1) >= 0).all() and levels.abs().max() <= 127
            assert torch.equal(decoded[:, 16 * group].float(), levels.gather(1, codes[:, :1])[:, 0])


def test_the_widest_weight_takes_the_highest_code():
    rotated = rotate(gaussian(8, 32), 16)
    assert quantize(rotated, int8_grid(rotated, False)).abs().max() == 127


@pytest.mark.parametrize(("state", "able"), [((True, False), "W8A8"), ((True, True), "W4A8"), ((False, False), "W4A8")])
def test_layers_that_the_cuda_kernels_of_four_bits_refuse_stay_at_eight(monkeypatch, state, able):
    """Measured on an H200: they rotate 256 inputs and raise on other groups, which every other backend takes."""
    found = dict(zip(("available", "disabled"), state), unavailable_reason=None, capabilities=[])
    monkeypatch.setattr(comfy_kitchen, "list_backends", lambda: {"cuda": found})
    assert [fitting(W4A8, 64, inputs)[0].name for inputs in (640, 1152, 2432)] == [able] * 3
    assert fitting(W4A8, 64, 768)[0] is W4A8
