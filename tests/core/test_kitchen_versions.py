"""Grouped formats on several versions of comfy-kitchen side by side, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kitchens import unpacked

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("programs") / "kitchen_grouped.py"
VERSIONS = ("0.2.31", "0.2.36", "0.2.38", "0.2.40")  # the first with W4A8, with 6 bits, with packed weights, the latest
SINCE = {"W6A8": "0.2.36", "W4A8": "0.2.31"}


@pytest.mark.parametrize("version", VERSIONS)
def test_grouped_formats_on_a_version(tmp_path, version):
    """Runs, compiles, saves and loads as comfy-kitchen itself does, and replaces nothing of it."""
    path = os.pathsep.join([str(unpacked(version, tmp_path)), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("RESULTS ")[1])
    assert (found.pop("version"), found.pop("replaced")) == (version, [])
    assert version in found["file"]
    for format, result in found["formats"].items():
        assert result.pop("error") < 0.1
        assert result and all(value is True for value in result.values()), (format, result)
    lacking = [name for name, since in SINCE.items() if VERSIONS.index(version) < VERSIONS.index(since)]
    assert found["formats"].keys() == SINCE.keys() - set(lacking) and list(found["refused"]) == lacking
    for format, sentence in found["refused"].items():
        assert sentence.startswith(f"{format} needs comfy-kitchen {SINCE[format]} or newer, this is {version}; ")
        assert sentence.endswith(", or choose W8A8.")
