"""No clock and no earlier run decides a step of Apply Cache, and what keeps it from its promise is said."""

from __future__ import annotations

import pytest

NAME = "cache_promises"
REFUSED, DEFAULT = "the calibration does not place the steps because ", "; default spacing"


def test_no_clock_decides_a_step_of_a_speedup(run):
    for *same, (steps, warnings) in run(NAME)["clocks"].values():
        assert all(same)
        assert 4 <= len(steps) <= 6 and warnings == []


def test_an_error_budget_reads_the_model_sampling_of_its_own_run(run):
    found = run(NAME)["sampling of this run"]
    assert found["plain"][0] == found["plain"][1] and found["flow"][0] == found["flow"][1]
    assert found["plain"][0] != found["flow"][0]


def test_a_calibration_places_the_steps_of_the_run_that_it_is_of(run):
    found = run(NAME)["calibrations"]
    assert found["sigmas"] is True and found["optimum"] != found["default"][0]
    for case in ("same", "speedup", "older file", "multistep"):
        assert found[case] == [found["optimum"], []], case


def test_a_calibration_places_the_steps_within_their_part(run):
    found = run(NAME)["calibrations"]
    assert found["part"] == [found["optimum of the part"], []] and found["part"][0] != found["part, default"][0]
    assert set(found["part"][0]) >= {0, 1, 2, 9, 10, 11} and len(found["part"][0]) == 8


def test_what_the_node_is_given_is_what_it_attaches(run):
    found = run(NAME)["inputs"]
    assert len(found) == 7 and all(found.values()), found


@pytest.mark.parametrize(
    "case, computed", [("auto euler 20 1.5", 10), ("balanced euler 12 1", 6), ("fast ddpm 30 1.5", 10)]
)
def test_presets_compute_what_they_aim_at_where_that_pays(run, case, computed):
    assert run(NAME)["presets"][case] == [computed, [], False]


@pytest.mark.parametrize(
    "case, steps, said",
    [
        ("auto deis 8 1.5", 8, "8 steps of deis: nothing to gain; use 4 steps"),
        ("auto uni_pc 4 1.5", 4, "4 steps of uni_pc: nothing to gain; use 2 steps"),
        ("auto euler 8 1", 8, "8 steps without guidance: taken for a distilled model, nothing is reused"),
    ],
)
def test_presets_leave_the_image_as_it_is_where_nothing_is_to_gain_and_say_so(run, case, steps, said):
    assert run(NAME)["presets"][case] == [steps, [said], True]


def test_a_preset_computes_more_where_what_it_aims_at_is_no_better_than_fewer_steps(run):
    computed, (said,), same = run(NAME)["presets"]["fast euler 8 1.5"]
    assert computed == 5 and not same and said == "3x would be no better than fewer steps of euler; 1.6x is"


def test_the_last_blocks_feature_is_forecast(run):
    reuse, computed, warnings, difference = run(NAME)["last block"]
    assert reuse == "last block, as chosen" and computed == 15 and warnings == []
    assert 1e-4 < difference < 0.1


def test_no_more_steps_in_a_row_are_reused_than_asked(run):
    assert run(NAME)["most in a row"] == {"1": "CCCRCRCRCRCC", "2": "CCCRRCRRCRRC"}


@pytest.mark.parametrize("case", ["denoise", "scheduler", "noisy", "older file, denoise"])
def test_a_calibration_of_another_run_is_not_used_and_this_is_said(run, case):
    found = run(NAME)["calibrations"]
    steps, warnings = found[case]
    told = [text for text in warnings if text.startswith(REFUSED) and text.endswith(DEFAULT)]
    assert steps == found["default"][0] and len(told) == 1


def test_a_calibration_of_other_steps_is_not_used_and_this_is_said(run):
    steps, (text,) = run(NAME)["calibrations"]["steps"]
    assert len(steps) == 6 and text == f"{REFUSED}it was made for 12 steps and this run has 13{DEFAULT}"


def test_a_calibration_without_step_distances_says_why(run):
    found = run(NAME)["calibrations"]
    for case, reason in {"with a cache": "it was made with a cache", "dpm_fast": "dpm_fast does not evaluate"}.items():
        steps, (text,) = found[case]
        assert steps == found["default"][0] and text.startswith(REFUSED + reason)


def test_a_calibration_that_the_policy_does_not_use_is_said(run):
    found = run(NAME)["calibrations"]
    assert found["interval"] == [
        [0, 3, 6, 9], ["the policy interval does not use the calibration; auto, speedup and number of steps do"]
    ]  # fmt: skip
    assert any(text.startswith("the policy error budget does not use") for text in found["budget"][0])


def test_a_calibration_of_another_model_is_refused_by_every_policy(run):
    said = run(NAME)["another model"]
    assert len(said) == 5 and all("made for another model" in text for text in said)


@pytest.mark.parametrize("case", ["EasyCache", "LazyCache", "wrapper", "function", "option", "module"])
def test_another_cache_on_the_model_is_found(run, case):
    (text,) = run(NAME)["other caches"][case]
    assert text.startswith("another cache is on the model (")


def test_another_cache_on_the_model_is_said_in_report_and_log(run):
    found = run(NAME)["other caches"]
    assert len(found["run"]) == len(found["log"]) == 1 and found["run"][0] in found["log"][0]


@pytest.mark.parametrize("case", ["nothing", "off", "exact", "a wrapper", "module alone"])
def test_nothing_is_said_where_no_other_cache_is(run, case):
    assert run(NAME)["other caches"][case] == []


def test_a_cache_that_the_guider_does_not_run_is_said(run):
    found = run(NAME)["two models"]
    if not found:
        pytest.skip("this ComfyUI has no guider with two models")
    assert found["main"] == [] == found["the same"]
    (alone,), (beside,) = found["negative"], found["both"]
    assert "without a cache instead of its own (cache, every 3 steps)" in alone
    assert "with the cache of the guider's main model instead of its own (cache, every 3 steps)" in beside


def test_a_call_without_a_run_is_computed(run):
    assert run(NAME)["a call without a run"] is True


def test_compensation_may_follow_all_policies_whose_steps_are_fixed(run):
    assert run(NAME)["compensations"] == {"speedup": False, "interval": False, "error budget": True}


def test_a_promise_that_cannot_be_met_says_what_is_left(run):
    assert run(NAME)["promises"] == {
        "part": ["2x requested, 1.2x possible from 0.4 to 0.6"],
        "few": ["4 steps with 2 computed are no better than a run of 2"],
        "kept": [],
    }
