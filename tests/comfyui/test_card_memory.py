"""Calibrating and quantizing models of 12 and 20 billion parameters on a card of 12 GiB, by their layers."""

from __future__ import annotations

from itertools import product

import pytest

CARD = 12 * 2**30
MODELS = ("Flux.1", "Qwen-Image")
SIDES, PRESETS = (128, 256), ("quick", "standard", "thorough")


@pytest.fixture
def found(run, checkout):
    if checkout.version < (0, 27):
        pytest.skip(f"ComfyUI {checkout.name} has no integer format")
    return run("card_memory")


def test_rounding_the_largest_layer_fits(found):
    """`working_bytes` is held to what is measured in tests/device; ComfyUI unloads models until that much is free."""
    for name in MODELS:
        assert found[name]["rounding"] + found["freed"]["reserve"] < CARD < found[name]["weights"]
    assert found["freed"]["asked"] >= found["freed"]["needed"]


def test_statistics_fit_beside_a_loaded_model(found):
    """Flux.1 in W4A8 at 1024 x 1024: nothing of it has to be unloaded for what moves to the card."""
    loaded, taken = found["loaded"], found["Flux.1"]["128, thorough"]
    beside = sum(taken[part] for part in ("activations", "inputs", "parts", "reserve"))
    assert 0 < loaded["room"] < CARD - loaded["weights"] - beside
    assert loaded["least"] == 0


def test_calibrating_fits(found, subtests):
    """All that is there beside the weights, of which ComfyUI loads what there is room for."""
    for name, side, preset in product(MODELS, SIDES, PRESETS):
        with subtests.test(f"{name}, {side}, {preset}"):
            taken = dict(found[name][f"{side}, {preset}"])
            assert taken.pop("images") >= 1
            assert sum(taken.values()) < CARD
