"""Pages of mapped files, which count as memory of a process once they were read. Chapter 8."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from datasets import Dataset

Item = TypeVar("Item")

#: Rows of a pass after which its pages are given back: some tens of MB.
_ROWS: Final = 50_000


def sparing(items: Iterable[Item], dataset: Any = None, *, rows: int = 1) -> Iterator[Item]:
    """The items of a pass over a dataset, of so many rows each; its pages go back on the way.

    Without a `dataset` the items are its rows; of rows that lie in no file nothing is given back.
    """
    whole = items if dataset is None else dataset
    for place, item in enumerate(items, 1):
        yield item
        if place * rows % _ROWS < rows and hasattr(whole, "cache_files"):
            release_pages(whole)


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
