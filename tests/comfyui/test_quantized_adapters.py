"""Adapters put on quantized models by core's loaders: as exact as baking them in, and nothing is rounded again."""

from __future__ import annotations

from itertools import product
from statistics import mean

import pytest

from .checkouts import is_wanted_in_full
from .formats import formats_of, require_any

BESIDE = ("LoRA", "LoHa", "LoKr", "full LoKr")
DENSE = ("DoRA", "diff", "GLoRA")


@pytest.fixture
def found(run, checkout) -> dict:
    require_any(checkout)
    if not is_wanted_in_full(checkout):
        pytest.skip("long: on the newest version, or where QANDC_COMFYUI_VERSIONS names it")
    return run("quantized_adapters")


@pytest.fixture
def formats(checkout) -> list[str]:
    return formats_of(checkout)


def test_an_adapter_after_quantize_is_as_exact_as_before_it(found, formats, subtests):
    """At most 1.1 times the error of baking it in: of layers' answers, and of samples over five networks and LoRAs."""
    for format, kind in product(formats, (*BESIDE, *DENSE)):
        with subtests.test(f"{format}, {kind}"):
            rows = found["errors"][f"{format}, {kind}"]
            assert all(row["kept"] < 1.1 * row["baked"] for row in rows)
            assert all(row["beside"] == (row["layers"] if kind in BESIDE else 0) for row in rows)
    for format in formats:
        with subtests.test(f"{format}, samples"):
            rows = found["errors"][f"{format}, LoRA"]
            assert mean(row["kept, samples"] for row in rows) < 1.1 * mean(row["baked, samples"] for row in rows)


def test_an_adapter_has_its_whole_effect(found, formats, subtests):
    """In every layer, at full and at negative strength, and of two at once."""
    for format in formats:
        names = [f"{format}, {kind}, {strength}" for kind in (*BESIDE, *DENSE) for strength in (1.0, -0.7)]
        for name in (*names, f"{format}, two"):
            with subtests.test(name):
                assert 0.95 < found["effects"][name]["least"] <= found["effects"][name]["most"] < 1.05


def test_another_strength_quantizes_nothing(found, formats, subtests):
    for format in formats:
        with subtests.test(format):
            result = found["strengths"][format]
            assert result["rounded"] == [] and result["same place"] is True
            assert max(result["errors"]) < 1.5 * result["error without"]


def test_without_the_adapter_everything_is_as_it_was(found, formats, subtests):
    for format in formats:
        with subtests.test(format):
            result = found["strengths"][format]
            assert result["again"] is result["after"] is result["restored"] is True and result["left"] == 0
            assert "QandCInt8Layout" not in result["layouts"]


def test_adapters_of_parts_of_a_weight(found, formats, subtests):
    """Query, key and value of a diffusers file are rows of one weight, and half of another's columns."""
    for format in formats:
        with subtests.test(format):
            result = found["parts"][format]
            assert 0.95 < result["least"] <= result["most"] < 1.05 and result["beside"] >= 2


def test_a_layer_that_is_handed_over_with_its_activation(found, formats, subtests):
    """Wan multiplies int8 weights outside the layer, where a LoRA beside it or by the bypass loader is not seen."""
    for format in formats:
        for way in ("kept", "bypass"):
            with subtests.test(f"{format}, {way}"):
                assert 0.8 < found["fused activations"][f"{format}, {way}"] < 1.2
        with subtests.test(f"{format}, after"):
            assert found["fused activations"][f"{format}, after"] == 0.0


def test_hooks_on_top_of_adapters(found, formats, subtests):
    for format in formats:
        for pair in ("LoHa on LoRA", "diff on LoRA", "LoRA on diff", "diff on diff"):
            with subtests.test(f"{format}, {pair}"):
                result = found["hooked"][f"{format}, {pair}"]
                for turn in ("first", "cached"):
                    assert 0.95 < result[turn] < 1.05
                    assert result[f"{turn}, restored"] is True
