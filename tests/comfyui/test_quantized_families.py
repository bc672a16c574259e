"""Quantize on ComfyUI's own model classes, in files that stock ComfyUI loads."""

from __future__ import annotations

import ast

import pytest

from .checkouts import is_wanted_in_full
from .inside_programs import PROGRAMS

SINCE = {"W8A8": (0, 27), "W4A8": (0, 31)}
ERRORS = {"W8A8": 0.05, "W4A8": 0.5}  # of samples from random networks
STORED = {"W8A8": "int8_tensorwise", "W4A8": "asym_w4a8_int8"}
CALIBRATED = ("Flux", "Lumina 2")
USED = ("Flux", "SD 3.5", "Wan 2.1", "Lumina 2")
COMPILED = ("Flux", "Wan 2.1")
# Layers whose shapes ComfyUI's detection reads: packed they would be those of another model.
SHAPE_READ = {"Wan 2.1", "LTXV"}


def families() -> list[str]:
    """The keys of STOCK, read from its source: importing it needs ComfyUI's folders on the path."""
    tree = ast.parse((PROGRAMS / "stock_models.py").read_text(encoding="utf-8"))
    (table,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "STOCK")
    return [key.value for key in table.keys]


def cases() -> list:
    """Family and key of what the programs found."""
    return [
        pytest.param(family, key, id=f"{family}-{key}")
        for family in families()
        for format in SINCE
        for key in ((format, f"{format}, calibrated") if family in CALIBRATED else (format,))
    ]


@pytest.fixture
def formats(checkout) -> set[str]:
    return {format for format, since in SINCE.items() if checkout.version >= since}


@pytest.fixture
def found(run, checkout, formats):
    """Gives what a program found on a family in a format."""

    def result(program: str, family: str, key: str) -> dict:
        if key.split(",")[0] not in formats:
            pytest.skip(f"ComfyUI {checkout.name} has no {key.split(',')[0]}")
        if not is_wanted_in_full(checkout):
            pytest.skip("long: on the newest version, or where QANDC_COMFYUI_VERSIONS names it")
        run("quantized_families" if program == "stock_load" else program)  # it saves what stock_load loads
        values = run(program)
        value = values[f"{family}, {key}"] if program == "stock_load" else values[family][key]
        assert "failed" not in value, value["failed"]
        return value

    return result


@pytest.mark.parametrize("family, key", cases())
def test_a_family_quantizes(found, family, key):
    result, format = found("quantized_families", family, key), key.split(",")[0]
    assert 1e-4 < result["error"] < ERRORS[format]
    assert result["source stays"] is True
    kept = {"int8_tensorwise": 1} if format == "W4A8" and family in SHAPE_READ else {}
    layers = dict(result["layers"])
    assert layers.pop(STORED[format]) > 10 and layers == kept
    before, after = result["reported"]
    assert after < before / (3.5 if format == "W8A8" else 5.5)
    if key != format:
        mean, spread, calls = result["held out"]
        assert 0 < mean < ERRORS[format] and spread > 0 and calls == 2


@pytest.mark.parametrize("family, key", cases())
def test_a_saved_file_holds_the_model(found, family, key):
    result = found("quantized_families", family, key)
    assert result["configured"] is True and result["loaded here"] <= 1e-3
    assert result["decoders differ"] == []
    assert result["saved again"] is True


@pytest.mark.parametrize("family, key", cases())
def test_stock_comfyui_loads_a_saved_file(found, run, family, key):
    result = found("stock_load", family, key)
    assert result["configured"] is True
    assert result["direct"] <= 1e-3 and result["UNETLoader"] <= 1e-3
    assert result["quantized"] == sum(run("quantized_families")[family][key]["layers"].values())
    assert run("stock_load")["packs"] == []


@pytest.mark.parametrize("format", SINCE)
@pytest.mark.parametrize("family", CALIBRATED)
def test_gptq_on_what_the_model_saw_is_closer(found, family, format):
    """Of a random network's samples; the steps that were calibrated are of other noise."""
    nearest, gptq = (found("quantized_families", family, key)["error"] for key in (format, f"{format}, calibrated"))
    assert gptq < nearest


@pytest.fixture
def used(found, family, format):
    """What a check of quantized_use found, and the error of the quantized model alone."""

    def result(check: str) -> tuple[dict, float]:
        checks = found("quantized_use", family, format)
        assert "failed" not in checks[check], checks[check]["failed"]
        return checks[check], checks["error"]["error"]

    return result


in_use = pytest.mark.parametrize("family, format", [(family, format) for family in USED for format in SINCE])


@in_use
def test_loras(used):
    """On top of quantized weights and before quantizing, within twice the error of quantizing alone."""
    result, error = used("LoRA")
    assert result["effect"] > 0.1
    assert max(result["after"], result["baked"], result["kept"]) < 2 * error
    assert result["after, removed"] is True and result["kept, removed"] is True
    assert result["not on the source"] is True and result["source stays"] is True
    assert result["baked patches"] == 0 and len(set(result["kept patches"])) == 1
    assert result["kept, saved"] <= 1e-3


@in_use
def test_clones_and_unloading_change_nothing(used):
    assert all(used("unloading")[0].values())


@in_use
def test_offloaded_weights(used):
    result, error = used("low VRAM")
    assert result["plain"]["offloaded"] < error and result["LoRA"]["offloaded"] < 2 * error
    assert min(result[kind]["layers offloaded"] for kind in ("plain", "LoRA")) > 0
    assert result["again"] is True


@in_use
def test_core_can_build_a_second_copy(used):
    assert used("second copy")[0] == {"same": True, "another": True}


@in_use
def test_what_was_attached_stays_attached(used):
    """The bound is loose: shift and guidance are not those of the error it is compared to."""
    result, error = used("attachments")
    assert result["effect"] > 0.1 and result["error"] < 3 * error
    given, kept = result["called"]
    assert given == kept > 0
    plain, shifted, quantized = result["shift"]
    assert plain != shifted == quantized
    assert result["option"] == {"held": 1} and result["attachment"] == "attached"
    assert result["input stays"] is True


@in_use
def test_what_another_clone_has_is_not_taken_over(used):
    assert used("attachments")[0]["another clone"] == 0


@in_use
def test_a_cache_before_and_after_quantizing_is_the_same(used):
    result, _ = used("cache")
    assert result["difference"] == 0 and result["effect"] > 1e-2


@in_use
def test_skipped_layers_stay_float(used):
    result, error = used("skip")
    assert result["float"] is True and result["skipped"] > 0
    assert 0 < result["error"] < 1.5 * error


@in_use
def test_weights_of_other_precisions(used):
    """bfloat16 is what the file holds, so nothing is lost by it; layers that stay are not left in float8."""
    result, error = used("precisions")
    for found in result.values():
        assert found["error"] < 1.5 * error and found["loaded"] <= 1e-3
    assert "torch.float32" in result["torch.float8_e4m3fn"]["kinds"]


@pytest.mark.parametrize("family, format", [(family, format) for family in COMPILED for format in SINCE])
def test_a_compiled_model(used, family, format):
    """One graph as in full precision, but for a fused product of core's that writes to a log (Wan's W8A8). aot_eager
    multiplies some inputs with dequantized weights.
    """
    result, error = used("compile")
    assert result["quantized"] == result["compiled before"] == 0
    assert result["aot_eager"] < error
    graphs = result["graphs"]
    assert graphs["quantized"] == graphs["compiled before"] > 0
    if (family, format) != ("Wan 2.1", "W8A8"):
        assert graphs["quantized"] == graphs["full"] == 1
