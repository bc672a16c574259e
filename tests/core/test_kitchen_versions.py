"""W4A8 on several versions of comfy-kitchen side by side, each in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("programs") / "kitchen_w4a8.py"
VERSIONS = ("0.2.31", "0.2.36", "0.2.38", "0.2.40")  # the first with W4A8, with 6 bits, with packed weights, the latest


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A function from a version to a folder with its pure-Python wheel unpacked; skips where there is no registry."""
    pip = [sys.executable, "-m", "pip"] if find_spec("pip") else [shutil.which("pip")]
    if pip[0] is None:
        pytest.skip("pip is not installed")
    folder = tmp_path_factory.mktemp("kitchen")

    def unpacked(version: str) -> Path:
        command = [
            *pip, "download", "-q", "--no-deps", "--only-binary=:all:", "--platform", "any", "--implementation", "py",
            "--abi", "none", "--python-version", "3.12", "--retries", "0", "-d", folder, f"comfy-kitchen=={version}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"comfy-kitchen {version} cannot be downloaded: {done.stderr.strip()[-200:]}")
        (wheel,) = folder.glob(f"comfy_kitchen-{version}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / version)
        return folder / version

    return unpacked


@pytest.mark.parametrize("version", VERSIONS)
def test_w4a8_on_a_version(wheels, version):
    """Runs, compiles, saves and loads as comfy-kitchen itself does, and replaces nothing of it."""
    path = os.pathsep.join([str(wheels(version)), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("RESULTS ")[1])
    assert (found.pop("version"), found.pop("replaced")) == (version, [])
    assert version in found.pop("file") and found.pop("error") < 0.1
    assert found and all(value is True for value in found.values()), found
