import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import PatchEmbed, Timesteps
from torch import nn

from qandc_core.models import PRESETS, DiT, DiTConfig, preset
from qandc_core.models.dit import timestep_embedding
from qandc_core.models.layouts import diffusers_names, from_diffusers, parameter_names
from qandc_core.models.presets import HEADS

TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
CLASS_IDS = [0, 257, 417, 999, 1000]


pytestmark = pytest.mark.usefixtures("no_grad")


def diffusers_model(**overrides):
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**{"out_channels": 8, "num_embeds_ada_norm": 10, **TINY, **overrides})
    for block in model.transformer_blocks[1:]:  # published weights repeat one embedder, a fresh model has one each
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


def converted(reference):
    """Our DiT with the weights and the conventions (frequencies, epsilon) of a diffusers model."""
    c = reference.config
    config = DiTConfig(
        input_size=c.sample_size,
        patch_size=c.patch_size,
        in_channels=c.in_channels,
        hidden_size=c.num_attention_heads * c.attention_head_dim,
        depth=c.num_layers,
        num_heads=c.num_attention_heads,
        num_classes=c.num_embeds_ada_norm,
        learn_sigma=c.out_channels == 2 * c.in_channels,
        norm2_eps=c.norm_eps,
        frequency_shift=1,
    )
    model = DiT(config)
    state_dict = from_diffusers(reference.state_dict())
    model.load_state_dict({"pos_embed": model.pos_embed, **state_dict})
    return model


def random_input(config, size=None):
    generator = torch.Generator().manual_seed(1)
    rows, cols = size or (config.input_size, config.input_size)
    x = torch.randn(3, config.in_channels, rows, cols, generator=generator)
    return x, torch.tensor([0, 417, 999]), torch.tensor([0, 3, config.num_classes])


def assert_same(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.05 and theirs.std(dim=0).mean() > 0.01  # alive, and not blind to its input
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"out_channels": 4},
        {"patch_size": 4, "in_channels": 3, "out_channels": 6},
        {"norm_eps": 1e-2},
        {"num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32, "num_embeds_ada_norm": 1000},
    ],
    ids=["learned sigma", "fixed sigma", "patch 4", "epsilon", "XL/2 width"],
)
def test_equals_diffusers(overrides):
    reference = diffusers_model(**overrides)
    model = converted(reference)
    x, t, y = random_input(model.config)
    assert_same(model(x, t, y), reference(x, t, y).sample)


def test_conventions_of_the_two_layouts_differ():
    reference = diffusers_model()
    model = converted(reference)
    published = DiT(replace(model.config, frequency_shift=0, norm2_eps=1e-6))
    published.load_state_dict(model.state_dict())
    x, t, y = random_input(model.config)
    difference = (published(x, t, y) - reference(x, t, y).sample).abs().max()
    assert difference > 1e-4


def test_frequencies():
    t = torch.tensor([0, 1, 417, 999])
    angles = t[:, None].double() * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    published = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(timestep_embedding(t).double(), published, atol=1e-4, rtol=0)
    theirs = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)(t)
    torch.testing.assert_close(timestep_embedding(t, shift=1), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (8, 20), (12, 4)])
def test_positions_of_other_sizes(size):
    reference = PatchEmbed(height=8, width=8, patch_size=2, in_channels=4, embed_dim=32)
    model = DiT(DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=2))
    x = torch.randn(1, 4, *size)
    theirs = reference(x) - reference.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.positions(size[0] // 2, size[1] // 2), theirs, atol=1e-5, rtol=0)


def test_larger_input_equals_diffusers():
    reference = diffusers_model()
    model = converted(reference)
    x, t, y = random_input(model.config, size=(16, 16))
    assert_same(model(x, t, y), reference(x, t, y).sample)


def test_rectangular_input_equals_diffusers():
    reference = diffusers_model()
    model = converted(reference)
    x, t, y = random_input(model.config, size=(8, 12))
    # diffusers takes every grid for a square one when it puts the patches back, so compare its tokens.
    tokens = []
    reference.proj_out_2.register_forward_hook(lambda module, args, output: tokens.append(output))
    with pytest.raises(RuntimeError):
        reference(x, t, y)
    output = model(x, t, y)
    assert output.shape == (3, 8, 8, 12)
    patches = output.unflatten(2, (4, 2)).unflatten(4, (6, 2))
    assert_same(torch.einsum("nchpwq->nhwpqc", patches).flatten(3).flatten(1, 2), tokens[0])


def capture(module):
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    return seen


def test_class_ids_and_timesteps_survive_bfloat16():
    config = DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=2)
    model = DiT(config, dtype=torch.bfloat16)
    classes, times = capture(model.y_embedder), capture(model.t_embedder.mlp)
    for class_id in CLASS_IDS:
        model(torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), torch.tensor([999]), torch.tensor([class_id]))
        assert torch.equal(classes[-1][0], torch.tensor([class_id]))
        assert torch.equal(classes[-1][1][0], model.y_embedder.embedding_table.weight[class_id])
        assert torch.equal(times[-1][0], timestep_embedding(torch.tensor([999.0])).bfloat16())
    assert len({tuple(output[0].tolist()) for _, output in classes}) == len(CLASS_IDS)
    assert not torch.equal(times[-1][0], timestep_embedding(torch.tensor([1000.0])).bfloat16())
    assert timestep_embedding(torch.tensor([999])).dtype == torch.float32


def test_null_class():
    assert DiT(preset("DiT-S/8", depth=1), device="meta").null_class == 1000


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_parameters_of_the_paper(name):
    model = DiT(preset(name), device="meta")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    paper = {"S": 33, "B": 130, "L": 458, "XL": 675}[name.removeprefix("DiT-").split("/")[0]]
    assert millions == pytest.approx(paper, rel=0.01)
    ids = torch.zeros(2, device="meta").long()
    assert model(torch.zeros(2, 4, 32, 32, device="meta"), ids, ids).shape == (2, 8, 32, 32)


def test_presets():
    assert len(PRESETS) == 12
    assert HEADS == {384: 6, 768: 12, 1024: 16, 1152: 16}
    assert preset("DiT-B/4", num_classes=10) == DiTConfig(
        patch_size=4, hidden_size=768, depth=12, num_heads=12, num_classes=10
    )
    with pytest.raises(ValueError, match="unknown DiT preset 'DiT-M/2'; expected one of DiT-S/2, "):
        preset("DiT-M/2")


def test_odd_mlp_ratio_is_exact():
    model = DiT(preset("DiT-S/8", hidden_size=896, num_heads=14, depth=1, mlp_ratio=488 / 896), device="meta")
    assert model.blocks[0].mlp.fc1.out_features == 488


def test_keys_are_those_of_the_published_checkpoints():
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    modules = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    modules += [f"blocks.{i}.{name}" for i in range(28) for name in block]
    modules += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    keys = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    keys |= {"pos_embed", "y_embedder.embedding_table.weight"}
    assert set(DiT(preset("DiT-XL/2"), device="meta").state_dict()) == keys
    assert {"pos_embed", *parameter_names(28)} == keys


def test_every_layer_is_an_injected_operation():
    operations = SimpleNamespace(
        **{name: type(name, (getattr(nn, name),), {}) for name in ("Linear", "Conv2d", "LayerNorm", "Embedding")}
    )
    model = DiT(DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=2), operations=operations)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Embedding))]
    assert len(layers) == 1 + 2 + 1 + 2 * 7 + 3
    assert {type(layer) for layer in layers} == set(vars(operations).values())
    holders = [m for m in model.modules() if list(m.parameters(recurse=False))]
    assert set(map(type, holders)) <= set(vars(operations).values())
    plain = DiT(model.config)
    plain.load_state_dict(model.state_dict())
    inputs = random_input(model.config)
    assert torch.equal(model(*inputs), plain(*inputs))


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def kept(names):
    return [name for name in names if not any(pattern in name for pattern in ("pos_embed", "norm"))]


def test_skip_patterns_mean_the_same_layers_on_both_models():
    with torch.device("meta"):
        theirs = kept(linears(DiTTransformer2DModel()))
    ours = [name for name in linears(DiT(preset("DiT-XL/2"), device="meta")) if kept(diffusers_names(name))]
    assert (len(ours), len(theirs)) == (28 * 4 + 2, 170)
    assert sorted(other for name in ours for other in diffusers_names(name)) == sorted(theirs)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.3.attn.qkv", tuple(f"transformer_blocks.3.attn1.to_{part}" for part in "qkv")),
        ("blocks.13.attn.proj", ("transformer_blocks.13.attn1.to_out.0",)),
        ("blocks.3.mlp.fc1", ("transformer_blocks.3.ff.net.0.proj",)),
        ("blocks.3.mlp.fc2", ("transformer_blocks.3.ff.net.2",)),
        ("blocks.3.adaLN_modulation.1", ("transformer_blocks.3.norm1.linear",)),
        ("t_embedder.mlp.0", ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",)),
        ("y_embedder.embedding_table", ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table",)),
        ("x_embedder.proj", ("pos_embed.proj",)),
        ("final_layer.adaLN_modulation.1", ("proj_out_1",)),
        ("final_layer.linear", ("proj_out_2",)),
        ("transformer_blocks.3.attn1.to_q", ("transformer_blocks.3.attn1.to_q",)),
    ],
)
def test_diffusers_names(name, expected):
    assert diffusers_names(name) == expected


def test_diffusers_names_are_modules_of_diffusers():
    modules = dict(diffusers_model().named_modules())
    ours = DiT(DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10))
    for name, module in ours.named_modules():
        if list(module.parameters(recurse=False)):
            weights = [modules[other].weight for other in diffusers_names(name)]
            assert sum(weight.numel() for weight in weights) == module.weight.numel()


def test_import_is_cheap():
    code = "import sys, qandc_core.models as m; assert not {'diffusers', 'sklearn', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_tokens_are_row_major_through_every_block(rows, memory_format):
    """Kernels read the residual stream row by row; a stream of another layout costs a copy in every norm."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=2)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model = model.to(memory_format=memory_format)
    x = torch.randn(rows, 4, 8, 8).contiguous(memory_format=memory_format)
    seen = []
    for layer in (model.x_embedder, *model.blocks):
        layer.register_forward_hook(lambda layer, args, out: seen.append(out.stride()[1:]))
    for block in model.blocks:
        for layer in (block.norm1, block.norm2, block.attn, block.mlp):
            layer.register_forward_hook(lambda layer, args, out: seen.append(args[0].stride()[1:]))
    model(x, torch.full((rows,), 300), torch.zeros(rows, dtype=torch.long))
    assert set(seen) == {(32, 1)} and len(seen) == 3 + 8


def test_positions_of_another_size_are_computed_once():
    model = DiT(DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=2))
    first = model.positions(4, 6)
    assert model.positions(4, 6) is first and model.positions(6, 4) is not first
    half = model.to(torch.bfloat16).positions(4, 6)
    assert half.dtype == torch.bfloat16 and torch.equal(half, first.bfloat16())
    assert model.positions(4, 4) is model.pos_embed
    with torch.inference_mode():
        late = model.positions(4, 8)
    assert not late.is_inference()
