"""Calibrate from Runs under every sampler node and guider of ComfyUI, against hooks written by hand."""

from __future__ import annotations

import pytest

from qandc_core import load_calibration

from .prompts import Graph

HALVES = "KSamplerAdvanced halves"
GUIDERS = ["BasicGuider", "CFGGuider", "DualCFGGuider", "PerpNegGuider"]
RUNS = ["KSampler", "KSampler, ancestral", HALVES, "SamplerCustom", "inpainting", *GUIDERS]
CACHES = [
    f"cache of {tier}, {first} first" for tier in ("whole prediction", "blocks") for first in ("cache", "recording")
]


@pytest.mark.parametrize("name", RUNS)
def test_any_sampler_adds_its_runs_and_gives_the_same_image(run, name):
    found = run("recording")[name]
    assert found["same"] and found["clean"] and found["unchanged"]
    assert found["runs"] == (4 if name == HALVES else 2)
    assert found["differing"] == [] and found["layers"] > 10
    assert 0 < found["samples"] == found["taken"] <= 0.1 * found["rows"] + found["runs"]
    assert found["held out"] > 0


@pytest.mark.parametrize("name", RUNS)
def test_distances_belong_to_the_schedules_that_were_run(run, name):
    found = run("recording")[name]
    assert found["distances"]
    assert found["schedules"] == ([[6, 2], [6, 2]] if name == HALVES else [[12, 2]])


def test_two_experts_make_two_calibrations(run):
    found = run("recording")["two experts"]
    assert found["same"] and found["own model"] == [True, True] and found["runs"] == [1, 1]
    assert found["samples"] == found["taken"] and found["differing"] == []
    assert found["levels"][0][1] == found["levels"][1][0] and found["levels"][1][1] == 0
    assert "holds runs of another model" in found["mixed"]


def test_an_interrupted_run_leaves_the_file_and_the_model(run):
    found = run("recording")["interrupted"]
    assert found["ended"] == "" and found["as it was"] and found["clean"] and found["again"]
    assert found["runs"] == 2 and found["files"] == ["interrupted.safetensors"]


@pytest.mark.parametrize("name", CACHES)
def test_with_a_cache_layers_are_seen_on_computed_steps(run, name):
    found = run("recording")[name]
    assert found["same"] and found["computed"] == 4
    assert found["calls"] == found["computed"] and found["samples"] == found["taken"]
    assert found["differing"] == [] and found["missing"] == "cache"


def test_runs_of_many_kinds_make_one_calibration_that_other_nodes_take(run):
    found = run("recording")["many kinds"]
    assert found["runs"] == found["again"] == found["tap"] == 8 and found["history"] == 7
    assert found["listed"] and found["held-out calls"] in (4, None)
    assert found["steps"] == 20 and [20, 5] in found["schedules"] and [10, 2] in found["schedules"]
    assert found["warnings"] == [] and found["noisy"] is False and found["detached"]
    assert found["text"].startswith("8 runs, ")
    assert "more runs would lower the error of GPTQ's rounding by about" in found["text"]


def test_what_cannot_be_recorded_is_refused_in_one_sentence(run, subtests):
    found = run("recording")["refused"]
    words = {
        "other model": "holds runs of another model",
        "other plan": "was started with hessians = True",
        "compiled": "remove torch.compile",
        "compiled later": "remove torch.compile",
        "quantized": "quantized already",
        "quantized later": "quantized already",
        "other kind": "was not made by Calibrate from Runs",
        "no layers": "nothing to calibrate",
        "memory": "allow more memory",
        "absent": "set record to on",
        "waiting": "None",
    }
    assert words.keys() - found.keys() <= {"quantized", "quantized later"}  # where Quantize has no format
    for case, said in found.items():
        with subtests.test(case):
            assert words[case] in said and said.count(". ") == 0


def test_two_models_of_a_guider_make_two_calibrations(run):
    found = run("recording")["two models in a guider"]
    if found is None:
        pytest.skip("this version has no guider with two models")
    assert found["same"] and found["differing"] == [] and found["own model"] == [True, True] and found["distances"]
    assert found["runs"] == [3, 1] and found["warned"] == []
    assert list(map(len, found["said"])) == [1, 0] and not found["none"]


def test_a_run_is_added_beside_what_comes_next(run):
    assert run("recording")["beside"] == {"same": True, "runs": 4}


def test_the_built_in_model_is_recorded_with_its_last_layers(run):
    found = run("recording")["built-in"]
    assert found["same"] and found["sampler"] == "ddpm" and found["layers"] > 20


def test_queues_add_runs_until_record_is_off_and_the_calibration_quantizes(server):
    """While it records, what needs the calibration waits; the same seed again is no new run."""

    def queue(seed, record=True):
        graph = Graph()
        model = graph.load()
        inputs = {"samples": 8, "hessians": True, "memory_gb": 1.0, "tokens": 256, "held_out": 4, "reset": 0}
        recorder = graph.add("QandC_CalibrateFromRuns", model=model, name="queued", record=record, **inputs)
        image = graph.save(graph.stock_sample(recorder, seed=seed))
        quantized = graph.picture(graph.quantize(model, [recorder[0], 1]), seed=seed)
        return server.succeed(graph), image, quantized

    for seed in (1, 2, 2, 3):
        run, image, quantized = queue(seed)
        assert image in run.outputs and quantized not in run.outputs
    run, image, quantized = queue(4, record=False)
    assert image in run.outputs and quantized in run.outputs
    assert load_calibration(server.calibrations / "queued.safetensors").recording.runs == 3
