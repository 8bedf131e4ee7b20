"""Errors that name the place and the cure.

Every error that a user can cause is a :class:`CompanionError`. Its text says what is wrong, where
(file, row, field), and what to do. The command line prints it without a traceback and exits with
code 2, and so it does what :func:`system_fault` knows: a full disk, a folder that cannot be
written. Anything else that escapes is a bug in the companion and keeps its traceback.

.. code-block:: text

    CompanionError
    ├── DataError     (ValueError)    a row, a file or a dataset
    ├── ShapeError    (ValueError)    tensors whose shapes do not fit
    ├── DtypeError    (TypeError)     a tensor of the wrong kind of number
    ├── ReadoutError  (ValueError)    a model or a batch whose score would be silently wrong
    ├── ModelError    (ValueError)    a folder or a checkpoint
    ├── RunEnded      (RuntimeError)  a training run that ended before its last step
    ├── ServiceError  (RuntimeError)  a server that scores
    └── JudgeError    (RuntimeError)  a judge that cannot be asked
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import Final


class CompanionError(Exception):
    """Base of all errors that the companion raises on purpose.

    Parameters
    ----------
    what : str
        What is wrong, with the place (file, row, field) where there is one.
    cure : str, optional
        What the user can do about it. Printed on a line of its own.
    """

    def __init__(self, what: str, cure: str | None = None) -> None:
        self.what = what
        self.cure = cure
        super().__init__(what if cure is None else f"{what}\n  Cure: {cure}")


class DataError(CompanionError, ValueError):
    """A row, a file or a dataset that cannot be used as it is."""


class ShapeError(CompanionError, ValueError):
    """Tensors whose shapes do not fit; raised where PyTorch would broadcast in silence."""


class DtypeError(CompanionError, TypeError):
    """A tensor of the wrong kind of number, such as integer scores."""


class ReadoutError(CompanionError, ValueError):
    """A model or a batch whose score would be silently wrong (contract 3)."""


class ModelError(CompanionError, ValueError):
    """A folder or a checkpoint that is no usable reward model."""


class RunEnded(CompanionError, RuntimeError):
    """A training run that ended before its last step.

    Parameters
    ----------
    what, cure : str
    exit_code : int
        What the command ends with: 143 (128 + SIGTERM) if it was asked to end and has saved, 2 if
        something could not be written, 1 if another rank is gone.
    said : bool
        Another rank says it.
    """

    def __init__(self, what: str, cure: str, *, exit_code: int = 2, said: bool = False) -> None:
        super().__init__(what, cure)
        self.exit_code = exit_code
        self.said = said


class ServiceError(CompanionError, RuntimeError):
    """A server that cannot be reached, or whose answer is not what its protocol says."""


class JudgeError(CompanionError, RuntimeError):
    """A judge that cannot be asked: a server is away, a key is refused, a cache is in use."""


#: what the system says -> the cure
_CURES: Final = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "make room; the same command then goes on, or begins anew",
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "name a place that you may read and write"
    ),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG), "check the path"),
    errno.EISDIR: "name a file in it",
    errno.EMFILE: "let a process open more files: ulimit -n 4096",
}
#: how torch and the libraries in Rust tell of a file that could not be written
_WORDS: Final = ("inline_container", "basic_ios", "(os error ")


def first_line(error: BaseException) -> str:
    """What an exception says, in a line; its class, if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names in a line, sorted, the first so many, long ones cut: a file may have any columns."""
    found = sorted(map(str, names))
    shown = [name if len(name) <= 60 else f"{name[:59]}…" for name in found[:most]]
    more = [f"and {len(found) - most:,} more"] if len(found) > most else []
    return ", ".join([*shown, *more]) or "(none)"


def is_writing_fault(error: BaseException) -> bool:
    """Whether something could not be written, though it may be no ``OSError``.

    torch 2.13 raises a ``RuntimeError`` of ``inline_container.cc`` or ``basic_ios`` then,
    safetensors an error of its own, and tokenizers a plain exception with "os error 28".
    """
    return (
        isinstance(error, OSError)
        or type(error).__name__ == "SafetensorError"
        or any(word in str(error) for word in _WORDS)
    )


def system_fault(error: BaseException) -> CompanionError | None:
    """What the machine lacks, in the companion's form; None for any other exception.

    A disk that is full, a path that may not be written, memory that has ended, a database of SQLite
    that cannot be used: no bug, wherever it shows. What another exception was raised from counts.
    """
    for cause in _causes(error):
        if isinstance(cause, CompanionError):
            return cause
        if isinstance(cause, RecursionError):
            return DataError("something that was read is nested too deeply", "write it flatter")
        if isinstance(cause, MemoryError):
            what = f"the memory has ended ({first_line(cause)})"
            return CompanionError(what, "take fewer rows at a time, or a larger machine")
        if isinstance(cause, OSError) and cause.errno is not None:
            said = cause.strerror or str(cause)
            what = said if cause.filename is None else f"{_path(cause)}: {said}"
            return CompanionError(what, _CURES.get(cause.errno, "look at the disk and the path"))
        if type(cause).__module__ == "sqlite3" and type(cause).__name__ in _OF_SQLITE:
            what = f"the file of SQLite cannot be used: {first_line(cause)}"
            return CompanionError(what, "make room, or name a file that you may read and write")
        if type(cause) in (RuntimeError, Exception) and any(w in str(cause) for w in _WORDS):
            return CompanionError(f"could not be written: {first_line(cause)}", "make room")
    return None


_OF_SQLITE: Final = ("OperationalError", "DatabaseError")


def _path(error: OSError) -> str:
    name = error.filename if error.filename2 is None else error.filename2
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    own: BaseException | None = error
    while own is not None and id(own) not in seen:
        seen.add(id(own))
        yield own
        own = own.__cause__
