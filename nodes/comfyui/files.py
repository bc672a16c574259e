"""Where calibration files live: the folder `qandc` in ComfyUI's output folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

NEW = "new"


def calibration_folder() -> Path:
    return Path(folder_paths.get_output_directory(), "qandc")


def calibration_files() -> list[str]:
    """The choice `new`, then the files there are."""
    return [NEW, *sorted(path.name for path in calibration_folder().glob("*.safetensors"))]


def calibration_path(name: str) -> Path:
    """A file of the folder. Raises ValueError on anything that is not a plain file name."""
    if not re.fullmatch(r"[\w .()+-]+\.safetensors", name) or name.startswith("."):
        raise ValueError(f"{name!r} is not the name of a calibration file; pick one from the list, or {NEW!r}.")
    return calibration_folder() / name


def next_path(prefix: str) -> Path:
    """The first free numbered name."""
    stem, number = stem_of(prefix), 1
    while (path := calibration_folder() / f"{stem}_{number:05}.safetensors").exists():
        number += 1
    return path


def partial_path(prefix: str, digest: str) -> Path:
    """Where an interrupted calibration of the inputs with this digest goes on; not listed."""
    return calibration_folder() / f"{stem_of(prefix)}-{digest}.partial"


def stem_of(prefix: str) -> str:
    return re.sub(r"[^\w-]+", "_", prefix).strip("_") or "calibration"


def file_state(name: str) -> str:
    """Changes when the named file does, so that ComfyUI runs the node again."""
    if name == NEW:
        return NEW
    path = calibration_folder() / Path(name).name
    if not path.is_file():
        return f"{name} absent"
    status = os.stat(path)
    return f"{name} {status.st_mtime_ns} {status.st_size}"
