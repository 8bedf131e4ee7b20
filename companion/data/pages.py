"""Pages of mapped files, which count as memory of a process once they were read. Chapter 8."""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def release_pages(*datasets: Dataset) -> None:
    """Give back what this process has read of the datasets' files.

    A pass over a large dataset leaves its whole file in the memory that a scheduler sees. What is
    read again comes from the system's cache, or the disk. pyarrow has no ``madvise``, and the rows
    may be in use, so the files' own ranges are looked up; on Linux only, elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    files = {file["filename"] for dataset in datasets for file in dataset.cache_files}
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            span, rights, *_, name = line.split(maxsplit=5)
            # never written to, and backed by the file: nothing can be lost
            if name in files and "w" not in rights:
                begin, end = (int(place, 16) for place in span.split("-"))
                ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED
                )
