"""The DiT for sampling alone against the DiT that it was made of, layer for layer and run for run."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from qandc_core import (
    DiTTrajectories,
    SamplingConfig,
    apply_cache_to_dit,
    fit_variance_compensation,
    fuse_dit,
    generate,
    load_dit,
    quantize_model,
    remove_cache,
    save_dit,
)
from qandc_core.calibration.file import Calibration, fingerprint
from qandc_core.calibration.statistics import LayerStatistics, observed
from qandc_core.diffusion.process import ReverseProcess
from qandc_core.fused.linear import FloatLinear, Int8Linear, KitchenLinear, Modulation
from qandc_core.models import DiT, DiTConfig
from qandc_core.models.layers import DIT_SKIP, named_linears
from qandc_core.quantization.formats import BY_NAME
from qandc_core.quantization.model import QuantizationConfig
from qandc_core.quantization.native import NativeConfig, dequantize, quantize_weight

CONFIG = DiTConfig(input_size=8, in_channels=4, hidden_size=64, depth=3, num_heads=4, num_classes=10)
LABELS = [3, 7, 1]
ROUNDED = 0.01  # integer codes flip where inputs differ in the last digit

pytestmark = pytest.mark.usefixtures("no_grad")


def random_dit(**overrides):
    torch.manual_seed(0)
    model = DiT(replace(CONFIG, **overrides)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def inputs(model, count=3):
    generator = torch.Generator().manual_seed(1)
    config = model.config
    x = torch.randn(count, config.in_channels, config.input_size, config.input_size, generator=generator)
    return x.to(model.pos_embed), torch.tensor([999, 500, 3])[:count], torch.tensor(LABELS)[:count]


def relative(found, expected):
    return float((found - expected).float().norm() / expected.float().norm())


def prediction(fused, x, t, y, *rest):
    return fused(x, fused.modulations(t, y), *rest)


def native_layers(model, format, skip=DIT_SKIP):
    return {
        name: quantize_weight(name, layer.weight, layer.bias, NativeConfig(format))
        for name, layer in named_linears(model, skip)
    }


def test_rounded_modulations_come_from_one_layer():
    model = random_dit()
    layers = native_layers(model, "W8A8", ("t_embedder",))
    stacked = fuse_dit(model, "reference", layers)
    (adaln,) = stacked.adaln
    assert adaln.codes.shape == (6 * 64 * 3 + 2 * 64, 64)
    separate = fuse_dit(model, "kitchen", layers)
    assert len(separate.adaln) == 4
    _, t, y = inputs(model)
    assert relative(stacked.modulations(t, y), separate.modulations(t, y)) < ROUNDED


@pytest.mark.parametrize("overrides", [{}, {"patch_size": 4}, {"learn_sigma": False}, {"norm2_eps": 1e-5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicts_as_the_dit(overrides, dtype):
    model = random_dit(**overrides).to(dtype)
    x, t, y = inputs(model)
    assert relative(prediction(fuse_dit(model), x, t, y), model(x, t, y)) < (1e-5 if dtype == torch.float32 else 0.02)


def test_other_resolutions_get_their_own_positions():
    model = random_dit()
    x, t, y = inputs(model)
    wide = torch.cat([x, x], dim=3)
    assert relative(prediction(fuse_dit(model), wide, t, y), model(wide, t, y)) < 1e-5


@pytest.mark.parametrize("kernels", ["reference", "kitchen"])
def test_per_token_layers_round_as_the_quantized_dit_does(kernels):
    model = quantize_model(random_dit(), 8, 8, DIT_SKIP)
    x, t, y = inputs(model)
    fused = fuse_dit(model, kernels)
    assert isinstance(fused.blocks[0].qkv, Int8Linear if kernels == "reference" else KitchenLinear)
    assert isinstance(fused.adaln[0], FloatLinear)
    assert relative(prediction(fused, x, t, y), model(x, t, y)) < ROUNDED


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_layers_hand_codes_from_one_to_the_next(symmetric):
    model = load_dit("demo")
    calibration = calibrated(model)
    config = QuantizationConfig(symmetric_activations=symmetric)
    quantized = quantize_model(copy.deepcopy(model), 8, 8, DIT_SKIP, calibration, config)
    x, t, y = inputs(model)
    fused = fuse_dit(quantized, "reference")
    block = fused.blocks[0]
    modulation = fused.modulations(t, y)[:, :6]
    tokens = fused.embed(x)
    hidden = block.fc1(tokens, as_modulation(block, modulation))
    assert hidden.dtype == torch.int8
    full = model(x, t, y)
    lost = relative(quantized(x, t, y), full)
    assert 0.5 * lost < relative(prediction(fused, x, t, y), full) < 1.5 * lost
    assert relative(prediction(fused, x, t, y), quantized(x, t, y)) < 0.3 * lost


def as_modulation(block, modulation):
    return Modulation(modulation[:, 3], modulation[:, 4], block.eps[1])


def calibrated(model):
    x, t, y = inputs(model)
    statistics = {name: LayerStatistics.empty(layer.in_features) for name, layer in named_linears(model, DIT_SKIP)}
    with observed(named_linears(model, DIT_SKIP), lambda name, x: statistics[name].update(x.flatten(0, -2))):
        model(x, t, y)
    return Calibration(fingerprint(model), statistics)


@pytest.mark.parametrize("format", BY_NAME)
@pytest.mark.parametrize("kernels", ["reference", "kitchen"])
def test_layers_in_comfyui_formats_equal_their_decoded_weights(format, kernels):
    model = random_dit()
    layers = native_layers(model, format)
    fused = fuse_dit(model, kernels, native=layers)
    decoded = copy.deepcopy(model)
    for name, layer in layers.items():
        decoded.get_submodule(name).weight.copy_(dequantize(layer.tensors))
    x, t, y = inputs(model)
    exact, found = decoded(x, t, y), prediction(fused, x, t, y)
    assert relative(found, exact) < 0.02  # inputs in 8 bits
    packed = fused.blocks[0].qkv
    if kernels == "kitchen":
        assert packed.weight.nbytes == layers["blocks.0.attn.qkv"].tensors["weight"].nbytes


def test_reused_branches_are_those_that_were_kept():
    model = random_dit()
    fused = fuse_dit(model)
    x, t, y = inputs(model)
    modulation = fused.modulations(t, y)
    tokens = (16, 64)
    for shape in [(3, 2, 3, *tokens), (3, *tokens)]:
        kept = torch.zeros(shape)
        computed = fused(x, modulation, kept)
        assert relative(computed, model(x, t, y)) < 1e-5
        assert relative(fused(x, modulation, kept, True), computed) < 1e-5
        assert relative(fused(0 * x, modulation, kept, True), computed) > 1e-3


@pytest.mark.parametrize("quantized", [False, True])
def test_compiled_blocks_predict_the_same(quantized):
    model = random_dit()
    layers = native_layers(model, "W8A8") if quantized else {}
    x, t, y = inputs(model)
    plain, compiled = (fuse_dit(model, "reference", layers, compile=c) for c in (False, True))
    assert relative(prediction(compiled, x, t, y), prediction(plain, x, t, y)) < (ROUNDED if quantized else 1e-5)


def test_nothing_holds_on_to_layers_that_were_replaced():
    model = random_dit()
    layers = native_layers(model, "W8A8")
    fused = fuse_dit(model, "reference", layers)
    weight = weakref.ref(model.blocks[0].attn.qkv.weight)
    del model
    gc.collect()
    assert weight() is None and fused.blocks[0].qkv.codes.dtype == torch.int8


def memory(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor is not None}


def tensors_of(module):
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("kind", ["float", "int8", "static", "native W8A8", "native W4A8"])
@pytest.mark.parametrize("kernels", ["reference", "kitchen"])
def test_shares_nothing_with_what_it_was_made_of(kind, kernels):
    model, layers = random_dit(), {}
    if kind == "static" and kernels == "kitchen":
        pytest.skip("comfy-kitchen has no static activations")
    if kind.startswith("native"):
        layers = native_layers(model, kind.removeprefix("native "))
    elif kind != "float":
        quantize_model(model, 8, 8, DIT_SKIP, calibrated(model) if kind == "static" else None)
    fused = fuse_dit(model, kernels, layers)
    given = [*tensors_of(model), *(tensor for layer in layers.values() for tensor in layer.tensors.values())]
    assert not memory(given) & memory(tensors_of(fused))
    x, t, y = inputs(model)
    before = prediction(fused, x, t, y)
    for tensor in given:
        tensor.zero_()
    assert torch.equal(prediction(fused, x, t, y), before) and before.abs().max() > 0


def test_refuses_everything_but_sampling(tmp_path):
    model = random_dit()
    fused = fuse_dit(model)
    x, t, y = inputs(model)
    config = SamplingConfig(3, 1.5)
    process = ReverseProcess(fused, LABELS, config)
    before = {name: value.clone() for name, value in fused.named_parameters()}
    for attempt in (
        lambda: fused(x, t, y),
        lambda: process.step(0, x, None),
        lambda: DiTTrajectories(fused, LABELS, config),
        lambda: fit_variance_compensation(model, fused, LABELS, config),
        lambda: quantize_model(fused, 8, 8),
        lambda: save_dit(fused, tmp_path / "fused.safetensors"),
        lambda: fused.state_dict(),
        lambda: fused.load_state_dict(model.state_dict()),
        lambda: fused.half(),
        lambda: fused.to(torch.bfloat16),
        lambda: fused.double(),
    ):
        with pytest.raises(
            ValueError, match=r"^A FusedDiT only samples, by generate\(\); [\w, ]+ the DiT it was made of"
        ):
            attempt()
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in fused.named_parameters())
    assert relative(prediction(fused, x, t, y), model(x, t, y)) < 1e-5


@pytest.mark.parametrize("quantized", [False, True])
def test_copies_predict_the_same_and_own_their_weights(quantized):
    model = random_dit()
    fused = fuse_dit(quantize_model(model, 8, 8, DIT_SKIP) if quantized else model, "reference")
    generate(fused, LABELS, 3, 1.5, "ddim")
    copied = copy.deepcopy(fused)
    x, t, y = inputs(model)
    assert fused.loops and not copied.loops
    assert torch.equal(prediction(copied, x, t, y), prediction(fused, x, t, y))
    assert not memory(tensors_of(copied)) & memory(tensors_of(fused))


def test_moving_keeps_float32_scales_and_forgets_the_loop():
    model = quantize_model(random_dit().bfloat16(), 8, 8, DIT_SKIP)
    fused = fuse_dit(model, "reference")
    generate(fused, LABELS, 3, 1.5, "ddim")
    fused.to(torch.bfloat16).to("cpu")
    assert fused.blocks[0].qkv.column_scale.dtype == torch.float32 and not fused.loops


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cache", [None, {"reuse": "branch"}, {"reuse": "prediction", "order": 1}])
def test_guides_some_channels_as_the_engine_does(channels, cache):
    """A model of four channels and as many of variance, of which guidance takes the first ones."""
    model = random_dit()
    fused = fuse_dit(model)
    settings = dict(class_labels=LABELS, steps=5, cfg_scale=3.0, sampler="ddim", seed=2)
    if cache is not None:
        apply_cache_to_dit(fused, 2, **cache)
        if cache["reuse"] == "branch":
            apply_cache_to_dit(model, 2)
    found, _ = generate(fused, **settings, guidance_channels=channels)
    everywhere, _ = generate(fused, **settings)
    assert relative(found, everywhere) > 1e-3
    if cache is None or cache["reuse"] == "branch":
        assert relative(found, generate(model, **settings, guidance_channels=channels)[0]) < 1e-5
    else:  # predictions of the first two steps have nothing to be extrapolated from
        short, full = {**settings, "steps": 1}, {**settings, "steps": 1, "guidance_channels": channels}
        assert relative(generate(fused, **full)[0], generate(model, **full)[0]) < 1e-5
        assert relative(generate(fused, **short)[0], generate(model, **full)[0]) > 1e-4


@pytest.mark.parametrize("cache", [{"reuse": "prediction", "order": 1}, {"reuse": "branch"}, {"reuse": "block"}])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_run_after_one_of_nan_is_as_before_it(cache, sampler):
    fused = apply_cache_to_dit(fuse_dit(random_dit()), 3, **cache)
    settings = dict(class_labels=LABELS, steps=6, cfg_scale=1.5, sampler=sampler, seed=3)
    first, _ = generate(fused, **settings)
    noise = torch.full((7, 3, 4, 8, 8), torch.finfo(torch.float32).max)  # overflows on the way
    assert not generate(fused, **settings, noise=noise)[0].isfinite().all()
    assert torch.equal(generate(fused, **settings)[0], first)


@pytest.mark.parametrize("format", BY_NAME)
def test_kitchen_without_an_activation_of_its_own(format, monkeypatch):
    """comfy-kitchen before 0.2.38 has no input_act for W4A8, earlier ones none for W8A8."""
    import comfy_kitchen

    model = random_dit()
    layers = native_layers(model, format)
    x, t, y = inputs(model)
    expected = prediction(fuse_dit(model, "kitchen", layers), x, t, y)
    int8, w4a8 = comfy_kitchen.int8_linear, comfy_kitchen.w4a8_int8_linear

    def int8_linear(x, weight, weight_scale, bias=None, out_dtype=None, convrot=False, convrot_groupsize=256):
        return int8(x, weight, weight_scale, bias, out_dtype, convrot, convrot_groupsize)

    def w4a8_int8_linear(x, qdata, s_rel, s_channel, codebook, correction, bias, group_size, convrot_groupsize, dtype):
        return w4a8(x, qdata, s_rel, s_channel, codebook, correction, bias, group_size, convrot_groupsize, dtype)

    monkeypatch.setattr(comfy_kitchen, "int8_linear", int8_linear)
    monkeypatch.setattr(comfy_kitchen, "w4a8_int8_linear", w4a8_int8_linear)
    assert relative(prediction(fuse_dit(model, "kitchen", layers), x, t, y), expected) < ROUNDED


def test_refuses_what_it_cannot_run():
    model = random_dit()
    with pytest.raises(ValueError, match="kernels must be auto or one of"):
        fuse_dit(model, "cuda")
    with pytest.raises(ValueError, match="blocks.9.attn.qkv is no layer"):
        fuse_dit(model, native={"blocks.9.attn.qkv": None})
    with pytest.raises(ValueError, match="remove_cache"):
        fuse_dit(apply_cache_to_dit(copy.deepcopy(model), 3))
    zero_point = quantize_model(
        copy.deepcopy(model), 8, 8, DIT_SKIP, config=QuantizationConfig(symmetric_weights=False)
    )
    with pytest.raises(ValueError, match="zero point"):
        fuse_dit(zero_point)
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        fuse_dit(model, "triton")
    with pytest.raises(ValueError, match="takes this package's DiT"):
        fuse_dit(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="extrapolates predictions only"):
        apply_cache_to_dit(fuse_dit(model), 3, order=1)
    with pytest.raises(ValueError, match="fuse_dit"):
        apply_cache_to_dit(model, 3, reuse="prediction")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("cfg", [1.0, 1.5])
@pytest.mark.parametrize("reuse", [None, "branch", "block"])
def test_generates_what_the_engine_does(sampler, cfg, reuse):
    model = load_dit("demo")
    fused = fuse_dit(model)
    if reuse is not None:
        for target in (model, fused):
            apply_cache_to_dit(target, 3, reuse=reuse)
    expected, report = generate(model, LABELS, 10, cfg, sampler, seed=4)
    found, fast = generate(fused, LABELS, 10, cfg, sampler, seed=4)
    assert relative(found, expected) < 1e-5
    assert fast.computed == report.computed and len(fast.seconds) == 10
    again, _ = generate(fused, LABELS, 10, cfg, sampler, seed=4)
    assert torch.equal(found, again)
    other, _ = generate(fused, LABELS[::-1], 10, cfg, sampler, seed=4)
    assert not torch.equal(found, other)
    remove_cache(fused)
    assert fused.cache is None
