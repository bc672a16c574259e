"""The nodes in the newest ComfyUI on the fake device, in ComfyUI's own Python."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from ..comfyui.checkouts import checkouts, missing_modules
from ..comfyui.inside_programs import install_pack
from . import fake

PROGRAM = Path(__file__).with_name("comfyui.py")


def lacking():
    if fake.guard():
        return fake.guard()
    if not checkouts():
        return "no ComfyUI checkout: set COMFYUI_PATH to one"
    python = checkouts()[0].python
    if missing_modules(python):
        return f"{python} lacks {missing_modules(python)}"
    probe = [python, "-c", "import torch; print(torch.version.cuda)"]
    built = subprocess.run(probe, capture_output=True, text=True).stdout.strip()
    return "" if built not in ("", "None") else f"{python} has torch without CUDA"


@pytest.fixture(scope="module", params=["half", "low", "pages", "refused"])
def found(request, tmp_path_factory):
    """What the program found in a mode."""
    if lacking():
        pytest.skip(lacking())
    base, newest = tmp_path_factory.mktemp(request.param), checkouts()[0]
    install_pack(base)
    command = [newest.python, str(PROGRAM), str(newest.path), str(base), request.param]
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=base, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))[8:])
    return {**results, "mode": request.param}


def test_the_device_gives_what_the_cpu_gives(found):
    """`half` and `pages` compute in float16; of quantized models codes flip as well where inputs differ in a digit."""
    exact = 0.005 if found["mode"] in ("half", "pages") else 1e-4
    assert found["device"] == "cuda:0"
    for name, distance in found["to CPU"].items():
        full_precision = name in ("plain", "cached", "lora")
        assert distance < (exact if full_precision else 0.03), name
    for name in ("paper W8A8", "native W8A8", "native W4A8"):
        assert 0 < found["to plain"][name] < 0.05, name
    assert found["to plain"]["cached"] > 0.05  # it does reuse


def test_a_lora_stays_on_a_quantized_model(found):
    for loras in ("bake in", "keep on top"):
        assert found["to lora"][f"lora {loras}"] < 0.03 < 0.05 < found["to plain"][f"lora {loras}"]


def test_a_saved_model_loads_as_it_was(found):
    assert found["reloaded"] == dict.fromkeys(("paper W8A8", "native W8A8", "native W4A8"), 0.0)


def test_dynamic_vram_pages_weights(found):
    """`refused` has some layers cast for one call, and layers that were on the device come back to it."""
    dynamic, requests, memory = found["mode"] in ("pages", "refused"), found["requests"], found["peak memory"]
    assert set(found["dynamic"].values()) == {dynamic}
    assert bool(requests.get("all")) == dynamic == (memory["paged"] > 0)
    assert bool(requests.get("refused")) == (found["mode"] == "refused")
    assert memory["reported"] == memory["allocated"] + memory["paged"]
    if found["mode"] == "pages":  # all of them are there
        assert memory["paged"] > 0.9 * memory["weights"] * 2 / 4


def test_a_cache_costs_one_wait_for_a_prediction(found):
    """To find its step, and an error budget one more for its estimate; core waits as well. The times of calls, at most
    one for each step, are read once the run has ended.
    """
    if found["mode"] in ("low", "refused"):
        pytest.skip("weights that are copied at every call")
    assert found["waits"]["cached"] <= found["waits"]["plain"] + 1.5
    assert found["waits"]["error budget"] <= found["waits"]["plain"] + 3
    assert found["waits"]["plain"] <= 4


def test_features_wait_where_the_node_says(found):
    assert found["offloaded"] == {"off": ["cuda"], "on": ["cpu"], "difference": 0.0}


def test_runs_are_recorded_on_the_device(found):
    """The image is the same to the bit, the file holds what runs elsewhere leave in it, and the host does not wait for
    statistics before the run returns. Those that do not fit beside the model are fetched at every call that is
    observed.
    """
    recorded = found["recorded"]
    assert recorded["same"] and recorded["finite"] and recorded["distances"] and recorded["layers"] > 20
    assert recorded["runs"] == 6 and recorded["measured"] == 5 and recorded["kinds"] == ["hessian", "inputs"]
    if found["mode"] not in ("low", "refused"):
        assert recorded["waits"] <= found["waits"]["plain"] + 1
    if found["mode"] == "half":  # in the others weights are brought in on the way
        assert recorded["waits until it returns"] < recorded["layers"] / 2


def test_out_of_memory_halves_the_images_at_once(found):
    """The device fails to allocate what more images take, as it does; what two at once give comes out, and nothing of
    the failed tries stays on the device.
    """
    if found["mode"] == "refused":
        pytest.skip("which weights are paged, and so the memory that is left, changes from run to run")
    halved = found["halved"]
    least, more = halved["needed"]
    assert least < more and halved["batch"] == 2 and halved["layers"] > 20
    assert halved["samples"] and halved["differ"] == [] and halved["left over"] <= 0
