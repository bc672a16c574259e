"""Quantize on models that are quantized already, and what a file says of its attention."""

from __future__ import annotations

import pytest

from .checkouts import is_wanted_in_full
from .formats import formats_of, require_any

BITS = {"float8_e4m3fn": 16, "mxfp8": 16, "nvfp4": 16, "int8_tensorwise": 8, "asym_w4a8_int8": 4}  # 16: any format


@pytest.fixture
def found(run, checkout):
    require_any(checkout)
    if not is_wanted_in_full(checkout):
        pytest.skip("long: on the newest version, or where QANDC_COMFYUI_VERSIONS names it")
    return run("quantized_sources")


def test_a_packed_source_is_quantized_on_or_refused(found, checkout, subtests):
    """From its decoded weights, with what it was said; a format that saves nothing is refused."""
    for source, bits in BITS.items():
        for format in formats_of(checkout):
            if source not in found["sources"]:
                continue
            with subtests.test(f"{source} to {format}"):
                lost, result = found["sources"][source]["lost"], found["sources"][source][format]
                if bits <= int(format[1]):
                    assert result.startswith("This model is quantized already: its layers are in W")
                    assert result.endswith("or wire the model of its original file of 16 bits.")
                    continue
                assert set(result["sources"]) == {"W8A8" if source == "int8_tensorwise" else source}
                assert "which errors are against: what those lost before comes on top" in result["summary"]
                assert result["source stays"] is True and result["saved"] <= 1e-3
                # What was lost before and what is lost now are independent.
                expected = (lost**2 + result["against the source"] ** 2) ** 0.5
                assert result["against the original"] == pytest.approx(expected, rel=0.35)


def test_a_gguf_model_is_refused_with_the_file_to_take(found):
    sentence = found["unreadable"]
    assert sentence.startswith("The weight of single_blocks.0.linear1 is a ") and "torch.uint8" in sentence
    assert sentence.endswith("load the model with Load Diffusion Model from a file of 16 bits.")


def test_attention_preferences_survive(found):
    for format, result in found["preferences"].items():
        assert result == {"rebuilt": True, "saved": True}, format
