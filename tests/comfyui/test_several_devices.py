"""Core's multi-GPU sampling, its threads and clones, with the pack's wrappers on the model."""

from __future__ import annotations

import pytest

ORDERS = ("attached first", "devices first")


@pytest.fixture
def found(run):
    results = run("several_devices")
    if results["plain"] is None:
        pytest.skip("this version samples on one device")
    return results


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", ["plain", "cache of whole prediction", "cache of blocks", "recorder"])
def test_two_devices_sample_what_one_does(found, case, order):
    """Both networks evaluate, in threads, at once; the image is that of one device up to rounding, run after run."""
    case = found[case][order]
    assert case["same"] and case["again"]
    assert case["networks"] == 2 and case["at once"] == 2 and case["threads"] == 4  # two for each run


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", ["cache of whole prediction", "cache of blocks"])
def test_a_cache_computes_and_reuses_the_same_steps_on_two_devices(found, case, order):
    assert found[case][order]["timeline"] == found[case]["alone"]["timeline"]
    assert found[case][order]["warnings"] == found[case]["alone"]["warnings"]


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_recorded_on_two_devices_adds_up(found, order):
    """Two runs, as many samples as on one device for each, every layer with all inputs of its samples."""
    alone, both = found["recorder"]["alone"], found["recorder"][order]
    assert both["runs"] == 2 and both["samples"] == 2 * alone["samples"] and both["layers"] == alone["layers"]
    assert both["counts"] == [2 * count for count in alone["counts"]] and both["finite"]
    assert both["distances"] == pytest.approx(alone["distances"], rel=1e-3)


@pytest.mark.parametrize("order", ORDERS)
def test_a_cache_and_a_recorder_on_two_devices(found, order):
    assert found["cache and recorder"][order]["same"] and found["cache and recorder"][order]["samples"] > 0


def test_tap_calibrate_observes_one_network(found):
    assert found["calibrated"]["same"] and found["calibrated"]["layers"] > 10


def test_quantize_leaves_no_network_in_full_precision(found):
    if (case := found["quantized"]) is None:
        pytest.skip("this version does not load W8A8")
    assert case["networks"] == 2 and case["left"] == 0 and case["integers"] == [True, True]
    assert case["before"] == 0 and case["after"] < case["effect"]


def test_an_interrupted_run_of_two_devices_leaves_nothing(found):
    assert found["interrupted"] == {
        "ended": "interrupted", "nothing added": True, "hooks": False, "same": True, "runs": 1,
    }  # fmt: skip
