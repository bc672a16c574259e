"""Apply Cache on real ComfyUI model classes with what a workflow may do to a run, for each option of reuse.

Each test is one property; a subtest is a case in which it has to hold, named by its family and what is reused.
"""

from __future__ import annotations

from itertools import product

FAMILIES = ("Flux", "SD 3.5", "Lumina 2", "Wan 2.1", "Qwen-Image")
REUSE = ("whole prediction", "blocks")
SIDES = ("positive", "negative")
HELD, ALL = "CRRCRRCRR", "CCCCCCCCC"
ENDS = "CRRCRCCRR"  # what a condition belongs to changes before step 5
CLOSE = 1e-5


def cases(*families: str) -> dict[str, str]:
    """Name of a case in the programs -> what it reuses."""
    return {f"{family}, {reuse}": reuse for family, reuse in product(families, REUSE)}


EVERYWHERE = cases(*FAMILIES)


def is_brute_force(result: dict) -> bool:
    """Equal samples, and every condition's timeline as it was recorded."""
    return result["error"] < CLOSE < 1e-2 < result["effect"] and result["timeline"] == result["recorded"]


def test_guidance_evaluated_at_once_or_apart_or_changing_gives_the_same(run, subtests):
    found = run("cache_matrix")["guidance"]
    for case in EVERYWHERE:
        with subtests.test(case):
            runs = found[case]
            for result in runs.values():
                assert result["error"] < CLOSE and result["from together"] < CLOSE
                assert result["timeline"] == result["recorded"] == dict.fromkeys(SIDES, HELD)
            assert [runs[kind]["calls"] for kind in ("together", "apart", "changing")] == [9, 18, 12]


def test_prompts_of_two_lengths(run, subtests):
    """ComfyUI evaluates them apart."""
    found = run("cache_matrix")["longer negative"]
    for case in EVERYWHERE:
        with subtests.test(case):
            for result in found[case].values():
                assert result["error"] < CLOSE and result["from together"] < CLOSE and result["calls"] == 18
                assert result["timeline"] == result["recorded"] == dict.fromkeys(SIDES, HELD)


def test_padding_of_unets_changes_nothing(run):
    for result in run("cache_matrix")["padding of core"]["SD 1.5, whole prediction"].values():
        assert result["error"] < CLOSE and result["from together"] < CLOSE
        assert result["timeline"] == result["recorded"] == dict.fromkeys(SIDES, HELD)


def test_a_prompt_whose_padding_changes_does_not_get_features_of_another_length(run, subtests):
    """What it had at that length before the latest computed step is too old as well."""
    found = run("cache_matrix")["padded negative"]
    for case, reuse in cases("Flux", "Wan 2.1").items():
        with subtests.test(case):
            runs, held = found[case], dict.fromkeys(SIDES, HELD)
            for result in runs.values():
                assert result["error"] < CLOSE and result["timeline"] == result["recorded"]
            changing = {"positive": "CRRCCRCCR", "negative": "CRRCRRCCR"} if reuse == "blocks" else held
            assert runs["changing"]["timeline"] == changing
            assert runs["together"]["timeline"] == runs["apart"]["timeline"] == held


def test_an_image_that_is_changed_in_part(run, subtests):
    found = run("cache_matrix")["denoise 0.5"]
    for case in EVERYWHERE:
        with subtests.test(case):
            assert is_brute_force(found[case]) and found[case]["timeline"] == dict.fromkeys(SIDES, HELD)


def test_samplers_that_evaluate_a_step_twice(run, subtests):
    """All but the last of nine steps are evaluated twice."""
    found, samplers = run("cache_matrix")["samplers"], ("heun", "dpm_2", "dpmpp_sde", "dpmpp_2s_ancestral")
    for (case, reuse), sampler in product(EVERYWHERE.items(), samplers):
        with subtests.test(f"{case}, {sampler}"):
            result = found[case][sampler]
            assert result["computed"] == [0, 3, 6] and (result["ran"], result["of"]) == (6, 17)
            assert result["finite"] and result["reuse"] == f"{reuse}, as chosen"


def test_areas_of_two_shapes_keep_their_own(run, subtests):
    found = run("cache_matrix")["areas"]
    names = ("positive", "positive #2", "negative", "negative #2", "negative #3")
    for case in EVERYWHERE:
        with subtests.test(case):
            assert is_brute_force(found[case])
            assert found[case]["timeline"] == dict.fromkeys(names, HELD)


def test_context_windows_keep_their_own(run, subtests):
    found = run("cache_matrix")["windows"]
    for case in cases("Wan 2.1"):
        with subtests.test(case):
            assert is_brute_force(found[case])
            assert len(found[case]["timeline"]) == 6 and set(found[case]["timeline"].values()) == {HELD}


def test_a_second_pass_without_some_layers_keeps_its_own(run, subtests):
    found = run("cache_matrix")["skipped layers"]
    for case in cases("Flux", "SD 3.5"):
        with subtests.test(case):
            result = found[case]
            assert is_brute_force(result) and result["timeline"] == dict.fromkeys((*SIDES, "positive #2"), HELD)
            first, second = result["ran"][0], result["ran"][1]
            skipped = [path for path in first if path not in second]
            assert skipped == [path for path in first if path.endswith(".0")] != []


def test_layers_that_are_skipped_in_a_part_of_the_run(run, subtests):
    """The negative is computed where they begin and end; at the end the positive is in its batch again."""
    found = run("cache_matrix")["skipped in part"]
    for case in cases("Flux", "SD 3.5"):
        with subtests.test(case):
            assert is_brute_force(found[case])
            assert found[case]["timeline"] == {"positive": ENDS, "negative": "CRCCRCCRR"}


def test_a_hooked_lora_computes_where_its_strength_changes(run, subtests):
    found = run("cache_matrix")["hooks"]
    for case in EVERYWHERE:
        with subtests.test(case):
            assert is_brute_force(found[case])
            assert found[case]["timeline"] == {"positive": ENDS, "negative": HELD}


def test_a_control_that_ends(run, subtests):
    """Neither holds what the control did to other blocks or to the prediction."""
    found = run("cache_matrix")["control"]
    for case in cases("Flux"):
        with subtests.test(case):
            assert is_brute_force(found[case]) and found[case]["timeline"] == dict.fromkeys(SIDES, ENDS)


def test_runs_after_each_other_are_as_if_each_were_the_first(run, subtests):
    found = run("cache_matrix")["two runs"]
    for case in EVERYWHERE:
        with subtests.test(case):
            assert all(found[case].values())


def test_clones_replace_the_cache_and_leave_the_original(run, subtests):
    found = run("cache_matrix")["clones"]
    for case in EVERYWHERE:
        with subtests.test(case):
            result = found[case]
            assert result["computed"] == [[0, 2, 4, 6, 8], [0, 3, 6]] and result["differ"] > 1e-2
            assert result["wrappers"] == [0, 0, 3, 3]
            assert result["plain"] is True and result["clean"] is True


def test_an_error_in_mid_run_leaves_nothing(run, subtests):
    found = run("cache_matrix")["broken off"]
    for case, place in product(EVERYWHERE, ("callback", "block")):
        with subtests.test(f"{case}, {place}"):
            ended, clean, same = found[case][place]
            assert ended and clean and same


def test_what_reuses_nothing_changes_no_bit_and_says_so(run, subtests):
    found = run("cache_matrix")["never reuses"]
    for case in EVERYWHERE:
        with subtests.test(case):
            for kind, (same, warnings) in found[case].items():
                assert same is True
                reason = ["no step of 9 lies in the part from 0.5 to 0.5"] if kind == "no part of the run" else []
                assert warnings == ([] if kind == "interval 1" else [*reason, "no effect: all 9 steps were computed"])


def test_memory_is_what_is_reported(run, subtests):
    found = run("cache_runs")["memory"]
    for (case, reuse), order in product(EVERYWHERE.items(), (0, 1)):
        with subtests.test(f"{case}, order {order}"):
            result = found[case][f"order {order}"]
            assert result["reported"] == result["peak"] > 0 and result["finite"]
            if reuse == "whole prediction":
                assert result["peak"] == 2 * result["latent"] * (order + 1)
            same, devices, reported = result["offloaded"]
            assert same is True and devices == ["cpu"] and reported == result["peak"]


def test_what_blocks_add_is_kept_in_the_models_type(run, subtests):
    found = run("cache_runs")["memory"]
    kept = {"whole prediction": (["torch.float32"], 1), "blocks": (["torch.bfloat16"], 2)}
    for case, reuse in EVERYWHERE.items():
        with subtests.test(case):
            half, single = found[case]["bfloat16"], found[case]["order 0"]
            assert half["finite"] and half["reuse"] == f"{reuse}, as chosen" and not half["warnings"]
            assert (half["dtypes"], single["peak"] // half["peak"]) == kept[reuse]


def test_a_first_step_that_runs_out_of_memory_raises(run, subtests):
    found = run("cache_runs")["out of memory"]
    for case in EVERYWHERE:
        with subtests.test(case):
            result = found[case]["step 0"]
            assert (result["raised"], result["ended"]) == ([0], "raised")


def test_a_step_that_runs_out_of_memory(run, subtests):
    """It is computed once more without features; the next step that needs them computes."""
    found = run("cache_runs")["out of memory"]
    for (case, reuse), step in product(EVERYWHERE.items(), (3, 4)):
        with subtests.test(f"{case}, step {step}"):
            result = found[case][f"step {step}"]
            reached = reuse == "blocks" or step == 3  # a reused prediction calls no network
            timeline = {3: "CRRCCRCRR", 4: "CRRCCCCRR"}[step] if reached else HELD
            warning = ["memory ran out: kept features were dropped and the step was computed"]
            assert (result["raised"], result["ended"]) == ([step] if reached else [], "")
            assert result["timeline"] == result["recorded"] == dict.fromkeys(SIDES, timeline)
            assert result["warnings"] == (warning if reached else [])


def test_the_report_and_the_log_tell_what_ran(run, subtests):
    found, timelines = run("cache_runs"), {"held": HELD, "forecast": "CRRCFFCFF", "no reuse": ALL}
    for (case, reuse), (check, timeline) in product(EVERYWHERE.items(), timelines.items()):
        with subtests.test(f"{case}, {check}"):
            result = found[check][case]
            assert result["timeline"] == dict.fromkeys(SIDES, timeline)
            assert result["recorded"] == dict.fromkeys(SIDES, timeline.replace("F", "R"))
            assert result["reuse"] == f"{reuse}, as chosen" and result["finite"]
            (line,) = result["log"]
            computed = timeline.count("C")
            assert line.startswith(f"Q&C cache ({reuse}): {computed} of 9 steps computed, {9 - computed} reused")
            assert line.endswith("MiB" if timeline != ALL else "no effect: all 9 steps were computed")
            assert (result["speedup"] is None) == (timeline == ALL)


def test_other_choices_reuse_whole_predictions_and_say_why(run, subtests):
    found = run("cache_runs")
    reasons = {
        "attention and MLP": "because attention and MLP can be reused separately on models of Load DiT only",
        "automatic": "which measured best",
    }
    for family, (wanted, reason) in product(FAMILIES, reasons.items()):
        with subtests.test(f"{family}, {wanted}"):
            result = found[wanted][f"{family}, {wanted}"]
            assert result["reuse"] == f"whole prediction, {reason}"
            assert result["timeline"] == dict.fromkeys(SIDES, HELD)


def test_a_speedup_is_planned_and_measured(run, subtests):
    """With so few layers, blocks are not all of the time."""
    found = run("cache_runs")["speedup 2"]
    for case, reuse in EVERYWHERE.items():
        with subtests.test(case):
            result = found[case]
            assert result["timeline"] == result["recorded"] and result["speedup"] is not None
            assert 1 <= len(result["computed"]) <= 5
            if reuse == "whole prediction":
                assert len(result["computed"]) >= 3 and result["speedup"] > 1.2


def test_a_smaller_budget_computes_more(run, subtests):
    found = run("cache_runs")["budgets"]
    for case in EVERYWHERE:
        with subtests.test(case):
            result = found[case]
            counts = [len(result[budget]) for budget in ("0.01", "0.1", "1.0")]
            assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
            for kind, allowed in {"1.0": 4, "one in a row": 1}.items():
                computed = [*result[kind], 9]
                assert computed[:3] == [0, 1, 2]
                assert max(later - earlier for earlier, later in zip(computed, computed[1:])) <= allowed + 1


def test_a_compiled_model(run, subtests):
    """Whatever is chosen, whole predictions are reused; nothing is compiled for the cache and no step is frozen."""
    found = run("cache_compile")["whole model"]
    for case, order in product(cases("Flux"), ("compiled first", "cached first")):
        with subtests.test(f"{case}, {order}"):
            runs, result = found[case], found[case][order]
            assert result["reuse"] == "whole prediction, because the whole model is compiled" and not result["warnings"]
            assert result["computed"] == [0, 3, 6] and result["error"] < 1e-4 < 1e-2 < result["effect"]
            assert {count for counts in result["graphs"] for count in counts} == {runs["no cache"]["graphs"][0][-1]}
            assert runs["after"]["error"] == 0


def test_compiled_blocks(run, subtests):
    """No step of a run compiles but its first, and that once more at most: the run's options have one entry more."""
    found = run("cache_compile")["blocks"]
    for family, order in product(("Flux", "Lumina 2"), ("compiled first", "cached first")):
        with subtests.test(f"{family}, {order}"):
            runs, result = found[f"{family}, blocks"], found[f"{family}, blocks"][order]
            assert result["reuse"] == "blocks, as chosen" and not result["warnings"]
            assert result["computed"] == [0, 3, 6] and result["error"] < 1e-4 < 1e-2 < result["effect"]
            assert all(len(set(counts[1:])) == 1 for counts in result["graphs"])
            assert result["graphs"][-1][-1] <= runs["no cache"]["graphs"][-1][-1] + 1
            assert runs["after"]["error"] == 0
