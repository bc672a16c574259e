"""Quantizing on a device without float64, and what counts as running out of memory."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qandc_core import numerics
from qandc_core.calibration.distances import prediction_distances
from qandc_core.calibration.statistics import LayerStatistics
from qandc_core.quantization.linear import QuantizedLinear
from qandc_core.quantization.model import QuantizationConfig, quantize_model
from qandc_core.quantization.native import NativeConfig, quantize_weight

K, N = 64, 32


class NoFloat64(TorchDispatchMode):
    """The CPU as a device without float64: an Apple GPU raises TypeError likewise."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            raise TypeError(f"{func} made a float64 tensor on a device that has none")
        return result


@pytest.fixture
def forgetful():
    numerics._has_float64.cache_clear()
    yield
    numerics._has_float64.cache_clear()


def statistics():
    generator = torch.Generator().manual_seed(1)
    found = LayerStatistics.empty(K, hessian=True)
    found.update(torch.randn(256, K, generator=generator) + 1)
    found.held_out = torch.randn(16, K, generator=generator)
    return found


@pytest.mark.parametrize("format", ["W8A8", "W4A8"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_device_without_float64_gives_the_same_codes(forgetful, format, rounding):
    generator = torch.Generator().manual_seed(0)
    weight, bias, given = torch.randn(N, K, generator=generator), torch.randn(N, generator=generator), statistics()
    config = NativeConfig(format, rounding, bias_correction=True)
    wanted = quantize_weight("layer", weight, bias, config, given)
    numerics._has_float64.cache_clear()
    with NoFloat64():
        found = quantize_weight("layer", weight, bias, config, given)
    assert torch.equal(found.tensors["weight"], wanted.tensors["weight"])
    assert torch.allclose(found.tensors["bias"], wanted.tensors["bias"], atol=1e-5)
    assert found.error == pytest.approx(wanted.error, rel=1e-3)


def test_the_widest_float(forgetful):
    assert numerics.widest_float(torch.device("cpu")) == torch.float64
    numerics._has_float64.cache_clear()
    with NoFloat64():
        assert numerics.widest_float(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ],
)
def test_out_of_memory(error):
    assert numerics.is_out_of_memory(error)


def test_other_errors_are_not_out_of_memory():
    assert not numerics.is_out_of_memory(RuntimeError("size mismatch")) and not numerics.is_out_of_memory(KeyError("x"))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_whose_tensors_are_elsewhere_copies_them_for_the_call(bits):
    """As where a model does not fit the device; meta stands for the device, so the call is followed by shape."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N))
    quantize_model(model, bits, 8, config=QuantizationConfig(backend="simulated"))
    layer, x = model[0], torch.randn(3, K, generator=generator)
    wanted = layer(x)
    assert isinstance(layer, QuantizedLinear)
    assert layer(x.to("meta")).device.type == "meta"
    copied = layer.on(torch.device("cpu"))
    assert torch.equal(copied(x), wanted) and copied is not layer
    assert layer.codes.device.type == "cpu" and torch.equal(layer(x), wanted)


def test_distances_need_no_float64_of_the_device(monkeypatch):
    """Where the device has none they are computed on the CPU, from float32 that moved there first."""
    values, sigmas = torch.randn(4, 9), torch.linspace(3, 0, 5)
    wanted, moved = prediction_distances(values, sigmas), []

    class Elsewhere(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            moved.append((func.__name__, args[1:]))
            return super().__torch_function__(func, types, args, kwargs or {})

    monkeypatch.setattr(numerics, "_has_float64", lambda kind, index: False)
    found = prediction_distances(values.as_subclass(Elsewhere), sigmas)
    assert torch.equal(found.as_subclass(torch.Tensor), wanted)
    names = [name for name, _ in moved]
    assert ("to", (torch.device("cpu"),)) in moved[: names.index("double")]
