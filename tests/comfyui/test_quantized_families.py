"""Quantize on ComfyUI's own model classes, in files that stock ComfyUI loads.

Each test is one property; a subtest is a family and a format in which it has to hold.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from itertools import product

import pytest

from .checkouts import is_wanted_in_full
from .formats import SINCE, require, require_any
from .inside_programs import PROGRAMS

ERRORS = {"W8A8": 0.05, "W6A8": 0.15, "W4A8": 0.5}  # of samples from random networks
SMALLER = {"W8A8": 3.5, "W6A8": 4.0, "W4A8": 5.5}
CALIBRATED = ("Flux", "Lumina 2")
USED = ("Flux", "SD 3.5", "Wan 2.1", "Lumina 2")
IN_USE = [(family, format) for family in USED for format in SINCE]
COMPILED = ("Flux", "Wan 2.1")
# Layers whose shapes ComfyUI's detection reads: packed they would be those of another model.
SHAPE_READ = {"Wan 2.1", "LTXV"}


def families() -> list[str]:
    """The keys of STOCK, read from its source: importing it needs ComfyUI's folders on the path."""
    tree = ast.parse((PROGRAMS / "stock_models.py").read_text(encoding="utf-8"))
    (table,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "STOCK")
    return [key.value for key in table.keys]


def cases() -> list[tuple[str, str]]:
    """Family and key of what the programs found."""
    return [
        (family, key)
        for family, format in product(families(), SINCE)
        for key in ((format, f"{format}, calibrated") if family in CALIBRATED else (format,))
    ]


@pytest.fixture
def found(run, checkout) -> Callable[[str], Callable[[str, str], dict]]:
    """Runs a program, and gives a function of family and key: what the program found."""
    require_any(checkout)
    if not is_wanted_in_full(checkout):
        pytest.skip("long: on the newest version, or where QANDC_COMFYUI_VERSIONS names it")

    def results(program: str) -> Callable[[str, str], dict]:
        run("quantized_families" if program == "stock_load" else program)  # it saves what stock_load loads
        values = run(program)

        def on(family: str, key: str) -> dict:
            format = key.split(",")[0]
            require(checkout, format)
            value = values[f"{family}, {key}"] if program == "stock_load" else values[family][key]
            assert "failed" not in value, value["failed"]
            return value

        return on

    return results


def test_a_family_quantizes(found, subtests):
    on = found("quantized_families")
    for family, key in cases():
        with subtests.test(f"{family}, {key}"):
            result, format = on(family, key), key.split(",")[0]
            assert 1e-4 < result["error"] < ERRORS[format]
            assert result["source stays"] is True
            kept = {"W8A8": 1} if format != "W8A8" and family in SHAPE_READ else {}
            layers = dict(result["layers"])
            assert layers.pop(format) > 10 and layers == kept
            before, after = result["reported"]
            assert after < before / SMALLER[format]
            if key != format:
                mean, spread, calls = result["held out"]
                assert 0 < mean < ERRORS[format] and spread > 0 and calls == 2


def test_a_saved_file_holds_the_model(found, subtests):
    on = found("quantized_families")
    for family, key in cases():
        with subtests.test(f"{family}, {key}"):
            result = on(family, key)
            assert result["configured"] is True and result["loaded here"] <= 1e-3
            assert result["decoders differ"] == []
            assert result["saved again"] is True


def test_stock_comfyui_loads_a_saved_file(found, run, subtests):
    on, saved = found("stock_load"), run("quantized_families")
    assert run("stock_load")["packs"] == []
    for family, key in cases():
        with subtests.test(f"{family}, {key}"):
            result = on(family, key)
            assert result["configured"] is True
            assert result["direct"] <= 1e-3 and result["UNETLoader"] <= 1e-3
            assert result["quantized"] == sum(saved[family][key]["layers"].values())


def test_gptq_on_what_the_model_saw_is_closer(found, subtests):
    """Of a random network's samples; the steps that were calibrated are of other noise."""
    on = found("quantized_families")
    for family, format in product(CALIBRATED, SINCE):
        with subtests.test(f"{family}, {format}"):
            nearest, gptq = (on(family, key)["error"] for key in (format, f"{format}, calibrated"))
            assert gptq < nearest


@pytest.fixture
def used(found) -> Callable[[str], Callable[[str, str], tuple[dict, float]]]:
    """Takes a check of quantized_use, and gives a function of family and format: what the check found, and the error
    of the quantized model alone.
    """
    on = found("quantized_use")

    def results(check: str) -> Callable[[str, str], tuple[dict, float]]:
        def result(family: str, format: str) -> tuple[dict, float]:
            checks = on(family, format)
            assert "failed" not in checks[check], checks[check]["failed"]
            return checks[check], checks["error"]["error"]

        return result

    return results


def test_loras(used, subtests):
    """After quantizing, before it and in a saved file, within twice the error of quantizing alone."""
    loras = used("LoRA")
    for family, format in IN_USE:
        with subtests.test(f"{family}, {format}"):
            result, error = loras(family, format)
            assert result["effect"] > 0.1
            assert max(result[how] for how in ("after", "baked", "kept", "kept, saved")) < 2 * error
            assert result["after, removed"] is True and result["kept, removed"] is True
            assert result["not on the source"] is True and result["source stays"] is True
            assert result["baked patches"] == 0 and len(set(result["kept patches"])) == 1


def test_clones_and_unloading_change_nothing(used, subtests):
    unloading = used("unloading")
    for family, format in IN_USE:
        with subtests.test(f"{family}, {format}"):
            assert all(unloading(family, format)[0].values())


def test_offloaded_weights(used, subtests):
    low_vram = used("low VRAM")
    for family, format in IN_USE:
        with subtests.test(f"{family}, {format}"):
            result, error = low_vram(family, format)
            assert result["plain"]["offloaded"] < error and result["LoRA"]["offloaded"] < 2 * error
            assert min(result[kind]["layers offloaded"] for kind in ("plain", "LoRA")) > 0
            assert result["again"] is True


def test_core_can_build_a_second_copy(used, subtests):
    copies = used("second copy")
    for family, format in IN_USE:
        with subtests.test(f"{family}, {format}"):
            assert copies(family, format)[0] == {"same": True, "another": True}


def test_what_was_attached_stays_attached(used, subtests):
    """The bound is loose: shift and guidance are not those of the error it is compared to."""
    attachments = used("attachments")
    for family, format in IN_USE:
        with subtests.test(f"{family}, {format}"):
            result, error = attachments(family, format)
            assert result["effect"] > 0.1 and result["error"] < 3 * error
            given, kept = result["called"]
            assert given == kept > 0
            plain, shifted, quantized = result["shift"]
            assert plain != shifted == quantized
            assert result["option"] == {"held": 1} and result["attachment"] == "attached"
            assert result["input stays"] is True


def test_what_another_clone_has_is_not_taken_over(used, subtests):
    attachments = used("attachments")
    for family, format in IN_USE:
        with subtests.test(f"{family}, {format}"):
            assert attachments(family, format)[0]["another clone"] == 0


def test_a_cache_before_and_after_quantizing_is_the_same(used, subtests):
    cache = used("cache")
    for family, format in IN_USE:
        with subtests.test(f"{family}, {format}"):
            result, _ = cache(family, format)
            assert result["difference"] == 0 and result["effect"] > 1e-2


def test_skipped_layers_stay_float(used, subtests):
    skip = used("skip")
    for family, format in IN_USE:
        with subtests.test(f"{family}, {format}"):
            result, error = skip(family, format)
            assert result["float"] is True and result["skipped"] > 0
            assert 0 < result["error"] < 1.5 * error


def test_weights_of_other_precisions(used, subtests):
    """bfloat16 is what the file holds, so nothing is lost by it; layers that stay are not left in float8."""
    precisions = used("precisions")
    for family, format in IN_USE:
        with subtests.test(f"{family}, {format}"):
            result, error = precisions(family, format)
            for stored in result.values():
                assert stored["error"] < 1.5 * error and stored["loaded"] <= 1e-3
            assert "torch.float32" in result["torch.float8_e4m3fn"]["kinds"]


def test_a_compiled_model(used, subtests):
    """One graph as in full precision, but for a fused product of core's that writes to a log (Wan's W8A8). aot_eager
    multiplies some inputs with dequantized weights.
    """
    compiled = used("compile")
    for family, format in product(COMPILED, SINCE):
        with subtests.test(f"{family}, {format}"):
            result, error = compiled(family, format)
            assert result["quantized"] == result["compiled before"] == 0
            assert result["aot_eager"] < error
            graphs = result["graphs"]
            assert graphs["quantized"] == graphs["compiled before"] > 0
            if (family, format) != ("Wan 2.1", "W8A8"):
                assert graphs["quantized"] == graphs["full"] == 1
