"""Run Report behind every kind of sampler, in jobs with cached nodes, cancelled, and what the canvas is told."""

from __future__ import annotations

import pytest

from .prompts import Graph, renewed
from .server import Server

STEPS, HALVES = 6, {"steps": 6, "parts": 2, "computed": 6}


def test_images_stay_the_same_and_every_sampler_is_measured(run, subtests):
    for name, report in run("run_report")["samplers"].items():
        with subtests.test(name):
            assert report["same"] and report["again"] and report["finished"] and report["positive"]
            assert (report["steps"], report["times"], report["unchanged"], report["parts"]) == (STEPS, STEPS, STEPS, 1)
            assert (report["seed"], report["images"], report["size"]) == (11, 2, [[3, 32, 32]])
            assert (report["levels"], report["computed"], report["flags"]) == (STEPS + 1, STEPS, STEPS)
            assert report["ticks"] == STEPS and report["cfg"] == (1.0 if name == "BasicGuider" else 2.0)
            for order in ("cache first", "report first"):
                assert report[order] == [4, STEPS, True, "cache, 4 chosen steps"], order


def contained(part: dict, whole: dict) -> bool:
    return {**whole, **part} == whole


def test_halves_of_a_schedule_are_one_report(run):
    found = run("run_report")["jobs"]
    assert contained({"steps": 3, "parts": 1, "levels": 4}, found["first half"])
    assert contained({**HALVES, "times": 6, "levels": 7, "seed": 11}, found["both"])
    assert contained({**HALVES, "times": 6}, found["repeated"])


def test_a_half_that_was_cached_stays_in_the_report_and_a_node_that_samples_anew_replaces_its_own(run):
    found = run("run_report")["jobs"]
    assert contained({**HALVES, "levels": 7, "job": "two"}, found["later"])
    assert contained({"parts": 2, "steps": 3 + STEPS}, found["replaced"])


def test_reports_in_a_row_and_the_report_of_sample_are_alike(run):
    found = run("run_report")["jobs"]
    assert found["names"] == ["one", "two", "own"]
    for report in found["chain"]:
        assert contained({"steps": STEPS, "times": STEPS, "parts": 1, "finished": True, "solver": "euler"}, report)


def test_two_models_that_share_the_steps_are_one_report(run):
    found = run("run_report")["jobs"]
    assert contained({**HALVES, "levels": 7, "seed": 11}, found["experts"])
    assert found["empty"] is None


def test_a_cancelled_run_says_so_and_the_next_replaces_it(run):
    found = run("run_report")["interrupted"]
    assert not found["finished"] and found["times"] in (2, 3) and found["replay"]
    assert found["words"].startswith("The run did not end.")
    assert contained({"steps": STEPS, "computed": 4, "finished": True, "parts": 1}, found["then"])


def test_nested_latents_are_measured_in_parts(run):
    for size, shapes, again, times in run("run_report")["nested"].values():
        assert size == shapes == again and times == 3


def test_another_size_than_the_model_s_own_is_in_the_report(run):
    for size, warnings in run("run_report")["sizes"].items():
        if size == "32 x 32":
            assert warnings == []
        else:
            (text,) = warnings
            assert "32 x 32" in text and f"not trained for {size}" in text


def test_a_repetition_is_no_run_to_calibrate_from(run):
    first, again = run("run_report")["calibrated"]
    assert first == again


def test_a_calibration_does_not_depend_on_it(run):
    assert run("run_report")["digests"]


# A real server


def compared(graph: Graph, *runs, shown: int = 2, **inputs) -> str:
    """Compare over (latent, report) pairs; its table is shown by PreviewAny."""
    wires = {f"images.image{i}": graph.decode(latent) for i, (latent, _) in enumerate(runs)}
    wires |= {f"reports.report{i}": report for i, (_, report) in enumerate(runs)}
    node = graph.add("QandC_Compare", **wires, shown=shown, difference_gain=4.0, **inputs)
    return graph.add("PreviewAny", source=[node[0], 1])[0]


def table(run, node: str) -> str:
    return run.outputs[node]["text"][0]


@pytest.fixture(scope="module")
def graph():
    """A reference, and a cached run of two halves, both stock samplers behind Run Report."""
    graph = Graph()
    model = graph.load()
    plain = graph.add("QandC_RunReport", model=model, label="full")
    cached = graph.cache(model)
    fast = graph.add("QandC_RunReport", model=cached, label="fast")
    settings = {**graph.wires, "noise_seed": 5, "steps": 6, "cfg": 1.5, "sampler_name": "euler", "scheduler": "normal"}

    def half(model, noise, start, end, leftover, **wires):
        return graph.add(
            "KSamplerAdvanced", model=model, **{**settings, **wires}, add_noise=noise, start_at_step=start,
            end_at_step=end, return_with_leftover_noise=leftover,
        )  # fmt: skip

    whole = half(plain, "enable", 0, 10000, "disable")
    first = half(fast, "enable", 0, 2, "enable")
    second = half(fast, "disable", 2, 10000, "disable", latent_image=first)
    names = {"cache": cached[0], "report": fast[0], "first": first[0], "second": second[0]}
    names["text"] = compared(graph, (whole, [plain[0], 1]), (second, [fast[0], 1]))
    return graph, names


def test_compare_takes_reports_of_stock_samplers_and_says_which_are_of_an_earlier_job(server: Server, graph):
    prompt, names = renewed(graph[0]), graph[1]
    first = server.succeed(prompt)
    text = table(first, names["text"])
    assert "fast: 2 sampler runs, added up" in text and "| full |" in text and "3 of 6" in text
    assert "Not the same run" not in text and "earlier job" not in text
    assert "steps computed" in first.texts[names["report"]] and "in 2 runs" in first.texts[names["report"]]
    assert (
        first.texts[names["cache"]].startswith("2 of 4 steps computed, ") and "order 0" in first.texts[names["cache"]]
    )
    prompt[names["second"]]["inputs"]["cfg"] = 2.5
    second = server.succeed(prompt)
    text = table(second, names["text"])
    assert names["first"] in second.cached
    assert "fast: 2 sampler runs" in text and "Times of an earlier job: full" in text and "cfg" not in text


def test_a_sampler_that_is_taken_out_is_no_part_of_the_report_any_more(server: Server, graph):
    prompt, names = renewed(graph[0]), graph[1]
    server.succeed(prompt)
    prompt[names["second"]]["inputs"] |= {"latent_image": graph[0].latent, "add_noise": "enable", "start_at_step": 0}
    del prompt[names["first"]]
    text = table(server.succeed(prompt), names["text"])
    assert "sampler runs" not in text and "3 of 6" in text


def test_repeats_give_a_range(server: Server, graph):
    prompt, names = renewed(graph[0]), graph[1]
    compare = prompt[names["text"]]["inputs"]["source"][0]
    prompt[compare]["inputs"] |= {"repeats": 2, "theme": "light"}
    found = server.succeed(prompt)
    text = table(found, names["text"])
    assert "range of the rounds" in text.split("| run |")[0] and "median of 2 interleaved rounds" in text
    assert found.progress[compare][-1][0] == found.progress[compare][-1][1]


def test_two_nodes_with_the_same_inputs_are_two(server: Server):
    graph = Graph()
    model = graph.load()
    reports = [graph.add("QandC_RunReport", model=model, label="alike") for _ in range(2)]
    latents = [graph.stock_sample(report, steps=steps) for report, steps in zip(reports, (3, 5))]
    text = compared(graph, *((latent, [report[0], 1]) for latent, report in zip(latents, reports)))
    found = server.succeed(graph)
    assert "steps 3, 5" in table(found, text)
    assert ["3 of 3" in found.texts[reports[0][0]], "5 of 5" in found.texts[reports[1][0]]] == [True, True]
