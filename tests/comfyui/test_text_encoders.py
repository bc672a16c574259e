"""Quantize Text Encoder and Save Text Encoder on tiny encoders of ComfyUI's own classes."""

from __future__ import annotations

import re

import pytest

from .checkouts import is_wanted_in_full

FAMILIES = ("Flux", "Wan", "Qwen-Image", "Z-Image", "HunyuanVideo", "Lumina 2")
WORST = {"W8A8": 0.06, "W6A8": 0.2, "W4A8": 0.5}  # of random weights; 24 layers of T5 add up
STORED = {"W8A8": "int8_tensorwise", "W6A8": "asym_w4a8_int8", "W4A8": "asym_w4a8_int8"}


@pytest.fixture
def found(run, checkout):
    def result(check: str):
        if checkout.version < (0, 27):
            pytest.skip(f"ComfyUI {checkout.name} has no integer format")
        if not is_wanted_in_full(checkout):
            pytest.skip("long: on the newest version, or where QANDC_COMFYUI_VERSIONS names it")
        return run("text_encoders")[check]

    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_encoder_is_loaded_by_comfyui_and_encodes_the_same(found, family):
    result = found("families")[family]
    assert result["source as it was"]
    for format, one in result["formats"].items():
        assert one["same after loading"] and one["same twice"], format
        assert one["stored"] == [STORED[format]] and len(one["files"]) == 1
        before, after = one["sizes"]
        assert after < before
        assert re.fullmatch(rf"clip/\w+_{format}_\d{{4}}-\d\d-\d\d", one["prefix"])


@pytest.mark.parametrize("family", FAMILIES)
def test_calibrated_on_prompts_it_is_nearer_to_full_precision_on_others(found, family):
    for format, one in found("families")[family]["formats"].items():
        assert 0 < one["errors"]["gptq"] < min(one["errors"]["nearest"], WORST[format]), (format, one["errors"])


def test_the_report_says_sizes_errors_and_what_stays(found):
    text = found("families")["Flux"]["formats"]["W8A8"]["text"]
    assert re.search(
        r"168 layers W8A8; [\d.]+ -> [\d.]+ MiB; error of the whole text encoder [\d.e-]+ \+- [\d.e-]+", text
    )
    assert "on 4 held-out prompts" in text and "worst layer t5xxl.encoder.block." in text
    assert re.search(r"not quantized: clip_l \d+ MiB", text) and "calibrated on 12 prompts" in text


@pytest.mark.parametrize("source", ["torch.float16", "torch.bfloat16", "torch.float8_e4m3fn", "scaled"])
def test_files_of_16_and_8_bits(found, source):
    result = found("half precision")[source]
    assert result["same after loading"] and 0 < result["error"] < 0.05
    assert ("28 float8_e4m3fn" in result["text"]) == (source in ("torch.float8_e4m3fn", "scaled"))


def test_loras_before_and_after(found):
    result = found("loras")
    assert result["effect"] > 0.1 and result["baked"] < 0.1 * result["effect"]
    assert result["pooled"] and result["same llama after loading"] and result["source as it was"] and not result["left"]
    for format in WORST:
        if format in result:
            one = result[format]
            assert one["gone"] and one["with"] < 2 * max(one["without"], 0.01) and one["saved"] < 0.1


def test_choices_and_refusals(found):
    result = found("choices")
    assert result["all"][0] == 28 and result["skip"][0] == 21
    assert "skip: no layer's name contains 'nonsense'" in result["skip"][1]
    assert result["limit"][0] == 28 and re.search(r"\d+ (layers )?W[68]A8", result["limit"][1].split(";")[0])
    assert result["skip all"].startswith("This CLIP has no linear layer left to quantize with skip = llama")
    assert result["none"].startswith("Nothing would be quantized")
    assert result["clip_l"].startswith("ComfyUI's loaders do not support a quantized clip_l")
    assert result["again"].startswith("llama is quantized already")
    assert result["save"].startswith("No encoder of this CLIP is quantized")
    assert [name.split("_0")[0] for name in result["save all"]] == ["both_clip_l", "both_llama"]


def test_names_that_the_loader_shortens_are_written_in_full(found):
    result = found("names")
    assert result["Qwen 3.5"] == [
        "lm_head.weight", "model.language_model.layers.0.input_layernorm.weight",
        "model.language_model.layers.0.linear_attn.A_log", "model.visual.blocks.0.norm1.weight",
    ]  # fmt: skip
    assert result["taken for"] == "QWEN35_4B"
    assert result["Qwen 3"] == ["model.layers.0.self_attn.q_norm.weight", "model.norm.weight"]


def test_cancelling_leaves_the_clip_as_it_was(found):
    for one in found("cancelled").values():
        assert one == {"ended": "interrupted", "same": True, "hooks": 0}


def test_a_model_samples_with_it(found):
    result = found("sampled")
    assert result.pop("full") == 0
    assert all(0 < error < 1 for error in result.values()) and result["W8A8"] < 0.1
