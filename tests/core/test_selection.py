"""Which layers are quantized, and what is said of patterns that match none."""

import pytest
from torch import nn

from qandc_core.quantization.selection import block_linears, matching, unmatched


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)


class Block(nn.Module):
    def __init__(self, modulated=True, extra=False):
        super().__init__()
        self.attn, self.mlp = Attention(), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        if modulated:
            self.modulation = nn.Linear(4, 24)
        if extra:
            self.after = nn.Linear(4, 4)


def embedder():
    return nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])


class DiT(nn.Module):
    """Every kind of list that a real family has."""

    def __init__(self):
        super().__init__()
        self.t_embedder = nn.ModuleList([nn.Identity(), embedder()])
        self.label_emb = nn.Sequential(embedder())
        self.caption_projection = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])
        self.distilled_guidance_layer = nn.ModuleDict({"layers": nn.ModuleList([embedder() for _ in range(5)])})
        self.context_refiner = nn.ModuleList([Block(modulated=False) for _ in range(2)])
        self.noise_refiner = nn.ModuleList([Block() for _ in range(2)])
        self.adapter = Encoder()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.control_blocks = nn.ModuleList([Block(extra=True)])
        self.final_layer = nn.ModuleList([nn.Linear(4, 4), embedder()])


class SpatialTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.transformer_blocks = nn.ModuleList([Block(modulated=False)])
        self.time_pos_embed = embedder()


class ResBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4, 8))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.time_embed, self.label_emb = embedder(), nn.Sequential(embedder())
        pair = lambda: nn.ModuleList([ResBlock(), SpatialTransformer()])  # noqa: E731
        self.input_blocks, self.middle_block, self.output_blocks = (
            nn.ModuleList([pair()]),
            pair(),
            nn.ModuleList([pair()]),
        )


def is_linear(module):
    return isinstance(module, nn.Linear)


def lists_of(network, known):
    return {name.split(".")[0] for name, _ in block_linears(network, known, is_linear)}


def test_known_lists_and_those_of_the_same_build():
    """Blocks of another width of the same build count; text encoders, adapters, projections and embedders do not."""
    found = [name for name, _ in block_linears(DiT(), ["blocks"], is_linear)]
    assert {name.split(".")[0] for name in found} == {"blocks", "noise_refiner", "control_blocks"}
    assert "blocks.2.attn.qkv" in found and "control_blocks.0.after" in found
    assert found == [name for name, module in DiT().named_modules() if is_linear(module) and name in found]


def test_a_network_that_nobody_knows():
    """The outermost lists with attention."""
    assert lists_of(DiT(), []) == {"blocks", "noise_refiner", "control_blocks", "context_refiner"}


def test_a_list_deep_in_the_network_is_found_where_no_other_is():
    network = nn.ModuleDict({"transformer": Encoder(), "t_embedder": embedder()})
    assert lists_of(network, []) == {"transformer"}


def test_a_unet_gives_its_attention_only():
    found = [name for name, _ in block_linears(UNet(), [], is_linear)]
    assert len(found) == 3 * 6 and not any("emb" in name for name in found)
    assert "input_blocks.0.1.transformer_blocks.0.attn.qkv" in found and "middle_block.1.proj_in" in found


NAMES = ["double_blocks.0.img_mod.lin", "double_blocks.0.txt_attn.qkv", "single_blocks.1.linear1"]


@pytest.mark.parametrize(
    "pattern, near",
    [("IMG_MOD", "img_mod"), ("imgmod", "img_mod"), ("linear2", "linear1"), ("doubleblocks", "double_blocks")],
)
def test_a_pattern_that_matches_nothing_is_named_with_near_names(pattern, near):
    (sentence,) = unmatched(["single_blocks", pattern], NAMES)
    assert repr(pattern) in sentence and near in sentence


def test_nonsense_has_no_near_name():
    assert unmatched(["qqqqqqqqqq"], NAMES) == ["no layer's name contains 'qqqqqqqqqq'"]
    assert unmatched(["txt_attn", "0"], NAMES) == [] and matching(NAMES, ["txt", "linear"]) == NAMES[1:]
