"""What the node Quantize makes of its inputs, on real model classes."""

from __future__ import annotations

import re

import pytest

from .checkouts import is_wanted_in_full

OUTSIDE = (
    "label_emb", "emb_layers", "time_embed", "t_embedder", "distilled_guidance", "caption", "final_layer", "context_",
    "cap_embedder", "llm_adapter", "connector", "adaln_single", "proj_out.", "x_embedder", "head", "img_in", "txt_in",
)  # fmt: skip


@pytest.fixture
def found(run, checkout):
    def result(check: str):
        if checkout.version < (0, 27):
            pytest.skip(f"ComfyUI {checkout.name} has no integer format")
        if not is_wanted_in_full(checkout):
            pytest.skip("long: on the newest version, or where QANDC_COMFYUI_VERSIONS names it")
        return run("quantized_choices")[check]

    return result


def test_blocks_are_quantized_and_nothing_else(found):
    families = found("chosen")
    assert len(families) > 4
    for family, layers in families.items():
        assert layers["quantized"] and layers["stay"], family
        assert not [name for name in layers["quantized"] if any(part in name for part in OUTSIDE)], family
        assert not [name for name in layers["stay"] if "attn" in name and name.startswith(("blocks.", "layers."))]


def test_control_blocks_and_refiners_of_noise_are_blocks(found):
    families = found("chosen")
    assert any(name.startswith("vace_blocks") for name in families["Wan VACE"]["quantized"])
    assert any(name.startswith("noise_refiner") for name in families["Lumina 2"]["quantized"])


def test_patterns_that_match_nothing_are_named(found):
    result = found("patterns")
    plain = result["/"]
    assert "Warning" not in plain["text"] and "Warning" not in result["double_blocks.0/"]["text"]
    assert "'IMG_MOD'; close names: img_mod" in result["IMG_MOD, single/"]["text"]
    assert not [name for name in result["IMG_MOD, single/"]["names"] if "single" in name]
    more = result["/time_in,imgin"]
    assert set(more["names"]) - set(plain["names"]) == {"time_in.in_layer", "time_in.out_layer"}
    assert "include: no layer's name contains 'imgin'; close names: img_in" in more["text"]


def test_cancelling_stops_at_the_next_layer_and_leaves_the_source_as_it_was(found):
    result = found("cancelled")
    assert result["ended"] == "interrupted"
    assert result["done"] == 4 < result["layers"]
    assert result["same"]


def test_as_small_as_possible_within_the_models_error(found):
    result = found("model errors")
    if "W4A8" not in result:
        pytest.skip("no W4A8 here")
    for share in (0.6, 0.25):
        within = result[f"within {share}"]
        assert within["error"] <= 1.05 * within["limit"]  # simulated on the way, measured in the end
        assert result["W4A8"]["size"] < within["size"] and len(within["layers"]) > 1
        if result["W8A8"]["error"] <= within["limit"]:
            assert within["size"] < result["W8A8"]["size"]
    assert result["within 0.6"]["size"] < result["within 0.25"]["size"]
    assert result["blind"].startswith("max_model_error is measured on held-out calls of the model")


def test_a_file_is_named_after_model_format_and_date(found):
    prefix = found("model errors")["W8A8"]["prefix"]
    assert re.fullmatch(r"diffusion_models/Flux_W8A8_\d{4}-\d\d-\d\d", prefix), prefix


@pytest.mark.parametrize("format, kind", [("W8A8", "int8"), ("W4A8", "four bits")])
def test_limits_through_the_node(found, format, kind):
    """A limit that the model meets as it is quantizes everything; one that no layer can meet says so."""
    result = found("limits")
    if f"{format}, 0 MiB" not in result:
        pytest.skip("no W4A8 here")
    assert result[f"{format}, 0 MiB"] == result[f"{format}, 100000 MiB"] == {kind: 26}
    limited = result[f"{format}, 2 MiB"]
    assert 0 < limited["int8"] < 26 and limited.get("four bits", 0) < 26
    assert result[f"{format}, 0.02"] == {"int8": 26}
    assert result[f"{format}, 1e-06"].startswith("Nothing would be quantized")


def test_a_calibration_of_another_model_is_refused(found):
    assert "made for another model" in found("another calibration")


def test_a_model_far_from_full_precision_is_refused(found):
    said = found("far off")
    assert said["harmless"] == ""
    assert "away from full precision on held-out samples, the worst layer is" in said["blinded"]


def test_running_out_of_memory_is_said_as_such(found):
    assert found("memory") == {
        "OutOfMemoryError": "OutOfMemoryError", "MemoryError": "MemoryError", "TypeError": "ValueError"
    }  # fmt: skip


def test_nothing_of_comfy_kitchen_is_replaced(found):
    assert all(found("untouched").values())
