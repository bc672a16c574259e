"""The folder of calibration files, `qandc` in ComfyUI's output folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import folder_paths

from ...qandc_core.calibration import folder as shared
from .quantize.names import model_name

NEW = "new"


def calibration_folder() -> Path:
    return Path(folder_paths.get_output_directory(), "qandc")


def calibration_files(section: str = "") -> list[str]:
    """The choice `new`, then the files with the section, statistics or variance, or all."""
    return [NEW, *shared.listed(calibration_folder(), section)]


def calibration_path(name: str) -> Path:
    """A file of the folder. Raises ValueError on anything that is not a plain file name."""
    if not shared.is_listed(name):
        raise ValueError(f"{name!r} is not the name of a calibration file; pick one from the list, or {NEW!r}.")
    return calibration_folder() / name


def named_path(name: str) -> Path:
    """The file of a calibration that somebody named, under a name that every system can hold."""
    return shared.named(calibration_folder(), name)


def made_before(prefix: str, inputs: str) -> Path | None:
    """The newest numbered file of this prefix that was made of inputs with this digest."""
    return shared.made_before(calibration_folder(), prefix, inputs)


def save_new(save: Callable[[Path], object], prefix: str, name: str = NEW, of=None) -> Path:
    """Saves under the name asked for, else under the prefix, the model `of` which it is, the date and the next number,
    whichever no file has, and returns the path.
    """
    dated = prefix if of is None else f"{prefix}_{model_name(of)}_{time.strftime('%Y-%m-%d')}"
    return shared.save_new(calibration_folder(), save, dated, None if name == NEW else name)


def check_writable() -> None:
    """Raises OSError in one sentence where nothing can be saved, before minutes of sampling."""
    shared.check_writable(calibration_folder())


def partial_path(prefix: str, digest: str) -> Path:
    """File of an interrupted calibration of the inputs with this digest; not listed."""
    return calibration_folder() / f"{shared.stem_of(prefix)}-{digest[:16]}.partial"


def file_state(name: str) -> str:
    """Changes when the named file does, so that ComfyUI runs the node again."""
    if name == NEW:
        return NEW
    try:
        status = os.stat(calibration_path(name))
    except (OSError, ValueError):
        return f"{name} absent"
    return f"{name} {status.st_mtime_ns} {status.st_size}"
