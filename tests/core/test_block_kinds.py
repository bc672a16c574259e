"""What a list of blocks adds, and what its last block returns, reused on a network written out by hand."""

import pytest
import torch
from torch import nn

from qandc_core.caching.blocks import CachedBlocks
from qandc_core.caching.features import FeatureCache
from qandc_core.caching.forecast import coefficients
from qandc_core.caching.policies import ChosenSteps

STEPS, COMPUTED = 9, (0, 2, 5)

pytestmark = pytest.mark.usefixtures("no_grad")


class Block(nn.Module):
    def __init__(self, in_place: bool):
        super().__init__()
        self.linear, self.in_place = nn.Linear(6, 6), in_place

    def forward(self, x, factor):
        change = torch.tanh(self.linear(x)) * factor
        return x.add_(change) if self.in_place else x + change


class NextDiT(nn.Module):
    """Named as a class of the registry: a stream x through `layers`, and layers before and after them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Linear(6, 6), nn.Linear(6, 6)
        self.layers = nn.ModuleList(Block(in_place) for in_place in (False, True, True))

    def forward(self, x, factor):
        stream = self.before(x)
        for layer in self.layers:
            stream = layer(stream, factor)
        stream *= 1 + factor  # the layers after the blocks may work in place too
        return self.after(stream)


def inputs(step):
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(step)), 0.3 + 0.05 * step


def stream_by_hand(network, x, factor):
    """The stream before the blocks, and after them."""
    stream = network.before(x)
    after = stream.clone()
    for layer in network.layers:
        after = after + torch.tanh(layer.linear(after)) * factor
    return stream, after


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_block_kinds_equal_the_network_written_out(order, last, each):
    network = NextDiT()
    cache = FeatureCache(ChosenSteps(frozenset(COMPUTED), order=order).plan(STEPS))
    blocks, kept = CachedBlocks(network, each=each, last=last), {}
    for step in range(STEPS):
        x, factor = inputs(step)
        reuses = cache.place(step, ["a"])
        assert reuses == (step not in COMPUTED)
        with blocks.called(cache) as call:
            found = network(x.clone(), factor)
        stream, after = stream_by_hand(network, x, factor)
        if reuses:
            known = sorted(kept)[-1 - order :]
            value = sum(weight * kept[at] for weight, at in zip(coefficients(known, step), known))
            after = value if last else stream + value
        else:
            call.store(torch.float32)
            kept[step] = after if last else after - stream
        torch.testing.assert_close(found, network.after(after * (1 + factor)), rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(layer) for layer in network.layers)
