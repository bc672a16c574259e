"""The nodes' models inside ComfyUI against the engine, against stock code and against brute force."""

from __future__ import annotations

import pytest

from .checkouts import parameters

AS_THE_ENGINE = (
    "plain ddpm", "plain ddim", "plain euler", "cached", "cached, order 1", "cached, split guidance",
    "whole-output cache", "whole-output cache, 5 steps", "whole-output cache, from 0.25 to 0.75", "evaluated twice",
    "compensated ddpm", "compensated ddim", "compensated euler",
)  # fmt: skip
DIT_TIMESTEPS = [round(999 * i / 49) for i in reversed(range(50))]


def test_stock_sampling_equals_the_engine(run, subtests):
    found = run("sampling")
    for case in AS_THE_ENGINE:
        with subtests.test(case):
            assert found[case] < 1e-4


def test_what_does_nothing_changes_no_bit(run, subtests):
    found = run("sampling")
    for case in ("interval 1 is identical", "K = 1 is identical", "Sample equals KSampler"):
        with subtests.test(case):
            assert found[case] is True


def test_a_run_leaves_nothing_on_the_module(run):
    assert run("sampling")["nothing is left on the module"] is True


def test_class_ids_and_timesteps_survive_every_precision(run):
    for ids, timesteps in run("models")["ids and timesteps"].values():
        assert ids == [0, 257, 417, 999, 1000]
        assert timesteps == [0.0, 999.0]


def test_half_precision_is_close(run):
    errors = run("models")["half precision"]
    assert errors["torch.bfloat16"] < 1e-2 and errors["torch.float16"] < 2e-3


def test_sizes(run):
    found = run("models")
    assert found["learned variance"] == [2, 4, 8, 8]
    assert found["odd sizes"] == [[2, 4, 9, 9], [2, 4, 8, 12]]


def test_a_lora_equals_merged_weights(run):
    found = run("models")["LoRA"]
    assert found["effect"] > 1e-3
    assert found["with"] < 1e-5 and found["baked"] < 1e-6 and found["baked after unloading"] < 1e-6
    assert found["without"] == 0


def test_offloaded_weights_give_the_same(run):
    found = run("models")["low VRAM"]
    assert found["offloaded"] > 0
    assert found["difference"] < 1e-6 and found["again"] == 0


def test_a_prompt_is_refused_in_words(run):
    assert "Class Label" in run("models")["text conditioning"]


def test_core_easycache_works_on_the_model(run):
    assert run("models")["EasyCache applies"] is True


def test_a_quantized_file_loads_in_every_precision_and_before_its_layers_hold_tensors(run):
    """bfloat16 and float16 round before static activations do, so they differ by more than their own precision."""
    assert max(run("models")["quantized file, half precision"].values()) < 0.1
    assert run("models")["quantized file, lazy layers"] is True


def test_core_can_build_a_second_copy(run):
    assert run("models")["second copies"] == {"demo": True, "quantized file": True, "quantized": True}


def test_a_bypass_lora_is_refused_in_words(run):
    assert "without bypass" in run("models")["bypass LoRA"]


def test_the_method_paper_refuses_changes_of_its_weights_in_words(run):
    said = run("models")["changes after the method paper"]
    assert len(said) == 12 and all("before Quantize" in words for words in said.values()), said


def test_the_method_paper_takes_a_weak_lora_whole(run):
    assert 0.9 < run("models")["weak LoRA, method paper"] < 1.1


def test_fingerprints_do_not_depend_on_what_was_sampled(run):
    assert run("models")["fingerprints"] is True


def test_samplers_that_evaluate_a_step_twice(run):
    """All keep the schedule of the steps; the bounds are loose, for these samplers differ in how they amplify."""
    found = run("sampling")["multi-evaluation samplers"]
    assert {computed for computed, _ in found.values()} == {4}
    assert all(0 < error < 1 for _, error in found.values())
    assert run("sampling")["empty schedule"] is True


def test_calibration_equals_brute_force(run):
    found = run("pipeline")["statistics"]
    assert found["count"] == found["low"] == found["high"] == 0
    assert found["mean"] < 1e-5 and found["hessian"] < 1e-5


def test_cached_layers_are_calibrated_on_computed_steps(run):
    assert run("pipeline")["steps seen"] == {"branch": 4, "output": 12}


def test_calibration_measures_how_far_steps_lie_apart(run):
    found = run("pipeline")["distances"]
    assert found["error"] < 1e-5 and found["with a cache"] is True


def test_a_wired_calibration_places_the_computed_steps(run):
    assert run("pipeline")["calibrated steps"] is True


def test_calibration_leaves_no_hook(run):
    assert run("pipeline")["hooks are gone"] is True


@pytest.mark.parametrize("case", ["pipeline", "pipeline, gptq"])
def test_the_whole_chain_equals_the_engine(run, case):
    """Static activations round: most differences of a last bit vanish, and a few turn a code over and move an image by
    a percent or two. Which images do depends on the machine. So predictions are compared on equal samples; one image
    at least must follow the engine to rounding, and the others stay within what a turned code does to the engine.
    """
    found = run("pipeline")[case]
    assert sorted(found["every step"])[6] < 1e-5 and max(found["every step"]) < 2e-2
    assert min(found["images"]) < 1e-4
    turned = found["engine against itself, noise changed by 1e-6"]
    assert turned > 1e-3, "no code was turned over, so the next bound would say nothing"
    assert max(found["images"]) < 3 * turned
    assert max(found["images"]) < found["from full precision"] / 3


def test_models_given_to_a_node_stay_as_they_are(run):
    assert all(run("pipeline")["inputs stay"].values())


def test_the_method_paper_says_what_it_ignores(run):
    said = run("pipeline")["paper says"]
    assert "Warning" not in said["plain"]
    assert "Warning: the method paper ignores max_size_mb, max_model_error, skip; the method" in said["limited"]


def test_compensated_samples_deviate_as_the_reference_does(run):
    assert run("pipeline")["deviation"] < 1e-5


def test_scheduler_normal_visits_dit_s_timesteps(run):
    assert run("pipeline")["timesteps"] == DIT_TIMESTEPS


def test_sample_equals_ksampler_on_every_kind_of_latent(run):
    """Video, sound, both nested; a mask, batch_index, denoise 0.5 and 0: every entry of the LATENT, bit for bit."""
    found = run("sample_node")["Sample"]
    assert len(found) >= 19 and {name.split(",")[0] for name in found} >= {"Wan 2.1", "LTX-AV", "ACE-Step"}
    for case, (equal, timed, steps, size) in found.items():
        assert equal and timed == steps == (0 if case.endswith("nothing") else 6), case
        assert len(size) == (2 if case.startswith(("LTX-AV", "MiniMax")) else 1), case


def test_variance_is_compensated_in_every_part_of_a_latent(run):
    for name, found in run("sample_node")["parts"].items():
        if name == "MiniMax H3":  # takes one image at a time, and says so
            assert found["refused"] == "MiniMax H3 supports batch size 1"
            continue
        channels = sum(found["channels"])
        assert found["deviation"] < 1e-6 and found["deviation before"] > 1e-3, name
        assert found["factors"] == [6, channels] and found["noted"] == found["channels"], name


REFUSALS = {
    "other eta": "at eta 1.0, and this run has eta 0.5",
    "other sampler": "this run samples with sample_euler;",
    "other cfg": "with cfg 2.0, and this run is guided by 1.5",
    "other guider": "this run is guided by Guider_DualCFG",
    "other steps": "fitted on 6 other noise levels",
    "other scheduler": "fitted on 6 other noise levels",
    "part of the schedule": "fitted on 6 other noise levels",
    "new noise in mid-schedule": "begins with new noise at",
    "other cache": "put Variance Compensate after the nodes that cache and quantize",
    "file, other model": "fitted for other weights than those of `model`",
    "file, other cache": "fitted with another cache or quantization",
    "file, other reference": "made for another model",
    "empty bounds": "begin before it ends",
    "nan bounds": "begin before it ends",
    "nan cfg": "must be finite numbers",
    "method": "method must be one of",
    "free sampler": "choose another sampler",
    "other kind of model": "connect the same model to both",
}


def test_a_compensation_is_used_only_where_it_belongs(run):
    found = run("sample_node")["belongs"]
    for case, message in REFUSALS.items():
        assert message in found[case] and "\n" not in found[case], case
        assert "calls)" not in found[case] or found[case].endswith("(0 calls)"), case
    for case in ("same", "same eta", "same file", "older file", "second stage", "no steps"):
        assert found[case].startswith("nothing was refused"), case


def test_bounds_of_the_fit_choose_steps(run):
    assert run("sample_node")["belongs"]["part"] == "0 0 0 1 1 0"  # 0.5 to 0.7 of 6 steps


def test_class_label_composes_with_stock_conditioning_nodes(run):
    found = run("sample_node")["Class Label"]
    assert len(found) >= 18 and all(found.values()), found


def test_dit_xl_loads_and_samples(run, checkout):
    newest = [p.values[0] for p in parameters()][0]
    if checkout is not newest:
        pytest.skip("a 674-million-parameter model takes a minute and a half; the newest checkout shows it")
    assert run("large") == {
        "256": {"shape": [1, 4, 32, 32], "finite": True, "millions": 674},
        "512": {"shape": [1, 4, 64, 64], "finite": True, "millions": 674},
    }
