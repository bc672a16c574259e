import copy
import weakref
from itertools import product
from types import MappingProxyType

import pytest
import torch
from torch import nn

from qandc_core.calibration.statistics import LayerStatistics
from qandc_core.quantization import budget as checkpoint
from qandc_core.quantization import gptq
from qandc_core.quantization.budget import (
    Budget,
    LayerSource,
    Step,
    ladder,
    least_number,
    predicted_errors,
    quantize_layers,
    upgrades,
)
from qandc_core.quantization.native import NativeConfig, NativeLayer, dequantize, quantize_weight
from qandc_core.quantization.sensitivity import answering_as, grouped, sensitivities

NEAREST = NativeConfig("W4A8", "nearest")


pytestmark = pytest.mark.usefixtures("no_grad")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def source(name, outputs=16, inputs=64, seed=0, power=1, bias=True, **choices):
    weight = torch.randn(outputs, inputs, generator=seeded(seed)) ** power / inputs**0.5
    b = torch.zeros(outputs) if bias else None
    return LayerSource(name, lambda: (weight.clone(), b), weight.nbytes + (b.nbytes if bias else 0), **choices)


def calibrated(width, seed=0, held_out=0):
    mix = torch.randn(width // 4, width, generator=seeded(50))
    x = torch.randn(600, width // 4, generator=seeded(seed)) @ mix + 0.3 * torch.randn(width, generator=seeded(51))
    statistics = LayerStatistics.empty(width, hessian=True, held_out=held_out)
    statistics.update(x[held_out:])
    statistics.keep_held_out(x[:held_out])
    return statistics


def formats(found):
    return {name: "float" if layer is None else layer.format for name, layer in found.items()}


def size(found, layers):
    before = {layer.name: layer.bytes for layer in layers}
    return sum(
        before[name] if layer is None else sum(tensor.nbytes for tensor in layer.tensors.values())
        for name, layer in found.items()
    )


def squared(found):
    return sum(layer.error**2 for layer in found.values() if layer is not None)


def test_layers_are_those_of_quantize_weight():
    layers = [source("a"), source("b", 8, 32, seed=1, bias=False), source("c", 7, 30, seed=2)]
    statistics = {"a": calibrated(64, held_out=20)}
    seen = []
    found = quantize_layers(layers, NativeConfig("W4A8"), statistics, callback=lambda *call: seen.append(call))
    assert list(found) == ["a", "b", "c"] and found["c"] is None
    for layer in layers[:2]:
        alone = quantize_weight(layer.name, *layer.load(), NativeConfig("W4A8"), statistics.get(layer.name))
        ours = found[layer.name]
        assert ours.error == alone.error and ours.config == alone.config
        assert all(torch.equal(ours.tensors[k].float(), alone.tensors[k].float()) for k in alone.tensors)
    assert seen == [("a", found["a"].error), ("b", found["b"].error), ("c", 0.0)]


def test_gptq_needs_statistics_of_every_layer():
    with pytest.raises(ValueError, match="^gptq rounding needs the input Hessian of b"):
        quantize_layers([source("a"), source("b")], NativeConfig(rounding="gptq"), {"a": calibrated(64)})


@pytest.mark.parametrize("kept", ["hessian", "inputs"])
@pytest.mark.parametrize("budget", [Budget(), Budget(max_error=0.03), Budget(max_bytes=10**5)])
def test_layers_of_the_same_inputs_share_a_factorization(monkeypatch, kept, budget):
    """Query, key and value: the codes are those of each alone, and what another layer saw is not taken for theirs."""

    def seen(seed):
        if kept == "hessian":
            return calibrated(64, seed)
        statistics, x = LayerStatistics.empty(64, inputs=200), torch.randn(300, 64, generator=seeded(seed)).cumsum(1)
        statistics.update(x)
        statistics.keep_inputs(x)
        return statistics

    layers = [source(name, seed=i) for i, name in enumerate(("q", "k", "v", "out"))]
    statistics = {name: seen(0) for name in "qkv"} | {"out": seen(1)}
    alone = [quantize_layers([layer], NativeConfig("W4A8"), statistics, budget)[layer.name] for layer in layers]
    factored = []
    monkeypatch.setattr(
        gptq, "reversed_factor", lambda *args, real=gptq.reversed_factor: factored.append(1) or real(*args)
    )
    found = quantize_layers(layers, NativeConfig("W4A8"), statistics, budget)
    if budget.max_bytes is None:
        assert len(factored) == 2
        for layer, one in zip(found.values(), alone):
            assert layer.format == one.format and layer.error == one.error
            assert all(torch.equal(layer.tensors[key].float(), one.tensors[key].float()) for key in one.tensors)
    else:
        assert len(factored) <= 2 * len(layers)


def test_one_layer_is_loaded_at_a_time():
    alive = []

    def loaded(name):
        def load():
            weight = torch.randn(8, 32)
            assert not [w for w in alive if w() is not None], "the last layer's weight is still held"
            alive.append(weakref.ref(weight))
            return weight, None

        return LayerSource(name, load, 1024)

    quantize_layers([loaded(name) for name in "abc"], NEAREST, {}, Budget(max_error=0.2, max_bytes=10**6))


def test_a_layer_keeps_the_shape_of_its_weight():
    found = quantize_layers([source("a"), source("b", keeps_shape=True)], NEAREST, {})
    assert formats(found) == {"a": "W4A8", "b": "W8A8"} and found["b"].tensors["weight"].shape == (16, 64)


def test_max_error_promotes():
    """To the first format of the ladder whose error is within the limit, in the end float."""
    layers = [source("a", seed=1), source("b", power=5, seed=2), source("c", 6, 64)]
    ladder = ("W4A8", "W6A8", "W8A8")
    errors = {
        format: {
            name: layer.error
            for name, layer in quantize_layers(layers, NativeConfig(format, "nearest"), {}).items()
            if layer is not None
        }
        for format in ladder
    }
    every = sorted(error for found in errors.values() for error in found.values())
    for limit in (1.0, every[0] / 2, *((a + b) / 2 for a, b in zip(every, every[1:]))):
        found = quantize_layers(layers, NEAREST, {}, Budget(max_error=limit))
        for name in "ab":
            able = [format for format in ladder if errors[format][name] <= limit]
            assert formats(found)[name] == (able[0] if able else "float")
        assert formats(found)["c"] == "float"


def test_a_collapse_is_promoted_or_refused():
    weight = torch.full((4, 16), 1e3)
    weight[:, 1::2] *= -1
    weight += 0.01 * torch.randn(4, 16, generator=seeded(0))
    statistics = LayerStatistics.empty(16, hessian=True)
    statistics.update(torch.ones(50, 16))
    layers = [LayerSource("fc", lambda: (weight, None), weight.nbytes)]
    with pytest.raises(ValueError, match="^fc cannot be quantized to W4A8"):
        quantize_layers(layers, NEAREST, {"fc": statistics})
    found = quantize_layers(layers, NEAREST, {"fc": statistics}, Budget(max_error=1.0))
    assert formats(found)["fc"] in ("W8A8", "float")


def test_damaged_weights_are_refused_whatever_the_budget():
    layers = [LayerSource("fc", lambda: (torch.full((4, 16), float("nan")), None), 256)]
    for budget in (Budget(), Budget(max_error=0.1), Budget(max_bytes=10**6)):
        with pytest.raises(ValueError, match="^The weight of fc holds values that are not finite"):
            quantize_layers(layers, NEAREST, {}, budget)


# Sizes.


def several():
    powers = (1, 1, 3, 5)
    return [source(f"l{i}", 32, 128 * (1 + i % 2), seed=i, power=power) for i, power in enumerate(powers)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("calibration", [False, True])
def test_max_bytes_is_kept_and_used(share, calibration):
    layers = several()
    statistics = {layer.name: calibrated(layer.load()[0].shape[1]) for layer in layers} if calibration else {}
    config = NativeConfig("W4A8")
    plain = quantize_layers(layers, config, statistics)
    least, most = size(plain, layers), sum(layer.bytes for layer in layers)
    limit = int(least + share * (most - least))
    found = quantize_layers(layers, config, statistics, Budget(max_bytes=limit))
    assert size(found, layers) <= limit
    if share == 0:
        assert formats(found) == formats(plain)
    elif share == 1:
        assert set(formats(found).values()) == {"float"}
    else:
        assert squared(found) < squared(plain)


def test_finer_formats_are_of_the_same_rounding():
    layers, statistics = [source("a", 32, 128)], {"a": calibrated(128)}
    eight = quantize_layers(layers, NativeConfig("W8A8"), statistics)["a"]
    limit = sum(tensor.nbytes for tensor in eight.tensors.values())
    seen = []
    found = quantize_layers(
        layers, NativeConfig("W4A8"), statistics, Budget(max_bytes=limit), lambda *call: seen.append(call)
    )["a"]
    assert torch.equal(found.tensors["weight"], eight.tensors["weight"]) and found.error == eight.error
    assert [name for name, _ in seen] == ["a", "a"] and seen[1][1] == eight.error < seen[0][1]


def test_too_few_bytes():
    layers = several()
    least = size(quantize_layers(layers, NEAREST, {}), layers)
    with pytest.raises(ValueError, match=r"^In W4A8 the layers take 0\.0 MiB, 0\.0 MiB are allowed"):
        quantize_layers(layers, NEAREST, {}, Budget(max_bytes=least - 1))
    with pytest.raises(ValueError, match=r"^In W4A8 with errors up to 0\.001 the layers take 0\.1 MiB, 0\.0 MiB are"):
        quantize_layers(layers, NEAREST, {}, Budget(max_error=0.001, max_bytes=least))


def picked(ladders, limit, shares=MappingProxyType({})):
    return {name: step.format for name, step in upgrades(ladders, "W4A8", Budget(max_bytes=limit), shares)}


def test_layers_with_large_errors_come_first():
    def steps(error, width=100):
        return [Step("W4A8", error, width), Step("W8A8", error / 8, 2 * width), Step("float", 0.0, 4 * width)]

    ladders = {"a": steps(0.05), "b": steps(0.2), "c": steps(0.1), "wide": steps(0.1, 1000), "float": steps(0)[2:]}
    taken = 4 * 100 + 1000 + 300 - 100  # the float layer's 400 count once

    def chosen(extra):
        return picked(ladders, taken + 100 + extra)

    assert chosen(0) == {}
    assert chosen(100) == {"b": "W8A8"}
    assert chosen(200) == {"b": "W8A8", "c": "W8A8"}
    assert chosen(300) == {"b": "W8A8", "c": "W8A8", "a": "W8A8"}
    assert chosen(500) == {"b": "float", "c": "W8A8", "a": "W8A8"}
    assert chosen(10**6) == dict.fromkeys(("a", "b", "c", "wide"), "float")
    # What a layer's error does to the model counts, not the error itself.
    assert picked(ladders, taken + 200, {"a": 100.0}) == {"a": "W8A8"}


def test_error_removed_is_weighed_against_the_bytes_that_it_takes():
    """The wide layer loses more, and for its ten times as many bytes less: both do not fit."""
    ladders = {
        "narrow": [Step("W4A8", 0.1, 100), Step("W8A8", 0.0, 200)],
        "a wide one": [Step("W4A8", 0.2, 1000), Step("W8A8", 0.0, 2000)],
    }
    assert picked(ladders, 1100 + 1000) == {"narrow": "W8A8"}
    assert picked(ladders, 1100 + 1100) == dict.fromkeys(ladders, "W8A8")


def test_a_ladder_leaves_out_formats_that_two_others_beat():
    def layer(format, error, size):
        return NativeLayer({"weight": torch.zeros(size, dtype=torch.int8)}, {}, error, format)

    four, eight = layer("W4A8", 0.1, 100), layer("W8A8", 0.0, 200)
    formats = [step.format for step in ladder(source("a"), four, layer("W6A8", 0.09, 150), eight)]
    assert formats == ["W4A8", "W8A8", "float"]
    formats = [step.format for step in ladder(source("a"), four, layer("W6A8", 0.03, 150), eight)]
    assert formats == ["W4A8", "W6A8", "W8A8", "float"]


def random_ladders(seed):
    """Of six layers and shares of the model's error, W6A8 among the formats."""
    generator = seeded(seed)
    ladders, shares = {}, {}
    for name in "abcdef":
        error, width, shares[name] = (float(v) for v in torch.rand(3, generator=generator) + 0.2)
        four, width = 0.1 * error, round(1000 * width)
        ladders[name] = [
            Step("W4A8", four, width), Step("W6A8", four / 3.5, round(1.44 * width)),
            Step("W8A8", four / 10, round(1.8 * width)), Step("float", 0.0, 4 * width),
        ]  # fmt: skip
    return ladders, shares


def squares_and_bytes(ladders, shares, choice):
    error = sum(shares[name] * step.error**2 for name, step in zip(ladders, choice))
    return error, sum(step.bytes for step in choice)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_close_to_the_best_of_all_choices(seed):
    ladders, shares = random_ladders(seed)
    every = [squares_and_bytes(ladders, shares, choice) for choice in product(*ladders.values())]
    least, whole = min(size for _, size in every), max(error for error, _ in every)
    for limit in (int(1.3 * least), int(1.6 * least), 3 * least):
        chosen = picked(ladders, limit, shares)
        choice = [
            next(step for step in steps if step.format == chosen.get(name, "W4A8")) for name, steps in ladders.items()
        ]
        error, size = squares_and_bytes(ladders, shares, choice)
        best = min(error for error, size in every if size <= limit)
        assert size <= limit and best <= error * (1 + 1e-9) and error - best < 0.1 * whole


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("seed", range(5))
def test_the_fewest_upgrades_for_an_error_are_found_in_few_measurements(seed, scale):
    """Whatever factor the prediction is off by; nothing is taken on trust that was not measured."""
    ladders, shares = random_ladders(seed)
    steps = upgrades(ladders, "W4A8", Budget(max_model_error=0.1), shares)
    predicted = predicted_errors(ladders, steps, shares)
    assert predicted == sorted(predicted, reverse=True) and predicted[-1] == 0
    measured = []

    def error(number):
        measured.append(number)
        return scale * predicted[number] * (1 + 0.1 * (number % 2))

    for share in (1.5, 0.9, 0.5, 0.2, 0.01):
        measured.clear()
        target = share * scale * predicted[0]
        number = least_number(predicted, error, target)
        assert len(measured) <= checkpoint.TRIES
        assert number in measured or number == len(steps)
        assert number == len(steps) or error(number) <= target
        best = next(n for n in range(len(predicted)) if error(n) <= target)
        assert best <= number <= best + 2


# The whole model's error.


class Chain(nn.Module):
    """Layers in residual blocks; the last one alone makes the output."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(5))
            self.last = nn.Linear(64, 64)

    def forward(self, x):
        for block in self.blocks:
            x = x + 0.3 * torch.tanh(block(x))
        return self.last(x)


def chain():
    """The model, its layers as sources, and what measures quantized ones in it."""
    model, x = Chain(), torch.randn(40, 64, generator=seeded(9))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    exact = model(x)

    def error(layers, rough=False):
        with answering_as(model, layers):
            return relative(model(x), exact)

    def loaded(name):
        layer = model.get_submodule(name)
        return LayerSource(name, lambda: (layer.weight, layer.bias), layer.weight.nbytes + layer.bias.nbytes)

    return model, [loaded(name) for name in names], error


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_layers_answer_as_the_kernel_does():
    model, layers, _ = chain()
    x = torch.randn(2, 3, 64, generator=seeded(1))
    exact, found = model(x), quantize_layers(layers, NEAREST, {})
    lossy = copy.deepcopy(model)
    for name, layer in found.items():
        lossy.get_submodule(name).weight.copy_(dequantize(layer.tensors))
    with answering_as(model, found):
        answered = model(x)
    assert relative(answered, lossy(x)) < 0.02 < relative(answered, exact)  # activations in 8 bits
    assert torch.equal(model(x), exact)


def test_shares_add_up_to_the_models_error():
    """Also of groups; the last layer counts for more than one within a residual block."""
    _, layers, error = chain()
    found = quantize_layers(layers, NEAREST, {})
    for most in (64, 3):
        shares = sensitivities(found, error, most)
        assert shares["last"] > 5 * shares["blocks.0"]
        expected = sum(shares[name] * layer.error**2 for name, layer in found.items()) ** 0.5
        assert expected == pytest.approx(error(found), rel=0.15)
    assert grouped(list(found)) == [[name] for name in found]
    names = [f"blocks.{i}.{part}" for i in range(6) for part in ("attn", "mlp")]
    assert grouped(names, 4) == [
        [f"blocks.{i}.{part}" for i in half] for part in ("attn", "mlp") for half in (range(3), range(3, 6))
    ]


@pytest.mark.parametrize("limit", [0.2, 0.05, 0.02, 0.01])
def test_as_small_as_possible_within_an_error(limit):
    _, layers, error = chain()
    found = quantize_layers(layers, NEAREST, {}, Budget(max_model_error=limit), model_error=error)
    quantized = {name: layer for name, layer in found.items() if layer is not None}
    assert error(quantized) <= limit
    if limit > error(quantize_layers(layers, NEAREST, {})):
        assert set(formats(found).values()) == {"W4A8"}
    for single in ("W4A8", "W6A8", "W8A8"):
        alone = quantize_layers(layers, NativeConfig(single, "nearest"), {})
        assert error(alone) > limit or size(alone, layers) >= size(found, layers)


def test_bytes_are_spent_on_what_the_model_loses_by():
    _, layers, error = chain()
    least = size(quantize_layers(layers, NEAREST, {}), layers)
    blind, measured = (
        quantize_layers(layers, NEAREST, {}, Budget(max_bytes=int(1.25 * least)), model_error=known)
        for known in (None, error)
    )
    assert max(size(found, layers) for found in (blind, measured)) <= int(1.25 * least)
    assert error({n: layer for n, layer in measured.items() if layer}) < 0.8 * error(
        {n: layer for n, layer in blind.items() if layer}
    )


def test_limits_that_cannot_be_met():
    _, layers, error = chain()
    with pytest.raises(ValueError, match="^max_model_error is measured on held-out calls"):
        quantize_layers(layers, NEAREST, {}, Budget(max_model_error=0.1))
    least = size(quantize_layers(layers, NEAREST, {}), layers)
    with pytest.raises(ValueError, match=r"^Within 0\.0 MiB the model's error is 0\.\d+, 0\.001 are allowed"):
        quantize_layers(layers, NEAREST, {}, Budget(None, int(1.1 * least), 0.001), model_error=error)


def test_a_budget_is_known_by_its_repr():
    """Saved compensations note it: a limit that is not set must not make them those of another quantization."""
    assert repr(Budget(0.1, 5)) == "Budget(max_error=0.1, max_bytes=5)"


def test_error_limits_come_before_sizes():
    layers = several()
    limited = quantize_layers(layers, NEAREST, {}, Budget(max_error=0.05))
    assert set(formats(limited).values()) == {"W6A8"}
    limit = size(limited, layers)
    assert formats(quantize_layers(layers, NEAREST, {}, Budget(0.05, limit))) == formats(limited)
    with pytest.raises(ValueError, match="with errors up to 0.05 the layers take"):
        quantize_layers(layers, NEAREST, {}, Budget(0.05, limit - 1))


def test_weights_are_loaded_twice_only_for_finer_formats():
    loads = []

    def counted(layer):
        return LayerSource(layer.name, lambda: loads.append(layer.name) or layer.load(), layer.bytes)

    layers = several()
    least = size(quantize_layers(layers, NEAREST, {}), layers)
    found = quantize_layers([counted(layer) for layer in layers], NEAREST, {}, Budget(max_bytes=int(1.4 * least)))
    finer = [name for name, format in formats(found).items() if format != "W4A8"]
    assert finer and sorted(loads) == sorted([layer.name for layer in layers] + finer)
    assert checkpoint.stored_bytes(found["l0"]) == sum(t.nbytes for t in found["l0"].tensors.values())
