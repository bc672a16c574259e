"""Statistics of a chain's layers in groups: those of one pass, shared where inputs are, no further than needed."""

import pytest
import torch
from torch import nn

from qandc_core.calibration.token_inputs import Feed, feeds_of, groups_of, statistics_of
from qandc_core.quantization.native import NativeConfig, held_out_error, quantize_weight


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        y = nn.functional.layer_norm(x, x.shape[-1:])
        scores = self.q(y) @ self.k(y).mT / x.shape[-1] ** 0.5
        x = x + self.o(scores.softmax(-1) @ self.v(y))
        return x + self.down(nn.functional.gelu(self.up(nn.functional.layer_norm(x, x.shape[-1:]))))


class Chain(nn.Module):
    def __init__(self, depth=3, width=16, hidden=32):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
        self.unused = nn.Linear(width, width)
        self.ran = []

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            self.ran.append(number)
            x = block(x)
        return x


@pytest.fixture
def chain():
    torch.manual_seed(0)
    return Chain()


def linears(chain):
    return {name: module for name, module in chain.named_modules() if isinstance(module, nn.Linear)}


def texts(count, tokens=9, width=16):
    generator = torch.Generator().manual_seed(count)
    mixed = torch.randn(width, width, generator=generator)  # correlated inputs, as a text's are
    return [torch.randn(1, tokens, width, generator=generator) @ mixed for _ in range(count)]


def reference(chain, inputs, name):
    """X^T X of a layer, by hand."""
    seen = []
    handle = linears(chain)[name].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for x in inputs:
        chain(x)
    handle.remove()
    x = torch.cat(seen)
    return x.T @ x, len(x)


@torch.no_grad()
def test_layers_that_run_in_order_and_what_they_share(chain):
    feeds = feeds_of(linears(chain), lambda: chain(texts(1)[0]))
    names = [f"blocks.{i}.{part}" for i in range(3) for part in ("q", "k", "v", "o", "up", "down")]
    assert list(feeds) == names  # and not the layer that no text comes to
    assert [feeds[f"blocks.1.{part}"].owner for part in ("q", "k", "v")] == ["blocks.1.q"] * 3
    assert feeds["blocks.1.up"] == Feed("blocks.1.up", 16) and feeds["blocks.1.down"].width == 32


@torch.no_grad()
@pytest.mark.parametrize("room", [1, 8 * 16**2, 10**9])
def test_statistics_are_those_of_one_pass_whatever_the_room(chain, room):
    layers, inputs, held_out = linears(chain), texts(5), texts(3, tokens=4)
    feeds = feeds_of(layers, lambda: chain(inputs[0]))
    groups = groups_of(feeds, room)
    assert [name for group in groups for name in group] == list(feeds)
    assert len(groups) == {1: 12, 8 * 16**2: 9, 10**9: 1}[room]
    found = {}
    for group in groups:
        assert all(feeds[name].owner in group for name in group)
        found |= statistics_of(layers, feeds, group, chain, inputs, held_out)
    for name in feeds:
        expected, count = reference(chain, inputs, name)
        torch.testing.assert_close(found[name].second_moment(), expected)
        assert found[name].samples == count == 45 and len(found[name].held_out) == 12
    assert found["blocks.2.q"] is found["blocks.2.v"]
    assert not [m for m in chain.modules() if m._forward_pre_hooks]


@torch.no_grad()
def test_a_group_runs_no_further_than_its_last_layer(chain):
    layers, inputs = linears(chain), texts(2)
    feeds = feeds_of(layers, lambda: chain(inputs[0]))
    chain.ran.clear()
    statistics_of(layers, feeds, ["blocks.0.q", "blocks.0.k"], chain, inputs, inputs[:1])
    assert set(chain.ran) == {0} and len(chain.ran) == 3


@torch.no_grad()
def test_only_tokens_that_count_are_counted(chain):
    layers, inputs = linears(chain), texts(2)
    feeds = feeds_of(layers, lambda: chain(inputs[0]))
    found = statistics_of(layers, feeds, ["blocks.0.q"], chain, inputs, inputs, counted=lambda x: x[0, :4])
    assert found["blocks.0.q"].count == 8 and len(found["blocks.0.q"].held_out) == 8
    nothing = statistics_of(layers, feeds, ["blocks.0.q"], chain, inputs, inputs, counted=lambda x: x[0, :0])
    assert nothing["blocks.0.q"].count == 0


@torch.no_grad()
def test_an_error_in_a_text_leaves_no_hook(chain):
    layers = linears(chain)
    feeds = feeds_of(layers, lambda: chain(texts(1)[0]))
    with pytest.raises(RuntimeError):
        statistics_of(layers, feeds, ["blocks.0.q"], chain, [torch.zeros(1, 3, 5)], [])
    with pytest.raises(ValueError, match="blocks.0.q are not finite"):
        statistics_of(layers, feeds, ["blocks.0.q"], chain, [torch.full((1, 3, 16), torch.nan)], [])
    assert not [m for m in chain.modules() if m._forward_pre_hooks]


@torch.no_grad()
def test_the_error_of_a_weight_alone_is_without_rounded_inputs():
    torch.manual_seed(1)
    weight, x = torch.randn(32, 64), torch.randn(200, 64)
    layer = quantize_weight("layer", weight, None, NativeConfig("W8A8", "nearest"))
    both, alone = (held_out_error(weight, layer.tensors, x, rounds_inputs=rounds) for rounds in (True, False))
    assert alone < both
    from qandc_core.quantization.native import dequantize

    lost = x @ (dequantize(layer.tensors) - weight).T
    assert alone == pytest.approx(float(lost.norm() / (x @ weight.T).norm()), rel=1e-4)
