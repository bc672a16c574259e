"""The DiT for sampling alone against the DiT that it was made of, layer for layer and run for run."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from qandc_core import (
    apply_cache_to_dit,
    fuse_dit,
    generate,
    load_dit,
    quantize_model,
    remove_cache,
)
from qandc_core.calibration.file import Calibration, fingerprint
from qandc_core.calibration.statistics import LayerStatistics, observed
from qandc_core.fused.linear import FloatLinear, Int8Linear, KitchenLinear, Modulation
from qandc_core.models import DiT, DiTConfig
from qandc_core.quantization.model import DIT_SKIP, QuantizationConfig, named_linears
from qandc_core.quantization.native import FORMATS, NativeConfig, dequantize, quantize_weight

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


@pytest.mark.parametrize("format", FORMATS)
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
    with pytest.raises(ValueError, match="forecasts predictions only"):
        apply_cache_to_dit(fuse_dit(model), 3, order=1)
    with pytest.raises(ValueError, match="fuse_dit"):
        apply_cache_to_dit(model, 3, mode="prediction")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("cfg", [1.0, 1.5])
@pytest.mark.parametrize("mode", [None, "branch", "block"])
def test_generates_what_the_engine_does(sampler, cfg, mode):
    model = load_dit("demo")
    fused = fuse_dit(model)
    if mode is not None:
        for target in (model, fused):
            apply_cache_to_dit(target, 3, mode=mode)
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
