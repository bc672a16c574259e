"""TAP Calibrate on any MODEL: memory, kept inputs, resuming, held-out calls."""

from __future__ import annotations

import pytest

FLOAT32 = 1e-5  # a batch of another size may add up in another order


@pytest.mark.parametrize("model", ["DiT", "Flux"])
def test_a_cancelled_calibration_goes_on_and_gives_the_same_bits(run, model):
    """It ends at the prediction after which it was cancelled and leaves no hook; 18 predictions are a pass."""
    found = run("calibration")[f"resumes, {model}"]
    assert found["stops"] == [[4, False], [18 + 3, True], [12 + 5, True]]
    assert found["left"] == 6
    assert found["differing"] == []


@pytest.mark.parametrize(("model", "full"), [("Flux", 20), ("Wan", 20)])
def test_kept_rows_are_inputs_that_layers_see(run, model, full):
    """Layers that see one row for a sample, such as Flux's modulation, have fewer than a hundred to keep."""
    found = run("calibration")[f"rows, {model}"]
    assert found["foreign"] == found["foreign, held out"] == []
    assert found["most"] == 100 and found["full"] == full
    assert 0 < found["held out"] <= 256


@pytest.mark.parametrize("model", ["Flux", "Wan"])
def test_the_held_out_image_is_not_among_the_statistics(run, model):
    found = run("calibration")[f"rows, {model}"]
    assert found["told apart"] == 4 and found["mixed"] == []


@pytest.mark.parametrize("model", ["Flux", "Wan"])
def test_statistics_stay_within_the_memory_they_may_take(run, model):
    found = run("calibration")[f"memory, {model}"]
    assert found["least"] < found["taken"] <= found["budget"] < found["unbounded"]
    assert found["layers"] == found["of all"]


def test_too_little_memory_is_said_in_words(run):
    assert "Statistics of 26 layers need at least" in run("calibration")["too little memory"]


@pytest.mark.parametrize("model", ["Flux", "Wan", "sound and video"])
def test_held_out_calls_replay_to_what_the_model_answered(run, model):
    assert set(run("calibration")[f"replays, {model}"]) == {0.0}


@pytest.mark.parametrize("model", ["Flux", "DiT", "DiT, whole prediction"])
def test_held_out_calls_of_a_batch_replay(run, model):
    assert max(run("calibration")[f"replays in a batch, {model}"]) < FLOAT32


def test_held_out_calls_spread_over_steps_and_conditions(run):
    assert run("calibration")["spread"] == {"calls": 4, "levels": 4, "conditions": 2}


def test_one_trajectory_holds_out_what_was_not_chosen(run):
    assert run("calibration")["one trajectory"] == {"some": 4, "all chosen": 0, "none": 0}


def test_a_call_with_a_control_net_is_not_kept(run):
    found = run("calibration")["ControlNet"]
    assert found["calls"] == 0 and found["rows"] > 0


def test_layers_without_inputs_get_no_statistics(run):
    assert run("calibration")["never runs"] == {"unused": False, "others": 20}
    assert run("calibration")["experts"]["without inputs"] == 0


def test_partial_files_of_other_inputs_have_other_names(run):
    found = run("calibration")["digests"]
    assert found["same"] == 1 and found["different"] == found["of"]


def test_the_node_keeps_a_partial_file_until_it_is_done(run):
    found = run("calibration")["node"]
    assert found["partial"] == 1 and found["not listed"] is True
    assert found["left"] == 0 and found["new"] is True and found["saved"] == []
