"""LoRAs, merges, hooks and saving of quantized models: how much arrives in the weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from .checkouts import is_wanted_in_full

SINCE = {"W8A8": (0, 27), "W4A8": (0, 31)}
MERGED = ("model1", "model2", "both")
SOURCES, SIZES = ("float", "float8", "scaled float8"), ("strong", "weak")


@pytest.fixture
def found(run, checkout) -> Callable[[str, str], dict]:
    """Gives what the program found: of a check and of a format."""
    if checkout.version < min(SINCE.values()):
        pytest.skip(f"ComfyUI {checkout.name} has none of {', '.join(SINCE)}")
    if not is_wanted_in_full(checkout):
        pytest.skip("long: on the newest version, or where QANDC_COMFYUI_VERSIONS names it")
    values = run("quantized_lora")

    def result(check: str, format: str) -> dict:
        if checkout.version < SINCE[format]:
            pytest.skip(f"ComfyUI {checkout.name} has no {format}")
        return values[check]

    return result


def test_a_lora_arrives_whole(found, subtests):
    """A LoRA of half a weight's size and of a hundredth, in quantized layers, in those left out, and in saved files.

    A weak one kept as a patch on W4A8 is added by ComfyUI at every load and rounded to 4 bits again.
    """
    for source, format, size in product(SOURCES, SINCE, SIZES):
        with subtests.test(f"{source}, {format}, {size}"):
            shares = found("arrives", format)
            stock = shares[f"{source}, {format}, {size}: stock"]
            for how in ("bake", "keep"):
                key = f"{source}, {format}, {size}, {how}: "
                least = 0.85 if (format, size, how) == ("W4A8", "weak", "keep") else 0.95
                measured = {name: share for name, share in shares.items() if name.startswith(key)}
                assert len(measured) == (3 if size == "weak" else 2)
                for name, share in measured.items():
                    assert (0.95 if "left out" in name else least) < share / stock < 1.05, name


def test_a_merge_with_a_quantized_model(found, subtests):
    for format, side in product(SINCE, MERGED):
        with subtests.test(f"{format}, {side}"):
            assert 0.95 < found("merges", format)[f"{format}, {side}"] < 1.05


def test_lora_hooks(found, subtests):
    """The first time and from core's cache; without the hook the weights are what they were, bit for bit."""
    for format in SINCE:
        with subtests.test(format):
            result = found("hooks", format)
            assert 0.95 < result[f"{format}, first"] < 1.05 and 0.95 < result[f"{format}, cached"] < 1.05
            assert result[f"{format}, first, restored"] is True and result[f"{format}, cached, restored"] is True


def test_a_model_whose_weights_are_cast_at_every_call_is_saved(found, subtests):
    """As with dynamic or low VRAM: the same file as of the model that is loaded whole."""
    for format, kind in product(SINCE, ("plain", "LoRA")):
        with subtests.test(f"{format}, {kind}"):
            assert found("saving", format)[f"{format}, {kind}"] == {"same": True, "offloaded": True}
