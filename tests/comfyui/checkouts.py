"""The ComfyUI checkouts that the tests start, and the Python of each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

FLOOR = (0, 18, 1)
VERSION = re.compile(r"""__version__\s*=\s*["'](\d+)\.(\d+)\.(\d+)""")
# What ComfyUI and this pack import; a Python that lacks one of them cannot start the server.
REQUIREMENTS = (
    "torch",
    "torchvision",
    "aiohttp",
    "einops",
    "av",
    "safetensors",
    "transformers",
    "sklearn",
    "diffusers",
)
PROBE = "import importlib.util, sys; print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])"


@dataclass(frozen=True)
class Checkout:
    path: Path
    version: tuple[int, ...]

    @property
    def name(self) -> str:
        return ".".join(map(str, self.version))

    @property
    def python(self) -> str:
        chosen = os.environ.get("COMFYUI_PYTHON")
        found = [self.path / folder / "bin" / "python" for folder in (".venv", "venv")]
        return chosen or next((str(path) for path in found if path.exists()), sys.executable)


@cache
def checkouts() -> list[Checkout]:
    """Those of $COMFYUI_PATH, or of the home folder; the newest first."""
    listed = os.environ.get("COMFYUI_PATH")
    paths = map(Path, listed.split(os.pathsep)) if listed else Path.home().glob("ComfyUI*")
    found = [
        Checkout(path.resolve(), version_of(path / "comfyui_version.py"))
        for path in paths
        if (path / "main.py").is_file() and (path / "comfyui_version.py").is_file()
    ]
    return sorted(found, key=lambda checkout: checkout.version, reverse=True)


def version_of(file: Path) -> tuple[int, ...]:
    return tuple(map(int, VERSION.search(file.read_text(encoding="utf-8")).groups()))


@cache
def missing_modules(python: str) -> str:
    run = subprocess.run([python, "-c", PROBE, *REQUIREMENTS], capture_output=True, text=True, check=True)
    return run.stdout.strip().replace(" ", ", ")


def parameters(old: bool = False) -> list:
    """A pytest parameter for every checkout the nodes support, or for every `old` one; skips say what is lacking.

    With $COMFYUI_REQUIRED, as in CI, a supported checkout that is lacking or cannot start is an error.
    """
    wanted = [name for name in os.environ.get("QANDC_COMFYUI_VERSIONS", "").split(",") if name]
    chosen = [c for c in checkouts() if (c.version < FLOOR) == old and (not wanted or c.name in wanted)]
    if not chosen:
        return [skipped(None, no_checkout(old, wanted), "none", required() and not old)]
    return [parameter(checkout) for checkout in chosen]


def is_wanted_in_full(checkout: Checkout) -> bool:
    """Whether long programs run on it: the newest and the oldest supported one do, others where they are asked for."""
    supported = [c for c in checkouts() if c.version >= FLOOR]
    return bool(os.environ.get("QANDC_COMFYUI_VERSIONS")) or checkout in (supported[0], supported[-1])


def no_checkout(old: bool, wanted: list[str]) -> str:
    age = f"older than {'.'.join(map(str, FLOOR))}" if old else f"of version {'.'.join(map(str, FLOOR))} or newer"
    among = f" among {', '.join(wanted)}" if wanted else ""
    return f"no ComfyUI checkout {age}{among}: set COMFYUI_PATH to one, or to several with {os.pathsep!r} between"


def parameter(checkout: Checkout):
    missing = missing_modules(checkout.python)
    if missing:
        reason = f"ComfyUI {checkout.name} cannot import its requirements: {checkout.python} lacks {missing}"
        return skipped(checkout, reason, checkout.name, required())
    return pytest.param(checkout, id=checkout.name)


def required() -> bool:
    return bool(os.environ.get("COMFYUI_REQUIRED"))


def skipped(checkout: Checkout | None, reason: str, name: str, needed: bool):
    if needed:
        raise pytest.UsageError(reason)
    return pytest.param(checkout, marks=pytest.mark.skip(reason=reason), id=name)
