"""TAP Calibrate and Variance Compensate on what custom sampler nodes take."""

from __future__ import annotations


def test_a_guider_is_calibrated_as_samplercustomadvanced_samples_it(run):
    """Inputs of every prediction and the final latent, bit for bit, for each guider with three sources of sigmas."""
    found = run("wired")["guiders"]
    assert len(found["equal"]) >= 15 and {name.split(",")[0] for name in found["equal"]} >= {"DualCFGGuider"}
    assert [name for name, equal in found["equal"].items() if not equal] == []
    assert [name for name, untouched in found["untouched"].items() if not untouched] == []


def test_widgets_are_calibrated_as_the_stock_nodes_sample_them(run):
    found = run("wired")["stock nodes"]
    assert len(found) == 6 and [name for name, equal in found.items() if not equal] == []


def test_a_calibration_says_what_was_wired(run):
    found = run("wired")["notes"]
    assert found["cfg"] == "Guider_DualCFG (cfg 1, cfg1 2, cfg2 3, nested 0)"
    assert (found["sampler"], found["sampler_function"]) == ("sample_lcm", "sample_lcm")
    assert (found["scheduler"], found["steps"], found["prompts"]) == ("sigmas", 3, 1)
    assert [round(sigma, 4) for sigma in found["sigmas"]] == [1.0, 0.6, 0.2, 0.0]


REFUSALS = {
    "nothing wired": "connect model, positive, negative",
    "no latent": "connect latent_image",
    "another model": "disconnect `model`",
    "part of sigmas": "SplitSigmas",
    "leftover of sigmas": "SplitSigmas",
    "noise without noise": "wire DisableNoise instead",
    "no step": "leave no step to sample",
    "no step of sigmas": "leave no step to sample",
    "no model": "has no MODEL of its own",
    "stranger": "use one of ComfyUI's guiders",
    "closed": "does not let its MODEL be exchanged",
}


def test_what_does_not_go_together_is_refused_before_the_model_is_called(run):
    found = run("wired")["refused"]
    for case, words in REFUSALS.items():
        assert words in found[case] and found[case].endswith("(0 calls)") and "\n" not in found[case], case
    assert found["same model"] == "nothing was refused"


def test_all_prompts_are_sampled_alike_and_the_held_out_calls_are_of_different_ones(run):
    """Entries of different lengths beside the positive one, the last a batch of two; both passes of 24 images."""
    found = run("wired")["prompts"]
    assert set(found["seen"].values()) == {24, 12} and len(found["seen"]) == 5  # 6 images, 2 steps, 2 passes
    assert [name for name, count in found["seen"].items() if count == 12] == ["entry 2, row 0", "entry 2, row 1"]
    assert len(found["held out"]) == 3 and found["notes"] == [5, 24]


def test_a_node_says_how_long_it_takes_and_what_it_did(run):
    first, *_, last = run("wired")["prompts"]["texts"]
    assert first == "about 10 seconds for 24 trajectories of 2 steps"
    assert last.startswith("20 samples of 5 prompts, ") and " s, saved as prompts_" in last


def test_out_of_memory_halves_the_batch_and_gives_what_the_small_batch_gives(run):
    found = run("wired")["memory"]
    for case in ("at once", "in the second pass"):
        differing, batch, text = found[case]
        assert differing == [] and batch == 2, case
        assert "2 at once because more did not fit" in text
    assert found["one image"] == "not enough for so many" and found["partial"] == []


def test_a_compensation_fitted_with_a_guider_equals_a_loop_by_hand(run):
    """First-order samplers at custom noise levels, with leftover noise, and on from another run's latent."""
    found = run("wired")["compensated"]
    assert len(found) == 5
    for case, values in found.items():
        assert values["factors"] < 1e-4 and values["result"] < 1e-4 < 10 * values["effect"], case
        assert values["guider stays"] and values["text"].startswith("2 pairs, "), case


def test_prompts_of_a_compensation_are_fitted_together_also_in_small_batches(run):
    found = run("wired")["batches"]
    assert found["deviation"] < 1e-5 and found["halved"] < 1e-5 and found["before"] > 1e-3
    assert found["batches"] == [64, 1] and found["prompts"] == 4 and found["same"] and found["differ"]
    assert "1 at once because more did not fit" in found["texts"][1]


def test_a_digest_covers_everything_that_is_wired(run):
    found = run("wired")["digests"]
    assert found["unequal"] == [] and found["different"] == found["of"] > 20  # more where a version has more guiders


def test_a_cancelled_calibration_with_a_guider_goes_on(run):
    found = run("wired")["resumed"]
    whole, from_the_start, left = found["calls"]
    assert whole == from_the_start > 18 and left == 3  # two passes, and the last of six runs once more
    assert found["differing"] == [] and found["other"]


def test_what_is_left_to_the_model_suits_its_family(run):
    found = run("wired")["defaults"]
    assert found["found"] == {
        "Flux": [20, 1.0, "euler", "simple"],
        "SDXL": [25, 8.0, "euler", "normal"],
        "Wan 2.1": [20, 3.5, "euler", "simple"],
        "SD 1.5": [25, 8.0, "euler", "normal"],
        "Chroma": [20, 4.0, "euler", "simple"],
        "DiT": [50, 2.0, "ddpm", "normal"],
    }
    assert found["given"] and found["samplers"] and found["schedulers"]
    assert found["pairs"] == [64, 64, 16, 4, 4]
