"""Cold starts: the bundle's files are dropped from the page cache, and the kernel is asked whether they are gone.

`posix_fadvise(POSIX_FADV_DONTNEED)` is advice: it leaves pages that are dirty, that another process has mapped, and all
of a file system in memory. So each file is flushed first, and `mincore(2)` counts what stayed. A load is called cold
only where nearly nothing did; else the reason is told. No privilege is needed, and no other file is touched, so
Python's own libraries stay warm.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from edgetune.memory import format_mib

MOST_RESIDENT = 0.01  # of the bytes; the kernel may read an edge ahead


def drop_from_cache(files: Iterable[Path]) -> str | None:
    """Drop these files from the page cache; why that is impossible here, or None where they are gone."""
    if not hasattr(os, "posix_fadvise"):
        return "this system has no posix_fadvise to drop files from the page cache"
    files = list(files)
    try:
        for file in files:
            _drop(file)
        total = sum(file.stat().st_size for file in files)
        left = sum(map(resident_bytes, files))
    except OSError as error:
        return f"the files cannot be dropped from the page cache: {error.strerror}"
    if left <= max(MOST_RESIDENT * total, mmap.PAGESIZE * len(files)):
        return None
    return (
        f"{format_mib(left)} of {format_mib(total)} stay in memory after posix_fadvise: the file system keeps its "
        f"files in memory (tmpfs), or another process has them mapped"
    )


def _drop(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def resident_bytes(file: Path) -> int:
    """Bytes of a file that are in the page cache, in whole pages. Raises OSError where the kernel does not tell."""
    size = file.stat().st_size
    if not size:
        return 0
    num_pages = -(-size // mmap.PAGESIZE)
    pages = (ctypes.c_ubyte * num_pages)()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        try:
            mincore = ctypes.CDLL(None, use_errno=True).mincore
            failed = mincore(address, ctypes.c_size_t(size), pages)
        except AttributeError:  # a libc without it
            raise OSError(0, "this system has no mincore") from None
        finally:
            del view  # or the mapping could not be closed
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return mmap.PAGESIZE * int((np.frombuffer(bytes(pages), np.uint8) & 1).sum())
