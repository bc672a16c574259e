"""Statistics stay where the layers run: nothing is fetched before the end, and float64 only where a device has it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from qandc_core.calibration.distances import prediction_distances
from qandc_core.calibration.statistics import BINS, LayerStatistics, check_inputs_finite


class Forbidding(TorchFunctionMode):
    """Raises on what makes the host wait for a device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in ("cpu", "item", "tolist", "__float__", "__bool__", "__int__", "__index__", "numpy"), name
        return function(*args, **(kwargs or {}))


def batches(seed=0, count=5, width=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(11 + i, width, generator=generator) * 4.0**i for i in range(count)]


def test_gathering_never_waits_for_the_device():
    statistics = LayerStatistics.empty(7, hessian=True, inputs=20, held_out=4)
    with Forbidding():
        for x in batches():
            statistics.update(x)
            statistics.keep_inputs(x)
            statistics.keep_held_out(x)
    assert statistics.count == sum(map(len, batches()))


def test_against_the_sums_of_all_inputs():
    statistics, seen = LayerStatistics.empty(7, hessian=True), torch.cat(batches()).double()
    for x in batches():
        statistics.update(x)
    assert torch.allclose(statistics.mean.double(), seen.mean(0), rtol=1e-5, atol=1e-6 * float(seen.abs().max()))
    exact = seen.T @ seen
    assert float((statistics.hessian.double() - exact).norm() / exact.norm()) < 1e-6
    counts, _ = np.histogram(seen.numpy(), BINS, (-statistics.reach, statistics.reach))
    assert np.abs(counts - statistics.histogram.numpy()).sum() <= 4  # float32 inputs at the edge of a bin


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_the_reach_is_the_power_of_two_that_covers_all(values):
    statistics = LayerStatistics.empty(1)
    for value in values:
        statistics.update(torch.tensor([[value]]))
    largest = max(values)
    expected = 2.0**-20 if largest <= 2.0**-20 else 2.0 ** math.ceil(math.log2(largest))
    assert statistics.reach in (expected, expected * 2, expected / 2) and statistics.reach >= largest
    assert statistics.reach < 2 * max(largest, 2.0**-20)
    assert float(statistics.histogram.sum()) == len(values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_named_at_the_end(bad):
    good, wrong = LayerStatistics.empty(7), LayerStatistics.empty(7)
    for x in batches():
        good.update(x)
        wrong.update(x)
    spoiled = batches()[0]
    spoiled[3, 2] = bad
    wrong.update(spoiled)
    wrong.update(batches()[1])
    check_inputs_finite({"a": good, "unseen": LayerStatistics.empty(3)})
    with pytest.raises(ValueError, match="inputs of the.layer are not finite"):
        check_inputs_finite({"a": good, "the.layer": wrong})


def test_kept_inputs_move_within_what_a_device_has_room_for():
    """The meta device stands for one that holds nothing yet."""
    device = torch.device("meta")
    statistics = LayerStatistics.empty(8, hessian=True, inputs=10, held_out=4)
    assert statistics.settle(device, 4 * 64 + 2 * 8 * 4) == 4 * 64 + 2 * 8 * 4
    assert (statistics.hessian.device, statistics.inputs.device) == (device, torch.device("cpu"))
    assert statistics.held_out.device == device and len(statistics.held_out) == 0
    statistics.keep_held_out(torch.ones(3, 8))
    assert len(statistics.held_out) == 3
    assert LayerStatistics.empty(8, hessian=True).settle(device, 0) == 0


def test_going_on_gives_the_same_bits():
    whole, resumed = (LayerStatistics.empty(7, True, 30, 4) for _ in range(2))
    for number, x in enumerate(batches()):
        for statistics in (whole, resumed):
            statistics.update(x)
            statistics.keep_inputs(x)
        if number == 2:
            resumed.fetch()
    for name in ("low", "high", "mean", "histogram", "hessian", "inputs"):
        assert torch.equal(getattr(whole, name), getattr(resumed, name))
    assert whole.reach == resumed.reach


def test_distances_of_noise_levels_without_float64():
    """A device without float64 raises on .double(); the noise levels go to the CPU first."""

    class Single(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") == "double":
                assert getattr(args[0], "fetched", False) or args[0] is denoised, "float64 on the device"
            found = function(*args, **(kwargs or {}))
            if getattr(function, "__name__", "") == "cpu":
                found = found.clone()
                found.fetched = True
            return found

    denoised, sigmas = torch.randn(4, 9), torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    expected = prediction_distances(denoised, sigmas)
    with Single():
        assert torch.equal(prediction_distances(denoised.to(denoised.device), sigmas), expected)
