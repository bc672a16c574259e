"""Versions of comfy-kitchen side by side: its pure-Python wheels, for the PYTHONPATH of a process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

WANTED = "QANDC_KITCHEN"


@cache
def wanted() -> Path | None:
    """A folder with the comfy-kitchen of $QANDC_KITCHEN, a version or a folder; None: the one of ComfyUI's Python."""
    named = os.environ.get(WANTED)
    if not named or Path(named, "comfy_kitchen").is_dir():
        return Path(named).resolve() if named else None
    return unpacked(named, Path(tempfile.mkdtemp(prefix="kitchen-")))


def unpacked(version: str, folder: Path) -> Path:
    """A folder below `folder` with the wheel of this version unpacked; skips the test where there is no registry."""
    pip = [sys.executable, "-m", "pip"] if find_spec("pip") else [shutil.which("pip")]
    if pip[0] is None:
        pytest.skip("pip is not installed")
    command = [
        *pip, "download", "-q", "--no-deps", "--only-binary=:all:", "--platform", "any", "--implementation", "py",
        "--abi", "none", "--python-version", "3.12", "--retries", "0", "-d", folder, f"comfy-kitchen=={version}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"comfy-kitchen {version} cannot be downloaded: {done.stderr.strip()[-200:]}")
    (wheel,) = folder.glob(f"comfy_kitchen-{version}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / version)
    return folder / version
