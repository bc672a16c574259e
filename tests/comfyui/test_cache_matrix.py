"""Apply Cache on real ComfyUI model classes with what a workflow may do to a run, for each tier of reuse."""

from __future__ import annotations

import pytest

FAMILIES = ("Flux", "SD 3.5", "Lumina 2", "Wan 2.1", "Qwen-Image")
TIERS = ("whole prediction", "blocks")
SIDES = ("positive", "negative")
HELD, ALL = "CRRCRRCRR", "CCCCCCCCC"
ENDS = "CRRCRCCRR"  # what a condition belongs to changes before step 5
CLOSE = 1e-5
EVERYWHERE = [(family, tier) for family in FAMILIES for tier in TIERS]
everywhere = pytest.mark.parametrize(("family", "tier"), EVERYWHERE)


def found(run, program: str, check: str, family: str, tier: str) -> dict:
    return run(program)[check][f"{family}, {tier}"]


def is_brute_force(result: dict) -> bool:
    """Equal samples, and every condition's timeline as it was recorded."""
    return result["error"] < CLOSE < 1e-2 < result["effect"] and result["timeline"] == result["recorded"]


@everywhere
def test_guidance_evaluated_at_once_or_apart_or_changing_gives_the_same(run, family, tier):
    runs = found(run, "cache_matrix", "guidance", family, tier)
    for result in runs.values():
        assert result["error"] < CLOSE and result["from together"] < CLOSE
        assert result["timeline"] == result["recorded"] == dict.fromkeys(SIDES, HELD)
    assert [runs[kind]["calls"] for kind in ("together", "apart", "changing")] == [9, 18, 12]


@everywhere
def test_prompts_of_two_lengths(run, family, tier):
    """ComfyUI evaluates them apart."""
    for result in found(run, "cache_matrix", "longer negative", family, tier).values():
        assert result["error"] < CLOSE and result["from together"] < CLOSE and result["calls"] == 18
        assert result["timeline"] == result["recorded"] == dict.fromkeys(SIDES, HELD)


def test_padding_of_unets_changes_nothing(run):
    for result in found(run, "cache_matrix", "padding of core", "SD 1.5", TIERS[0]).values():
        assert result["error"] < CLOSE and result["from together"] < CLOSE
        assert result["timeline"] == result["recorded"] == dict.fromkeys(SIDES, HELD)


@pytest.mark.parametrize("family", ["Flux", "Wan 2.1"])
@pytest.mark.parametrize("tier", TIERS)
def test_a_prompt_whose_padding_changes_does_not_get_features_of_another_length(run, family, tier):
    """What it had at that length before the latest computed step is too old as well."""
    runs = found(run, "cache_matrix", "padded negative", family, tier)
    for result in runs.values():
        assert result["error"] < CLOSE and result["timeline"] == result["recorded"]
    changing = {"positive": "CRRCCRCCR", "negative": "CRRCRRCCR"} if tier == "blocks" else dict.fromkeys(SIDES, HELD)
    assert runs["changing"]["timeline"] == changing
    assert runs["together"]["timeline"] == runs["apart"]["timeline"] == dict.fromkeys(SIDES, HELD)


@everywhere
def test_an_image_that_is_changed_in_part(run, family, tier):
    result = found(run, "cache_matrix", "denoise 0.5", family, tier)
    assert is_brute_force(result) and result["timeline"] == dict.fromkeys(SIDES, HELD)


@everywhere
@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde", "dpmpp_2s_ancestral"])
def test_samplers_that_evaluate_a_step_twice(run, family, tier, sampler):
    """All but the last of nine steps are evaluated twice."""
    result = found(run, "cache_matrix", "samplers", family, tier)[sampler]
    assert result["computed"] == [0, 3, 6] and (result["ran"], result["of"]) == (6, 17)
    assert result["finite"] and result["tier"] == f"{tier}, as chosen"


@everywhere
def test_areas_of_two_shapes_keep_their_own(run, family, tier):
    result = found(run, "cache_matrix", "areas", family, tier)
    assert is_brute_force(result)
    names = ("positive", "positive #2", "negative", "negative #2", "negative #3")
    assert result["timeline"] == dict.fromkeys(names, HELD)


@pytest.mark.parametrize("tier", TIERS)
def test_context_windows_keep_their_own(run, tier):
    result = found(run, "cache_matrix", "windows", "Wan 2.1", tier)
    assert is_brute_force(result) and len(result["timeline"]) == 6 and set(result["timeline"].values()) == {HELD}


@pytest.mark.parametrize("family", ["Flux", "SD 3.5"])
@pytest.mark.parametrize("tier", TIERS)
def test_a_second_pass_without_some_layers_keeps_its_own(run, family, tier):
    result = found(run, "cache_matrix", "skipped layers", family, tier)
    assert is_brute_force(result) and result["timeline"] == dict.fromkeys((*SIDES, "positive #2"), HELD)
    first, second = result["ran"][0], result["ran"][1]
    assert [path for path in first if path not in second] == [path for path in first if path.endswith(".0")] != []


@pytest.mark.parametrize("family", ["Flux", "SD 3.5"])
@pytest.mark.parametrize("tier", TIERS)
def test_layers_that_are_skipped_in_a_part_of_the_run(run, family, tier):
    """The negative is computed where they begin and end; at the end the positive is in its batch again."""
    result = found(run, "cache_matrix", "skipped in part", family, tier)
    assert is_brute_force(result) and result["timeline"] == {"positive": ENDS, "negative": "CRCCRCCRR"}


@everywhere
def test_a_hooked_lora_computes_where_its_strength_changes(run, family, tier):
    result = found(run, "cache_matrix", "hooks", family, tier)
    assert is_brute_force(result) and result["timeline"] == {"positive": ENDS, "negative": HELD}


@pytest.mark.parametrize("tier", TIERS)
def test_a_control_that_ends(run, tier):
    """Neither holds what the control did to other blocks or to the prediction."""
    result = found(run, "cache_matrix", "control", "Flux", tier)
    assert is_brute_force(result)
    assert result["timeline"] == dict.fromkeys(SIDES, ENDS)


@everywhere
def test_runs_after_each_other_are_as_if_each_were_the_first(run, family, tier):
    assert all(found(run, "cache_matrix", "two runs", family, tier).values())


@everywhere
def test_clones_replace_the_cache_and_leave_the_original(run, family, tier):
    result = found(run, "cache_matrix", "clones", family, tier)
    assert result["computed"] == [[0, 2, 4, 6, 8], [0, 3, 6]] and result["differ"] > 1e-2
    assert result["wrappers"] == [0, 0, 3, 3]
    assert result["plain"] is True and result["clean"] is True


@everywhere
@pytest.mark.parametrize("place", ["callback", "block"])
def test_an_error_in_mid_run_leaves_nothing(run, family, tier, place):
    ended, clean, same = found(run, "cache_matrix", "broken off", family, tier)[place]
    assert ended and clean and same


@everywhere
def test_what_reuses_nothing_changes_no_bit_and_says_so(run, family, tier):
    for kind, (same, warnings) in found(run, "cache_matrix", "never reuses", family, tier).items():
        assert same is True
        reason = ["no step of 9 lies in the part from 0.5 to 0.5"] if kind == "no part of the run" else []
        assert warnings == ([] if kind == "interval 1" else [*reason, "no effect: all 9 steps were computed"])


@everywhere
@pytest.mark.parametrize("order", [0, 1])
def test_memory_is_what_is_reported(run, family, tier, order):
    result = found(run, "cache_runs", "memory", family, tier)[f"order {order}"]
    assert result["reported"] == result["peak"] > 0 and result["finite"]
    if tier == "whole prediction":
        assert result["peak"] == 2 * result["latent"] * (order + 1)
    same, devices, reported = result["offloaded"]
    assert same is True and devices == ["cpu"] and reported == result["peak"]


@everywhere
def test_what_blocks_add_is_kept_in_the_models_type(run, family, tier):
    result = found(run, "cache_runs", "memory", family, tier)
    half, single = result["bfloat16"], result["order 0"]
    assert half["finite"] and half["tier"] == f"{tier}, as chosen" and not half["warnings"]
    kept = {"whole prediction": (["torch.float32"], 1), "blocks": (["torch.bfloat16"], 2)}
    assert (half["dtypes"], single["peak"] // half["peak"]) == kept[tier]


@everywhere
@pytest.mark.parametrize("step", [0, 3, 4])
def test_a_step_that_runs_out_of_memory(run, family, tier, step):
    """It is computed once more without features; the next step that needs them computes. Without features it raises."""
    result = found(run, "cache_runs", "out of memory", family, tier)[f"step {step}"]
    if step == 0:
        assert (result["raised"], result["ended"]) == ([0], "raised")
        return
    reached = tier == "blocks" or step == 3  # a reused prediction calls no network
    timeline = {3: "CRRCCRCRR", 4: "CRRCCCCRR"}[step] if reached else HELD
    warning = ["memory ran out: kept features were dropped and the step was computed"]
    assert (result["raised"], result["ended"]) == ([step] if reached else [], "")
    assert result["timeline"] == result["recorded"] == dict.fromkeys(SIDES, timeline)
    assert result["warnings"] == (warning if reached else [])


@everywhere
@pytest.mark.parametrize(("check", "timeline"), [("held", HELD), ("forecast", "CRRCFFCFF"), ("no reuse", ALL)])
def test_the_report_and_the_log_tell_what_ran(run, family, tier, check, timeline):
    result = found(run, "cache_runs", check, family, tier)
    assert result["timeline"] == dict.fromkeys(SIDES, timeline)
    assert result["recorded"] == dict.fromkeys(SIDES, timeline.replace("F", "R"))
    assert result["tier"] == f"{tier}, as chosen" and result["finite"]
    (line,) = result["log"]
    computed = timeline.count("C")
    assert line.startswith(f"Q&C cache ({tier}): {computed} of 9 steps computed, {9 - computed} reused")
    assert line.endswith("MiB" if timeline != ALL else "no effect: all 9 steps were computed")
    assert (result["speedup"] is None) == (timeline == ALL)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("attention and MLP", "because attention and MLP are told apart on models of Load DiT only"),
        ("automatic", "which measured best"),
    ],
)
def test_other_choices_reuse_whole_predictions_and_say_why(run, family, wanted, reason):
    result = found(run, "cache_runs", wanted, family, wanted)
    assert result["tier"] == f"whole prediction, {reason}" and result["timeline"] == dict.fromkeys(SIDES, HELD)


@everywhere
def test_a_speedup_is_planned_and_measured(run, family, tier):
    """With so few layers, blocks are not all of the time."""
    result = found(run, "cache_runs", "speedup 2", family, tier)
    assert result["timeline"] == result["recorded"] and result["speedup"] is not None
    assert 1 <= len(result["computed"]) <= 5
    if tier == "whole prediction":
        assert len(result["computed"]) >= 3 and result["speedup"] > 1.2


@everywhere
def test_a_smaller_budget_computes_more(run, family, tier):
    result = found(run, "cache_runs", "budgets", family, tier)
    counts = [len(result[budget]) for budget in ("0.01", "0.1", "1.0")]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    for kind, allowed in {"1.0": 4, "one in a row": 1}.items():
        computed = [*result[kind], 9]
        assert computed[:3] == [0, 1, 2]
        assert max(later - earlier for earlier, later in zip(computed, computed[1:])) <= allowed + 1


@pytest.mark.parametrize("order", ["compiled first", "cached first"])
@pytest.mark.parametrize("tier", TIERS)
def test_a_compiled_model(run, tier, order):
    """Whatever is chosen, whole predictions are reused; nothing is compiled for the cache and no step is frozen."""
    runs = run("cache_compile")["whole model"][f"Flux, {tier}"]
    result = runs[order]
    assert result["tier"] == "whole prediction, because the whole model is compiled" and not result["warnings"]
    assert result["computed"] == [0, 3, 6] and result["error"] < 1e-4 < 1e-2 < result["effect"]
    assert {count for counts in result["graphs"] for count in counts} == {runs["no cache"]["graphs"][0][-1]}
    assert runs["after"]["error"] == 0


@pytest.mark.parametrize("order", ["compiled first", "cached first"])
@pytest.mark.parametrize("family", ["Flux", "Lumina 2"])
def test_compiled_blocks(run, family, order):
    """No step of a run compiles but its first, and that once more at most: the run's options have one entry more."""
    runs = run("cache_compile")["blocks"][f"{family}, blocks"]
    result = runs[order]
    assert result["tier"] == "blocks, as chosen" and not result["warnings"]
    assert result["computed"] == [0, 3, 6] and result["error"] < 1e-4 < 1e-2 < result["effect"]
    assert all(len(set(counts[1:])) == 1 for counts in result["graphs"])
    assert result["graphs"][-1][-1] <= runs["no cache"]["graphs"][-1][-1] + 1
    assert runs["after"]["error"] == 0
