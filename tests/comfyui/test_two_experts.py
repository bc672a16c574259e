"""Wan 2.2's two experts: plain, cached, calibrated from runs, quantized, saved, loaded again, measured."""

from __future__ import annotations

import pytest


@pytest.fixture
def found(run, checkout) -> dict:
    if checkout.version < (0, 27):
        pytest.skip("this ComfyUI is older than 0.27, which has W8A8")
    return run("two_experts")["whole"]


def test_both_experts_are_calibrated_in_the_runs_that_sample_them(found):
    assert found["recording keeps the images"] is True
    assert all(runs == 3 and samples >= 3 for runs, samples in found["runs"].values())
    assert found["calibrations differ"] is True
    assert found["is of the second expert"] == [False, True]


def test_both_experts_are_quantized_into_files_that_load_as_they_were(found):
    assert found["layers"]["high"] == found["layers"]["low"] > 0
    assert all(0 < error < 0.05 for error in found["held out"].values())
    assert found["loaded is the quantized one"] < 1e-6


def test_the_whole_stays_close_to_the_plain_run_and_is_reported_as_one(found):
    assert 0 < found["quantization on the cached run"] < found["cache"] < 0.3
    assert found["both"] < 1.5 * found["cache"]
    assert found["report"] == [20, 10, 2, True, 11] and found["time"] is True
    assert found["plain again"] is True
