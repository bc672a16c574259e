"""All formats side by side, in a ComfyUI with a comfy-kitchen that has them."""

from __future__ import annotations

import shutil

import pytest

from tests.kitchens import unpacked

from .checkouts import Checkout, is_wanted_in_full
from .inside_programs import install_pack, run_program

KITCHEN = "0.2.40"
FORMATS = ("W8A8", "W6A8", "W4A8")


@pytest.fixture(scope="module")
def found(checkout: Checkout, tmp_path_factory):
    """What the program found, and what stock ComfyUI without packs makes of the files that it saved."""
    if checkout.version < (0, 31):
        pytest.skip(f"ComfyUI {checkout.name} does not load asym_w4a8_int8")
    if not is_wanted_in_full(checkout):
        pytest.skip("long: on the newest version, or where QANDC_COMFYUI_VERSIONS names it")
    kitchen = unpacked(KITCHEN, tmp_path_factory.mktemp("kitchen"))
    base = tmp_path_factory.mktemp("inside")
    install_pack(base)
    yield {
        **run_program(checkout, "all_formats", base, kitchen)["found"],
        "stock": run_program(checkout, "stock_load", base, kitchen),
    }
    shutil.rmtree(base, ignore_errors=True)


def test_the_running_comfy_kitchen_has_all_formats(found):
    assert KITCHEN in found["kitchen"] and tuple(found["available"]) == FORMATS


def test_six_bits_lie_between_four_and_eight(found):
    sizes = [found[format]["size"][1] for format in FORMATS]
    errors = [found[format]["error"] for format in FORMATS]
    assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)
    assert found["W6A8"]["layers"]["W6A8"] > 10


@pytest.mark.parametrize("format", FORMATS)
def test_files_are_read_by_stock_comfyui(found, format):
    result, stock = found[format], found["stock"][f"Flux, {format}"]
    assert result["stored"] == ["int8_tensorwise" if format == "W8A8" else "asym_w4a8_int8"]
    assert result["loaded"] <= 1e-3 and result["decoders differ"] == []
    assert found["stock"]["packs"] == [] and stock["direct"] <= 1e-3 and stock["UNETLoader"] <= 1e-3
    assert stock["quantized"] == sum(result["layers"].values())


@pytest.mark.parametrize("size", ["strong", "weak"])
@pytest.mark.parametrize("format", FORMATS)
def test_loras_on_top(found, format, size):
    result = found[format]["LoRAs"][size]
    assert 0.95 < result["share"] < 1.05 and result["restored"] is True
    # Beside the layers, as by core's bypass loader, nothing is rounded again; in a file the sum is.
    least = max(result["baked"], found[format]["error"])
    assert max(result[way] for way in ("kept", "whole matrix", "bypass")) < 1.2 * least and result["saved"] < 2 * least


@pytest.mark.parametrize("format", FORMATS)
def test_compiled(found, format):
    assert found[format]["compiled"] < 0.02
