"""LoRAs, merges, hooks and saving of quantized models: how much arrives in the weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from .checkouts import is_wanted_in_full
from .formats import SINCE, require, require_any

MERGED = ("model1", "model2", "both")
# Layouts of layers with a LoRA, and with a change of the whole matrix.
HELD = {
    "W8A8": ("QandCInt8Layout", "torch.float32"),
    "W6A8": ("QandCTracedGroupedLayout", "torch.float32"),
    "W4A8": ("QandCTracedGroupedLayout", "TensorWiseINT8Layout"),
}
STORED = {("W6A8", "plain"): "asym_w4a8_int8", ("W4A8", "plain"): "asym_w4a8_int8"}  # elsewhere int8_tensorwise
SOURCES, SIZES = ("float", "float8", "scaled float8"), ("strong", "weak")


@pytest.fixture
def found(run, checkout) -> Callable[[str, str], dict]:
    """Gives what the program found: of a check and of a format."""
    require_any(checkout)
    if not is_wanted_in_full(checkout):
        pytest.skip("long: on the newest version, or where QANDC_COMFYUI_VERSIONS names it")
    values = run("quantized_lora")

    def result(check: str, format: str) -> dict:
        require(checkout, format)
        return values[check]

    return result


def test_a_lora_arrives_whole(found, subtests):
    """A LoRA of half a weight's size and of a hundredth, in quantized layers, in those left out, and in saved files."""
    for source, format, size in product(SOURCES, SINCE, SIZES):
        with subtests.test(f"{source}, {format}, {size}"):
            shares = found("arrives", format)
            for how in ("bake", "keep"):
                key = f"{source}, {format}, {size}, {how}: "
                measured = {name: share for name, share in shares.items() if name.startswith(key)}
                assert len(measured) == 3
                for name, share in measured.items():
                    assert 0.95 < share / shares[f"{source}, {format}, {size}: stock"] < 1.05, name


def test_a_merge_with_a_quantized_model(found, subtests):
    for format, side in product(SINCE, MERGED):
        with subtests.test(f"{format}, {side}"):
            assert 0.95 < found("merges", format)[f"{format}, {side}"] < 1.05


def test_lora_hooks(found, subtests):
    """The first time and from core's cache; without the hook the weights are what they were, bit for bit."""
    for format, size, turn in product(SINCE, SIZES, ("first", "cached")):
        with subtests.test(f"{format}, {size}, {turn}"):
            result = found("hooks", format)
            assert 0.95 < result[f"{format}, {size}, {turn}"] < 1.05
            assert result[f"{format}, {size}, {turn}, restored"] is True


def test_a_kept_lora_however_the_model_is_loaded(found, subtests):
    for format, size in product(SINCE, (*SIZES, "whole matrix")):
        with subtests.test(f"{format}, {size}"):
            result = found("kept", format)[f"{format}, {size}"]
            for way in ("whole", "low VRAM", "in part", "unloaded", "dynamic"):
                assert 0.95 < result[way] < 1.05, way
            assert result["base"] is True and result["restored"] is True
            assert result["layouts"] == [HELD[format][size == "whole matrix"]]
            assert len(result["layouts in part"]) == (2 if size == "whole matrix" else 1)


def test_the_size_of_a_model_with_a_kept_lora(found, subtests):
    for format, size in product(SINCE, ("strong", "whole matrix")):
        with subtests.test(f"{format}, {size}"):
            result = found("kept", format)[f"{format}, {size}"]
            before, expected, counted, taken = result["bytes"]
            assert before < expected == counted == taken
            for state in ("bytes in part", "bytes unloaded"):
                counted, taken = result[state]
                assert counted == taken, state


def test_samples_of_a_model_with_a_kept_lora(found, subtests):
    """About as far from full precision with the LoRA as without, and the same where torch.compile is at work."""
    for format, size in product(SINCE, SIZES):
        with subtests.test(f"{format}, {size}"):
            result = found("kept", format)[f"{format}, {size}"]
            assert result["samples"] < 2.5 * result["samples, without"]
            for backend, bound in (("graphs", 1e-5), ("aot_eager", 0.02)) if size == "weak" else ():
                assert result[backend] < bound and result[f"{backend}, without"] < bound


def test_a_model_whose_weights_are_cast_at_every_call_is_saved(found, subtests):
    """As with dynamic or low VRAM: the same file as of the model that is loaded whole."""
    for format, kind in product(SINCE, ("plain", "LoRA")):
        with subtests.test(f"{format}, {kind}"):
            result = found("saving", format)[f"{format}, {kind}"]
            assert result["same"] is True and result["offloaded"] is True
            assert result["formats"] == [STORED.get((format, kind), "int8_tensorwise")]
