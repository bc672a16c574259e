"""Recognizes files of class-conditional DiTs by their list of tensors: a few kilobytes, whatever the size.

What makes the kind is the table of class embeddings. Its name ends alike in the published layout, in diffusers' and in
all our formats, none of which quantizes it; models that read text have no such table.
"""

from __future__ import annotations

import os
import zipfile
from functools import lru_cache
from pathlib import Path

from ..files import PICKLES, SAFETENSORS

CLASS_TABLE = b"embedding_table.weight"
LONGEST_LIST = 2**26  # bytes; a header of safetensors may claim any length
LEGACY = 2**22  # where torch.save before 1.6 keeps the names, ahead of the values


def may_be_dit(path: str | os.PathLike[str]) -> bool:
    """True if the file holds a DiT, perhaps a damaged one; False for what cannot be opened."""
    try:
        status = os.stat(path)
        return lists_class_table(os.fspath(path), status.st_mtime_ns, status.st_size)
    except OSError:
        return False


@lru_cache(maxsize=2**14)
def lists_class_table(path: str, mtime_ns: int, size: int) -> bool:
    """`mtime_ns` and `size` tell versions of one file apart. Raises OSError, which is not remembered."""
    ending = Path(path).suffix
    if ending in SAFETENSORS:
        return CLASS_TABLE in safetensors_header(path)
    return ending in PICKLES and CLASS_TABLE in pickled_names(path)


def safetensors_header(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), LONGEST_LIST))


def pickled_names(path: str) -> bytes:
    """The bytes that hold a state dict's names; nothing is unpickled."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            return file.read(LEGACY)
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
            return b"".join(archive.open(entry).read(LONGEST_LIST) for entry in inside[:1])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError):
        return b""
