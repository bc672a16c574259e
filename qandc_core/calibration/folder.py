"""A folder of calibration files that several processes share: which names there are, and saving under new ones.

Saving is atomic twice over: a file is written under a temporary name and renamed, and the name that it gets is reserved
by creating it exclusively, which file systems grant to one process only.
"""

from __future__ import annotations

import os
import re
import unicodedata
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..files import is_file_name, is_portable
from .file import read_calibration_header

SUFFIX = ".safetensors"
LONGEST = 128  # bytes of a prefix; a number and the endings come after it, and file systems allow 255


def listed(folder: Path, section: str = "") -> list[str]:
    """Names of the calibration files there are: those with this section, and those that do not say what they hold."""
    try:
        found = sorted(path for path in folder.iterdir() if is_listed(path.name) and path.is_file())
        return [path.name for path in found if not section or holds(path, section)]
    except OSError:  # no folder, or one that cannot be read
        return []


def holds(path: Path, section: str) -> bool:
    state = path.stat()
    sections = sections_of(path, state.st_mtime_ns, state.st_size)
    return not sections or section in sections


@lru_cache(maxsize=4096)
def sections_of(path: Path, changed: int, size: int) -> frozenset[str]:
    """Sections of the file as it was then; none where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return frozenset(key.partition("/")[0] for key in file.keys() if "/" in key)
    except (OSError, SafetensorError):
        return frozenset()


def is_listed(name: str) -> bool:
    """True for the names that a list of calibration files can hold."""
    return name.endswith(SUFFIX) and is_file_name(name)


def named(folder: Path, name: str) -> Path:
    """The file that stands for a name somebody typed, under a name that every system can hold and that is listed."""
    stem = stem_of(name.strip().removesuffix(SUFFIX))
    return folder / (f"{stem}{SUFFIX}" if is_portable(f"{stem}{SUFFIX}") else f"calibration_{stem}{SUFFIX}")


def made_before(folder: Path, prefix: str, inputs: str) -> Path | None:
    """The newest numbered file of this prefix that was made of inputs with this digest, whatever it is of."""
    pattern = re.compile(re.escape(stem_of(prefix)) + r"(_.+)?_\d{5,}\.safetensors")
    for name in reversed(listed(folder)):
        if pattern.fullmatch(name):
            path = folder / name
            try:
                if read_calibration_header(path)["notes"].get("inputs") == inputs:
                    return path
            except (OSError, ValueError, KeyError, AttributeError):  # damaged, or of another program
                continue
    return None


def save_new(folder: Path, save: Callable[[Path], object], prefix: str, name: str | None = None) -> Path:
    """Saves under a name that no file has, and returns it: the one asked for, else the prefix's first free number.

    save(path) writes to a temporary name, which is then renamed to one that was reserved, so that processes that
    save at the same time lose nothing. Raises OSError in one sentence where the folder cannot be written.
    """
    wanted = [name] if name is not None and is_portable(name) else []
    temporary = folder / f"{stem_of(prefix)[:40]}-{uuid.uuid4().hex}.saving"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save(temporary)
        path = reserve(folder, prefix, wanted)
        try:
            os.replace(temporary, path)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error) from error
    finally:
        discard(temporary)


def reserve(folder: Path, prefix: str, wanted: list[str]) -> Path:
    """Creates an empty file: the first of the wanted names, then the prefix's numbers, that does not exist yet."""
    number = 0
    while True:
        number += not wanted
        path = folder / (wanted.pop(0) if wanted else f"{stem_of(prefix)}_{number:05}{SUFFIX}")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return path
        except FileExistsError:
            continue


def check_writable(folder: Path) -> None:
    """Raises OSError in one sentence where the folder cannot hold files, before minutes of sampling."""
    probe = folder / f"{uuid.uuid4().hex}.saving"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        discard(probe)


def discard(path: Path) -> None:
    with suppress(OSError):  # the folder may be none
        path.unlink()


def unwritable(folder: Path, error: OSError | SafetensorError) -> OSError:
    reason = getattr(error, "strerror", None) or str(error)
    return OSError(
        f"Nothing can be saved in {folder} ({reason}); free space on the disk or make the folder writable, and queue "
        "again."
    )


def stem_of(prefix: str) -> str:
    """The prefix as the beginning of a file name: letters, digits, _ and -, in at most 128 bytes."""
    stem = re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFC", prefix)).strip("_")
    return stem.encode("utf-8", "ignore")[:LONGEST].decode("utf-8", "ignore") or "calibration"
