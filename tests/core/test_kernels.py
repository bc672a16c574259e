import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qandc_core.fused import kernels
from qandc_core.fused.kernels import reference
from qandc_core.models.dit import modulate
from qandc_core.quantization.grids import (
    Grid,
    affine_grid,
    dequantize,
    quantize,
    symmetric_grid,
    token_grid,
    weight_grid,
)
from qandc_core.quantization.linear import LinearFormat, QuantizedLinear
from qandc_core.quantization.matmul import kitchen_is_available
from qandc_core.quantization.rotation import rotate

pytestmark = pytest.mark.usefixtures("no_grad")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_kitchen = pytest.mark.skipif(not kitchen_is_available(), reason="no comfy-kitchen")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
ROOT = Path(__file__).parents[2]
STATIC = Grid(torch.tensor(0.021), torch.tensor(-37.0), -128, 127)
# One unit of the output: Triton's interpreter cuts bfloat16 off where a GPU rounds it.
UNIT = {"torch.float32": 5e-7, "torch.bfloat16": 2**-7, "torch.float16": 2**-10}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The reference, against the modules it stands for.


def modulated_inputs(width=128):
    modulation = random(2, 6, width, seed=1)
    return random(2, 9, width) * 3 + 5, modulation[:, 0], modulation[:, 3]


@pytest.mark.parametrize("group", [None, *(pytest.param(group, marks=needs_kitchen) for group in (4, 16, 64, 256))])
@pytest.mark.parametrize("grid", [None, STATIC])
def test_modulated_codes_are_those_of_the_separate_steps(group, grid):
    x, shift, scale = modulated_inputs(768)
    y = modulate(nn.LayerNorm(768, eps=1e-5, elementwise_affine=False)(x), shift, scale).flatten(0, 1)
    y = y if group is None else rotate(y, group)
    codes, row_scale = reference.quantize_modulated(x, shift, scale, 1e-5, group, grid)
    expected = token_grid(y, 8) if grid is None else grid
    assert (codes.int() - quantize(y, expected).int()).abs().max() <= 1
    assert (codes != quantize(y, expected)).float().mean() < 1e-3
    if grid is None:
        torch.testing.assert_close(row_scale, expected.scale.flatten())
        torch.testing.assert_close(codes * row_scale[:, None], y, rtol=0, atol=0.51 * row_scale.max().item())
    else:
        assert row_scale is None


def test_rows_are_quantized_after_gelu():
    x = random(7, 64) * 3
    codes, row_scale = reference.quantize_rows(x, gelu=True)
    y = F.gelu(x, approximate="tanh")
    assert torch.equal(codes, quantize(y, symmetric_grid(y.abs().amax(1, keepdim=True), 8)))
    assert (codes.abs().amax(1) == 127).all()
    assert torch.equal(reference.quantize_rows(x.bfloat16())[0], reference.quantize_rows(x.bfloat16().float())[0])


def test_a_row_of_zeros_has_codes_zero_and_a_positive_scale():
    codes, row_scale = reference.quantize_rows(torch.zeros(2, 64))
    assert not codes.any() and (row_scale > 0).all()


def quantized_linear(static, width=96, outputs=40):
    torch.manual_seed(0)
    linear = nn.Linear(width, outputs)
    weights = weight_grid(linear.weight, 8, symmetric=True)
    inputs = affine_grid(torch.tensor(-4.0), torch.tensor(6.0), 8) if static else None
    format = LinearFormat(static=static)
    codes = quantize(linear.weight, weights)
    return QuantizedLinear.from_codes(linear, codes, weights, format, inputs, "simulated")


def test_product_is_that_of_a_dynamic_quantized_linear():
    layer, x = quantized_linear(static=False), random(19, 96) * 2
    codes, row_scale = reference.quantize_rows(x)
    y = reference.int8_matmul(codes, row_scale, layer.weight_codes(), layer.weight_scale, layer.bias, x.dtype)
    torch.testing.assert_close(y, layer(x))


def test_product_is_that_of_a_static_quantized_linear_with_the_zero_point_in_the_bias():
    layer, x = quantized_linear(static=True), random(19, 96) * 2
    codes, _ = reference.quantize_rows(x, grid=layer.input_grid(x))
    scale = layer.weight_scale * layer.input_scale
    bias = layer.bias - layer.input_zero * layer.row_sums * scale
    y = reference.int8_matmul(codes, None, layer.weight_codes(), scale, bias, x.dtype)
    torch.testing.assert_close(y, layer(x))


def test_product_ends_in_gelu_codes_or_a_gated_residual():
    layer, x = quantized_linear(static=False), random(12, 96)
    given = (*reference.quantize_rows(x), layer.weight_codes(), layer.weight_scale, layer.bias)
    y = layer(x)
    gelu = F.gelu(y, approximate="tanh")
    torch.testing.assert_close(reference.int8_matmul(*given, torch.float32, gelu=True), gelu)
    codes = reference.int8_matmul(*given, torch.float32, gelu=True, grid=STATIC)
    assert codes.dtype == torch.int8
    torch.testing.assert_close(dequantize(codes, STATIC), gelu, rtol=0, atol=0.51 * 0.021)
    gate, residual = random(3, 5, 40)[:, 2], random(12, 40, seed=2)
    expected = residual.view(3, 4, 40) + gate[:, None] * y.view(3, 4, 40)
    ours = reference.int8_matmul(*given, torch.bfloat16, gate=gate, residual=residual)
    assert torch.equal(ours, expected.view(12, 40).bfloat16())


@needs_kitchen
@pytest.mark.parametrize("group", [64, 256])
def test_rotated_product_is_comfy_kitchens(group):
    import comfy_kitchen

    weight = random(24, 512, seed=1)
    weights = weight_grid(rotate(weight, group), 8, symmetric=True)
    codes, bias, x = quantize(rotate(weight, group), weights), random(24), random(10, 512) * 2
    expected = comfy_kitchen.int8_linear(
        x, codes, weights.scale.flatten(), bias, torch.float32, convrot=True, convrot_groupsize=group
    )
    inputs, row_scale = reference.quantize_rows(x, group)
    y = reference.int8_matmul(inputs, row_scale, codes, weights.scale.flatten(), bias, torch.float32)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert (y - F.linear(x, weight, bias)).norm() < 0.02 * F.linear(x, weight, bias).norm()


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True)


@needs_compiler
@needs_kitchen
@pytest.mark.parametrize("group", [64, 256])
def test_quantizers_compile_into_one_graph(group):
    x, shift, scale = modulated_inputs(512)
    given = (x, shift, scale, 1e-6, group)
    codes, row_scale = compiled(reference.quantize_modulated)(*given)
    expected, expected_scale = reference.quantize_modulated(*given)
    assert (codes.int() - expected.int()).abs().max() <= 1 and (codes != expected).float().mean() < 1e-3
    torch.testing.assert_close(row_scale, expected_scale)
    given = (x.flatten(0, 1), None, True, STATIC)
    codes, nothing = compiled(reference.quantize_rows)(*given)
    assert nothing is None and (codes != reference.quantize_rows(*given)[0]).float().mean() < 1e-3


@needs_compiler
def test_product_compiles_into_one_graph():
    layer, x = quantized_linear(static=False), random(12, 96)
    given = (*reference.quantize_rows(x), layer.weight_codes(), layer.weight_scale, layer.bias, torch.float32)
    options = {"gelu": True, "gate": random(3, 40), "residual": random(12, 40)}
    ours = compiled(reference.int8_matmul)(*given, **options)
    torch.testing.assert_close(ours, reference.int8_matmul(*given, **options))


# The Triton kernels in Triton's interpreter, which runs them on the CPU, and on a GPU, against the reference.


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def interpreted(request):
    program = Path(__file__).with_name("kernels_interpreted.py")
    interpreter = {"TRITON_INTERPRET": "1"} if request.param == "cpu" else {}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    given = {**os.environ, **interpreter, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(program), request.param]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def starting_with(results, name):
    found = {case: result for case, result in results.items() if case.startswith(name)}
    assert found
    return found.items()


@needs_triton
@needs_kitchen
@pytest.mark.parametrize("function", ["quantize_modulated", "quantize_rows", "rows gelu"])
def test_triton_quantizers_give_the_references_codes_and_scales(interpreted, function):
    for case, result in starting_with(interpreted, f"{function}, "):
        assert result["largest"] <= 1 and result["share"] <= 1e-3 and result["scale"] <= 1e-6, (case, result)


@needs_triton
@needs_kitchen
def test_triton_product_is_exact(interpreted):
    for case, result in starting_with(interpreted, "exact, "):
        assert result["error"] == 0, case


@needs_triton
@needs_kitchen
@pytest.mark.parametrize("end", ["plain", "product gelu", "residual"])
def test_triton_product_ends_as_the_reference(interpreted, end):
    for case, result in starting_with(interpreted, f"{end}, "):
        assert result["error"] <= UNIT[result["dtype"]], (case, result)


@needs_triton
@needs_kitchen
@pytest.mark.parametrize("end", ["codes", "gelu codes"])
def test_triton_product_ends_in_the_references_codes(interpreted, end):
    for case, result in starting_with(interpreted, f"{end}, "):
        assert result["largest"] <= 1 and result["share"] <= 1e-3, (case, result)


@needs_triton
def test_triton_functions_have_the_references_signatures():
    code = (
        "from inspect import signature; from qandc_core.fused.kernels import triton_ops, reference; "
        "print(all(signature(getattr(triton_ops, n)) == signature(getattr(reference, n)) "
        "for n in ('quantize_modulated', 'quantize_rows', 'int8_matmul')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "True"


# Where they can run.


def test_kernels_are_not_available_on_cpu():
    assert not kernels.available("cpu")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
@needs_triton
def test_kernels_need_capability_8(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernels.available.cache_clear()
    assert kernels.available("cuda") is expected
    kernels.available.cache_clear()


def test_importing_the_package_and_the_reference_loads_no_triton():
    code = "import sys; import qandc_core.fused.kernels.reference; print('triton' in sys.modules)"
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
