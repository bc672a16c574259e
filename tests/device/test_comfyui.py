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


@pytest.mark.parametrize("mode", ["half", "low"])
def test_nodes_run_on_a_device(mode, tmp_path):
    """`low` leaves weights on the host, as where the model does not fit: all layers are cast at every call."""
    if lacking():
        pytest.skip(lacking())
    install_pack(tmp_path)
    newest = checkouts()[0]
    command = [newest.python, str(PROGRAM), str(newest.path), str(tmp_path), mode]
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))[8:])
    assert found["device"] == "cuda:0" and found["finite"]
    assert found["offloaded"] == {"off": ["cuda"], "on": ["cpu"], "difference": 0.0}
    assert found["paper"] < 0.05 and found["native"] < 0.05
    if mode == "half":  # core waits as well; a cache adds one wait for each prediction, to find its step
        assert found["waits"]["cached"] <= found["waits"]["plain"] + 1
        assert found["waits"]["plain"] <= 4
