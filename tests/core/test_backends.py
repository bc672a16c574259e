import json
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qandc_core.quantization import matmul as backends
from qandc_core.quantization.grids import affine_grid, quantize, weight_grid
from qandc_core.quantization.linear import PRODUCTS, LinearFormat, QuantizedLinear
from qandc_core.quantization.matmul import (
    int_mm,
    kitchen_mm,
    pick_backend,
    simulated_matmul,
    worst_case_codes,
)
from qandc_core.quantization.model import quantize_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_int_mm = pytest.mark.skipif(not backends.int_mm_is_fast(), reason="no exact int_mm on this CPU")
needs_kitchen = pytest.mark.skipif(not backends.kitchen_is_available(), reason="no comfy-kitchen")

EXACT = [
    pytest.param("int_mm", marks=needs_int_mm),
    pytest.param("kitchen", marks=[needs_kitchen, needs_int_mm]),
]
FORMATS = [(8, 8), (7, 8), (4, 8), (4, 4)]


pytestmark = pytest.mark.usefixtures("no_grad")


def random_codes(rows, width, low=-128, high=127, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (rows, width), dtype=torch.int8, generator=generator)


def integer_product(a, b):
    return a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T


# Products of codes.


@pytest.mark.parametrize(
    "product",
    [
        simulated_matmul,
        pytest.param(int_mm, marks=needs_int_mm),
        pytest.param(kitchen_mm, marks=[needs_kitchen, needs_int_mm]),
    ],
)
@pytest.mark.parametrize("rows, width, columns", [(1, 1, 1), (1, 64, 7), (33, 13, 5), (300, 48, 40), (2, 4607, 3)])
def test_products_are_exact(product, rows, width, columns):
    for a, b in [
        (random_codes(rows, width), random_codes(columns, width, seed=1)),
        (torch.full((rows, width), -128, dtype=torch.int8), torch.full((columns, width), -128, dtype=torch.int8)),
        (torch.full((rows, width), 127, dtype=torch.int8), torch.full((columns, width), -127, dtype=torch.int8)),
    ]:
        found = product(a, b).numpy()
        assert np.array_equal(found, integer_product(a, b).astype(found.dtype))  # oneDNN rounds its sum to float32


def test_worst_case_codes_overflow_sixteen_bits():
    a, b = (codes.long() for codes in worst_case_codes())
    products = (a + 128)[:, None] * b[None]  # oneDNN adds two products u8 x s8 before it widens
    assert int((products[..., 0::2] + products[..., 1::2]).abs().max()) == 2 * 255 * 127 > 32767


# Layers.


def layer(w_bits, a_bits, static, symmetric=True, width=48, columns=20, bias=True, dtype=torch.float32, backend="auto"):
    torch.manual_seed(0)
    linear = nn.Linear(width, columns, bias, dtype=dtype)
    format = LinearFormat(w_bits, a_bits, static, symmetric)
    grid = weight_grid(linear.weight.float(), w_bits, symmetric)
    codes = quantize(linear.weight.float(), grid)
    inputs = affine_grid(torch.tensor(-1.5), torch.tensor(2.5), a_bits) if static else None  # clips some of the inputs
    return QuantizedLinear.from_codes(linear, codes, grid, format, inputs, backend)


def sample(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def assert_same(ours, reference):
    assert ours.shape == reference.shape and ours.dtype == reference.dtype and reference.float().std() > 0.1
    assert (ours.float() - reference.float()).norm() <= 1e-3 * reference.float().norm()


@pytest.mark.parametrize("w_bits, a_bits", FORMATS)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_simulated_layer_against_numpy(w_bits, a_bits, static, symmetric):
    simulated, x = layer(w_bits, a_bits, static, symmetric, backend="simulated"), sample(30, 48)
    grid = simulated.input_grid(x)
    codes = np.clip(np.round(x.numpy() / grid.scale.numpy()) + grid.zero.numpy(), grid.low, grid.high)
    rounded = grid.scale.numpy().astype(np.float64) * (codes - grid.zero.numpy())
    weight = simulated.weight_codes().numpy().astype(np.float64)
    if not symmetric:
        weight -= simulated.weight_zero.numpy()[:, None]
    weight *= simulated.weight_scale.numpy()[:, None]
    expected = rounded @ weight.T + simulated.bias.numpy()
    assert np.abs(simulated(x).numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("w_bits, a_bits", FORMATS)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_backends_match_the_simulated_layer(backend, w_bits, a_bits, static, symmetric):
    for bias, width, columns, x in [
        (True, 48, 20, sample(2, 9, 48)),
        (False, 48, 20, sample(1, 48)),
        (True, 13, 7, sample(5, 13)),
        (True, 48, 20, sample(3, 4, 48, dtype=torch.bfloat16)),
        (False, 13, 7, sample(1, 1, 1, 13, dtype=torch.bfloat16)),
    ]:
        bits = w_bits if width % 2 == 0 else max(w_bits, 5)  # codes are packed in pairs
        options = (bits, a_bits, static, symmetric, width, columns, bias, x.dtype)
        reference, ours = layer(*options, backend="simulated"), layer(*options, backend=backend)
        codes = quantize(x.float().flatten(0, -2), reference.input_grid(x.float().flatten(0, -2)))
        expected = integer_product(codes, reference.weight_codes())
        assert np.array_equal(PRODUCTS["simulated"](codes, reference.weight_codes()).numpy(), expected)
        assert np.array_equal(PRODUCTS[backend](codes, ours.weight_codes()).numpy(), expected)
        if not (backend == "kitchen" and a_bits == 8 and symmetric and not static):  # its fused kernel rescales
            assert torch.equal(ours(x), reference(x))
        elif x.dtype == torch.float32:
            assert_same(ours(x), reference(x))


@needs_kitchen
@needs_int_mm
@pytest.mark.parametrize("w_bits", [8, 7, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_comfy_kitchens_fused_kernel_matches(w_bits, bias):
    reference, x = layer(w_bits, 8, False, bias=bias, backend="simulated"), sample(2, 9, 48)
    fused = reference.kitchen_linear(x.flatten(0, -2)).view(2, 9, 20)
    assert_same(fused, reference(x))
    assert torch.equal(layer(w_bits, 8, False, bias=bias, backend="kitchen")(x), fused)
    # Its CPU backend divides in bfloat16, so some codes fall on the other side of a rounding.
    half, x = layer(w_bits, 8, False, bias=bias, dtype=torch.bfloat16, backend="simulated"), x.bfloat16()
    fused = half.kitchen_linear(x.flatten(0, -2)).view(2, 9, 20)
    assert fused.dtype == torch.bfloat16
    assert (fused.float() - half(x).float()).norm() <= 1e-2 * half(x).float().norm()


@needs_kitchen
@needs_int_mm
def test_formats_that_the_fused_kernel_lacks_take_its_product(monkeypatch):
    calls = []
    monkeypatch.setattr(QuantizedLinear, "kitchen_linear", lambda self, x: calls.append(self) or x[:, :20])
    for a_bits, static, symmetric in [(4, False, True), (8, True, True), (8, False, False)]:
        options, x = (8, a_bits, static, symmetric), sample(4, 48)
        assert torch.equal(layer(*options, backend="kitchen")(x), layer(*options, backend="simulated")(x))
    assert calls == []


@pytest.mark.parametrize("backend", ["simulated", *EXACT])
@pytest.mark.parametrize("symmetric", [True, False])
def test_worst_case_inputs(backend, symmetric):
    width = 1152
    linear = nn.Linear(width, 3)
    linear.weight.copy_(torch.stack([torch.full((width,), v) for v in (1.0, -1.0, 0.5)]))
    linear.weight[2, ::2] = -1
    worst = quantize_model(nn.Sequential(linear))[0]
    worst.backend = backend
    x = torch.stack([torch.full((width,), 3.0), torch.full((width,), -3.0), torch.zeros(width)])
    assert torch.allclose(worst(x), x @ worst.weight.T + worst.bias, rtol=1e-5)
    assert torch.equal(worst(x)[2], worst.bias)


@pytest.mark.parametrize("backend", ["simulated", *EXACT])
@pytest.mark.parametrize("static", [True, False])
def test_rows_are_worked_off_in_blocks(monkeypatch, backend, static):
    whole, x = layer(8, 8, static, symmetric=False, backend=backend), sample(3, 7, 48)
    expected = whole(x)
    for rows in (1, 4, 21, 22):
        monkeypatch.setattr(QuantizedLinear, "rows_at_once", rows)
        assert torch.equal(whole(x), expected)


@pytest.mark.parametrize("backend", ["simulated", *EXACT])
def test_gradients_may_be_enabled_as_in_a_plain_call_of_the_model(backend):
    quantized, x = layer(8, 8, False, symmetric=False, backend=backend), sample(5, 48)
    expected = quantized(x)
    with torch.enable_grad():
        y = quantized(x.clone().requires_grad_())
    assert torch.equal(y, expected) and not y.requires_grad


# Picking.


def test_automatic_choice_is_exact_here():
    for w_bits, a_bits in FORMATS:
        auto, reference = layer(w_bits, a_bits, True), layer(w_bits, a_bits, True, backend="simulated")
        assert torch.equal(auto(sample(6, 48)), reference(sample(6, 48)))


@pytest.mark.parametrize("fast, expected", [(True, "int_mm"), (False, "simulated")])
def test_choice_on_cpus(monkeypatch, fast, expected):
    monkeypatch.setattr(backends, "int_mm_is_fast", lambda: fast)
    assert pick_backend(CPU) == expected


@pytest.mark.parametrize("available, expected", [(True, "kitchen"), (False, "simulated")])
def test_choice_on_gpus(monkeypatch, available, expected):
    monkeypatch.setattr(backends, "kitchen_is_available", lambda: available)
    assert pick_backend(CUDA) == expected
    assert pick_backend(torch.device("mps")) == "simulated"


def test_a_torch_that_does_not_say_what_the_cpu_has_falls_back(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_vnni_supported", raising=False)
    assert backends.int_mm_is_fast.__wrapped__() is False


RESTRICTED = """
import json, torch
torch.set_num_threads(1)
from torch import nn
from qandc_core.quantization import matmul as backends
from qandc_core.quantization.model import QuantizationConfig, quantize_model

def error(bits, backend):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    linear.weight.data.sign_()
    config = QuantizationConfig(backend=backend)
    layer = quantize_model(nn.Sequential(linear), w_bits=bits, config=config)[0]
    x = torch.full((5, 64), 2.0)
    with torch.no_grad():
        return float((layer(x) - (x @ layer.weight.T + layer.bias)).abs().max())

print(json.dumps({
    "fast": backends.int_mm_is_fast(),
    "picked": backends.pick_backend(torch.device("cpu")),
    "errors": [error(bits, "auto") for bits in (4, 7, 8)],
}))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 only")
def test_without_vnni_products_are_simulated_and_exact():
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", RESTRICTED], env=environment, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fast"] is False and found["picked"] == "simulated"
    assert max(found["errors"]) < 1e-4


def test_auto_uses_the_device_of_the_input(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "qandc_core.quantization.matmul.pick_backend", lambda device: asked.append(device) or "simulated"
    )
    layer(4, 8, False)(sample(2, 48))
    assert asked == [CPU]


def test_a_comfy_kitchen_without_int8_products_is_not_used(monkeypatch):
    """The versions that older ComfyUI pins can be imported but have no int8 product."""
    monkeypatch.setitem(sys.modules, "comfy_kitchen", types.ModuleType("comfy_kitchen"))
    backends.kitchen_is_available.cache_clear()
    try:
        assert not backends.kitchen_is_available()
    finally:
        monkeypatch.undo()
        backends.kitchen_is_available.cache_clear()
