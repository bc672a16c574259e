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


def test_a_digest_is_equal_for_equal_inputs_alone(run):
    """Weights, strength, range and image of a control, weights and strength of a hook, what other packs attach; the
    same in the middle of a session and in a new one. What cannot be compared is equal to nothing.
    """
    found = run("calibration")["digests"]
    assert found["unequal"] == [] and found["different"] == found["of"] > 30
    assert found["opaque"] is False


def test_a_calibration_does_not_go_on_with_another_control(run):
    found = run("calibration")["controls"]
    assert found["strength matters"] and found["differing"] == [] and found["partial"] == 1


def test_all_prompts_of_a_conditioning_are_seen(run):
    found = run("calibration")["prompts"]
    assert found["prompts"] == found["pooled"] == [0, 1, 2, 3, 4]
    assert found["held out"] == [4]


def test_the_self_test_of_a_cache_is_not_counted(run):
    found = run("calibration")["self-test"]
    assert found["layers"] > 10 and found["different"] == []


def test_a_full_disk_and_a_folder_that_cannot_be_written(run):
    found = run("calibration")["disk"]
    for message in found["messages"]:
        assert message.startswith("Nothing can be saved in ") and message.count(". ") == 0 and "\n" not in message
    assert len(found["messages"]) == 2 and found["left"] and found["again"] == [] and found["listed"] == ["new"]
    assert not found["unfinished"] and found["resumed"] == []


def test_the_node_keeps_a_partial_file_until_it_is_done(run):
    found = run("calibration")["node"]
    assert found["partial"] == 1 and found["not listed"] is True
    assert found["left"] == 0 and found["new"] is True and found["saved"] == []


def test_the_same_inputs_give_the_same_file_without_sampling(run):
    found = run("calibration")["node"]
    assert found["again"] == [] and found["sampled again"] == 0 and found["one file"]
    (other,) = found["others"]
    assert other.startswith("inside_tap_demo_") and other.endswith("_00002.safetensors") and found["other seed"]


def test_a_damaged_partial_file_is_set_aside(run):
    found = run("calibration")["node"]
    assert found["afresh"] == [] and found["damaged"] == [True]


def test_the_node_hands_its_inputs_on(run):
    found = run("calibration")["node"]
    assert found["held out"] == [2, 0] and found["rows"] == 128
    assert run("calibration")["node's inputs"] is True


def test_a_name_is_listed_and_loads_or_is_not_listed(run):
    found = run("calibration")["node"]["names"]
    assert found["refused"] == found["loaded unlisted"] == found["folder listed"] == []
    hidden = ["new\\nline", "back\\\\slash", ".hidden", "\\udcff", "x.safetensors.", "..safetensors", "\\u2028"]
    assert len(found["not listed"]) == len(hidden)
    assert all(part in name for part, name in zip(hidden, found["not listed"]))
