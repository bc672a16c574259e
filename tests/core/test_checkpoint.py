import weakref
from itertools import product

import pytest
import torch

from qandc_core.calibration.statistics import LayerStatistics
from qandc_core.quantization import budget as checkpoint
from qandc_core.quantization.budget import Budget, LayerSource, Step, quantize_layers, upgrades
from qandc_core.quantization.native import NativeConfig, quantize_weight

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
    layers = [source("a", seed=1), source("b", power=5, seed=2), source("c", 6, 64)]
    plain = quantize_layers(layers, NEAREST, {})
    four = {name: plain[name].error for name in "ab"}
    eight = {name: quantize_layers(layers, NativeConfig("W8A8", "nearest"), {})[name].error for name in "ab"}
    assert max(eight.values()) < min(four.values()) and abs(four["a"] - four["b"]) > 1e-4
    limits = {
        1.0: "W4A8 W4A8 float",
        (four["a"] + four["b"]) / 2: "W4A8 W8A8 float" if four["a"] < four["b"] else "W8A8 W4A8 float",
        (max(eight.values()) + min(four.values())) / 2: "W8A8 W8A8 float",
        min(eight.values()) / 2: "float float float",
    }
    for limit, expected in limits.items():
        found = quantize_layers(layers, NEAREST, {}, Budget(max_error=limit))
        assert list(formats(found).values()) == expected.split()
        assert all(layer is None or layer.error <= limit for layer in found.values())


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


def test_layers_with_large_errors_come_first():
    def steps(error, width=100):
        return [Step("W4A8", error, width), Step("W8A8", error / 8, 2 * width), Step("float", 0.0, 4 * width)]

    ladders = {"a": steps(0.05), "b": steps(0.2), "c": steps(0.1), "wide": steps(0.1, 1000), "float": steps(0)[2:]}
    taken = 4 * 100 + 1000 + 300 - 100  # the float layer's 400 count once

    def chosen(extra):
        return upgrades(ladders, "W4A8", Budget(max_bytes=taken + 100 + extra))

    assert chosen(0) == {}
    assert chosen(100) == {"b": "W8A8"}
    assert chosen(200) == {"b": "W8A8", "c": "W8A8"}
    assert chosen(300) == {"b": "W8A8", "c": "W8A8", "a": "W8A8"}
    assert chosen(500) == {"b": "float", "c": "W8A8", "a": "W8A8"}
    assert chosen(10**6) == dict.fromkeys(("a", "b", "c", "wide"), "float")


def test_error_removed_is_weighed_against_the_bytes_that_it_takes():
    """The wide layer loses more, and for its ten times as many bytes less: both do not fit."""
    ladders = {
        "narrow": [Step("W4A8", 0.1, 100), Step("W8A8", 0.0, 200)],
        "a wide one": [Step("W4A8", 0.2, 1000), Step("W8A8", 0.0, 2000)],
    }
    assert upgrades(ladders, "W4A8", Budget(max_bytes=1100 + 1000)) == {"narrow": "W8A8"}
    assert upgrades(ladders, "W4A8", Budget(max_bytes=1100 + 1100)) == dict.fromkeys(ladders, "W8A8")


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_close_to_the_best_of_all_choices(seed):
    generator = seeded(seed)
    ladders = {}
    for name in "abcdef":
        error, width = (float(v) for v in torch.rand(2, generator=generator) + 0.2)
        four, width = 0.1 * error, round(1000 * width)
        ladders[name] = [Step("W4A8", four, width), Step("W8A8", four / 8, 2 * width), Step("float", 0.0, 4 * width)]
    least = sum(steps[0].bytes for steps in ladders.values())
    for limit in (int(1.3 * least), 2 * least, 3 * least):
        picked = upgrades(ladders, "W4A8", Budget(max_bytes=limit))
        error = sum(
            next(step.error for step in steps if step.format == picked.get(name, "W4A8")) ** 2
            for name, steps in ladders.items()
        )
        best = min(
            sum(step.error**2 for step in steps)
            for steps in product(*ladders.values())
            if sum(step.bytes for step in steps) <= limit
        )
        whole = sum(steps[0].error ** 2 for steps in ladders.values())
        assert best <= error * (1 + 1e-9) and error - best < 0.2 * whole


def test_error_limits_come_before_sizes():
    layers = several()
    limited = quantize_layers(layers, NEAREST, {}, Budget(max_error=0.05))
    assert set(formats(limited).values()) == {"W8A8"}
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
    finer = [name for name, format in formats(found).items() if format == "W8A8"]
    assert finer and sorted(loads) == sorted([layer.name for layer in layers] + finer)
    assert checkpoint.stored_bytes(found["l0"]) == sum(t.nbytes for t in found["l0"].tensors.values())
