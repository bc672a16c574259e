import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qandc_core.calibration import statistics
from qandc_core.calibration.memory import layer_bytes, plan_statistics
from qandc_core.calibration.statistics import LayerStatistics

WIDTHS = (1152, 3072, 3072, 12288)


def tensor_bytes(layer):
    return sum(
        getattr(layer, name).untyped_storage().nbytes()
        for name in ("low", "high", "mean", "histogram", "hessian", "inputs", "held_out")
        if getattr(layer, name) is not None
    )


def made(width, plan):
    return LayerStatistics.empty(width, plan.hessian(width), plan.inputs(width), plan.held_out)


@pytest.mark.parametrize("tokens", [64, 100, 1000, 4096])
@pytest.mark.parametrize("held_out", [0, 256])
def test_a_plan_counts_what_statistics_take(tokens, held_out):
    plan = plan_statistics(WIDTHS[:2], 2**40, tokens, held_out)
    assert (plan.tokens, plan.held_out) == (tokens, held_out)
    assert plan.bytes == sum(tensor_bytes(made(width, plan)) for width in WIDTHS[:2])


def test_the_smaller_of_the_two_is_kept():
    plan = plan_statistics(WIDTHS, 2**40, 4096, 0)
    assert [plan.hessian(width) for width in (1152, 2048, 2049, 12288)] == [True, True, False, False]
    assert [plan.inputs(width) for width in (2048, 3072)] == [0, 4096]
    assert plan_statistics((), 0, 4096, 8).bytes == 0


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=6),
    st.integers(64, 5000), st.integers(0, 300), st.integers(0, 2**28),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_most_tokens_that_fit(widths, tokens, held_out, budget):
    def needed(count):
        return sum(layer_bytes(width, count, held_out) for width in widths)

    if needed(64) > budget:
        with pytest.raises(ValueError, match=rf"{len(widths)} layers need at least {needed(64) / 2**30:.2f} GiB"):
            plan_statistics(widths, budget, tokens, held_out)
        return
    plan = plan_statistics(widths, budget, tokens, held_out)
    assert plan.bytes == needed(plan.tokens) <= budget and 64 <= plan.tokens <= tokens
    assert plan.tokens == tokens or needed(plan.tokens + 1) > budget


def test_fewer_tokens_than_the_least_may_be_asked_for():
    assert plan_statistics((512,), 2**20, 10, 0).tokens == 10


# What LayerStatistics keeps.


def test_rows_up_to_the_room_for_them():
    x = torch.randn(30, 6).bfloat16()
    layer = LayerStatistics.empty(6, inputs=20, held_out=4)
    reserved = layer.inputs.untyped_storage().data_ptr()
    assert layer.inputs.shape == (0, 6) and layer.held_out.shape == (0, 6) and layer.second_moment() is None
    for part in x.split(8):
        layer.keep_inputs(part.float())
        layer.keep_held_out(part[:3])
    assert torch.equal(layer.inputs, x[:20]) and layer.inputs.untyped_storage().data_ptr() == reserved
    assert torch.equal(layer.held_out, torch.cat([x[:3], x[8:9]]))
    assert layer.inputs.dtype == layer.held_out.dtype == torch.bfloat16
    layer.keep_inputs(x)
    assert len(layer.inputs) == 20


def test_nothing_is_kept_where_there_is_no_room():
    layer = LayerStatistics.empty(6)
    layer.keep_inputs(torch.ones(3, 6))
    layer.keep_held_out(torch.ones(3, 6))
    assert layer.inputs is None and layer.held_out is None and layer.second_moment() is None


def test_rows_are_kept_in_inference_mode():
    with torch.inference_mode():
        layer = LayerStatistics.empty(6, inputs=20)
        layer.keep_inputs(torch.ones(3, 6))
        layer.keep_inputs(torch.zeros(3, 6))
    assert layer.inputs[:, 0].tolist() == [1, 1, 1, 0, 0, 0]


def test_the_second_moment_is_the_hessian_or_its_estimate():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=generator) @ torch.randn(5, 12, generator=generator) + 0.5
    exact, estimate = LayerStatistics.empty(12, hessian=True), LayerStatistics.empty(12, inputs=1000)
    for layer in (exact, estimate):
        layer.update(x)
    assert exact.second_moment() is exact.hessian
    estimate.keep_inputs(x[torch.randperm(4000, generator=generator)[:1000]])
    second = estimate.second_moment(torch.device("cpu"))
    assert second.dtype == torch.float32
    assert float((second - exact.hessian).norm() / exact.hessian.norm()) < 0.1
    rows = estimate.inputs.float()
    assert torch.allclose(second, 4 * rows.T @ rows)


class Largest(TorchDispatchMode):
    """The most values of a tensor that any operator made, views of `x` aside."""

    def __init__(self, x):
        super().__init__()
        self.own, self.values = x.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.own:
                self.values = max(self.values, tensor.numel())
        return made


def test_inputs_are_copied_in_parts(monkeypatch):
    monkeypatch.setattr(statistics, "PART", 2**14)
    x = torch.randn(2**13, 64, dtype=torch.bfloat16)
    layer = LayerStatistics.empty(64, hessian=True)
    with Largest(x) as largest:
        layer.update(x)
    assert layer.count == len(x) and largest.values <= 2**14
