"""int8 weights under a second name of their layout: the same weights, for all that comfy-kitchen does with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qandc_core.quantization.formats import packed_format
from qandc_core.quantization.formats.plain_int8 import LAYOUT, STOCK_LAYOUT, from_stock, to_stock
from qandc_core.quantization.formats.w8a8 import W8A8

kitchen = pytest.importorskip("comfy_kitchen.tensor")
GENERATOR = torch.Generator().manual_seed(3)
X, BIAS = torch.randn(3, 5, 64, generator=GENERATOR), torch.randn(32, generator=GENERATOR)


@pytest.fixture(params=[True, False], ids=["rotated", "plain"])
def stock(request):
    weight = torch.randn(32, 64, generator=GENERATOR)
    return kitchen.QuantizedTensor.from_float(
        weight, STOCK_LAYOUT, per_channel=True, convrot=request.param, convrot_groupsize=16
    )


def test_every_product_is_the_same(stock):
    other = from_stock(stock)
    assert other._layout_cls == LAYOUT
    assert torch.equal(F.linear(X, other, BIAS), F.linear(X, stock, BIAS))
    assert torch.equal(F.linear(X, other), F.linear(X, stock))
    assert torch.equal(X[0] @ other.t(), X[0] @ stock.t())
    assert torch.equal(torch.addmm(BIAS, X[0], other.t()), torch.addmm(BIAS, X[0], stock.t()))
    assert torch.equal(other.dequantize(), stock.dequantize())


def test_the_codes_are_the_same_memory_both_ways(stock):
    other = from_stock(stock)
    back = to_stock(other)
    assert other._qdata is back._qdata is stock._qdata and back._layout_cls == STOCK_LAYOUT
    assert packed_format(other) is W8A8 and other.state_dict("w").keys() == stock.state_dict("w").keys()
    assert from_stock(other) is other and to_stock(stock) is stock


def test_it_is_moved_and_compiled(stock):
    other = from_stock(stock)
    assert other.to(dtype=torch.bfloat16)._layout_cls == LAYOUT
    layer = torch.nn.Module()
    layer.register_parameter("weight", torch.nn.Parameter(other, requires_grad=False))
    compiled = torch.compile(lambda x: F.linear(x, layer.weight, BIAS), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(X), F.linear(X, stock, BIAS), rtol=1e-4, atol=1e-4)
