"""Memory of the process that a command has to itself."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT, MAPPED = 2**30, 2**28  # bytes


def keep_freed_memory() -> None:
    """Has glibc keep up to 1 GiB of freed memory, which it otherwise returns after every layer and pages in anew.

    Does nothing where the C library has no mallopt. The setting is the whole process's, so a library must not make it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED)
        mallopt(M_TRIM_THRESHOLD, KEPT)
