"""Answers on disk, so that a run that was stopped goes on and nothing is paid for twice. Chapter 3.

One JSON line an answer, appended as soon as it comes. A run that is killed may leave half a line at
the end; it is cut off and counted, and so are lines that something else damaged: those questions
are asked again. So are those whose answer, kept by an earlier version, was none: that took null for
an empty answer, and one that a filter or an ending server had cut off for a whole one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from pathlib import Path
from typing import IO, Any, Final

from filelock import FileLock, Timeout

from companion.data.writing import unwritable
from companion.errors import JudgeError
from companion.judge.backend import Answer

logger = logging.getLogger(__name__)


class AnswerCache:
    """A file of answers by key; held by one process at a time. Chapter 3.

    Parameters
    ----------
    path : str or path
        Made if it is not there, and beside it ``<path>.lock``.

    Attributes
    ----------
    n_damaged : int
        Lines that could not be read.
    n_doubted : int
        Answers of an earlier version that are none: without text, or ending within a sentence.

    Raises
    ------
    JudgeError
        If another process holds the file, or it holds something else than answers.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.n_damaged = self.n_doubted = 0
        self._answers: dict[str, Answer] = {}
        with contextlib.ExitStack() as held:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(f"{self.path}.lock", thread_local=False)
                held.enter_context(lock.acquire(timeout=0))
                self._file: IO[bytes] = held.enter_context(open(self.path, "a+b"))
            except Timeout as error:
                raise JudgeError(
                    f"{self.path}: another process is using it", "wait for it, or use another cache"
                ) from error
            except OSError as error:
                raise JudgeError(f"{self.path}: cannot be opened ({error.strerror})") from error
            self._load()
            self._held = held.pop_all()

    def _load(self) -> None:
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                self.n_damaged += 1  # torn by a kill
                break
            end += len(line)
            entry = _entry(line)
            if entry is None:
                self.n_damaged += 1
            elif entry[1] is None:
                self.n_doubted += 1
            else:
                self._answers[entry[0]] = entry[1]
        if self.n_damaged and not (self._answers or self.n_doubted) and end:
            raise JudgeError(
                f"{self.path}: holds no answers, so it is no cache", "give another file"
            )
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)
        if self.n_damaged:
            logger.warning(
                "%s: %d damaged lines are passed over; their questions are asked again",
                self.path,
                self.n_damaged,
            )
        if self.n_doubted:
            logger.warning(
                "%s: %d answers of an earlier version are none (no text, or cut off within a "
                "sentence); their questions are asked again",
                self.path,
                self.n_doubted,
            )

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        """The answer that was kept under this key."""
        return self._answers.get(key)

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer; once this returns, a killed process does not lose it."""
        self._answers[key] = answer
        entry: dict[str, Any] = {"key": key, "text": answer.text, "finished": answer.finished}
        entry["version"] = _VERSION
        if answer.probabilities is not None:
            entry["probabilities"] = list(answer.probabilities.items())
        try:
            self._file.write(json.dumps(entry, ensure_ascii=True).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def close(self) -> None:
        """Make all answers durable and let the file go."""
        if not self._file.closed:
            self._file.flush()
            with contextlib.suppress(OSError):  # a pipe or a special file
                os.fsync(self._file.fileno())
            self._held.close()

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


#: of lines whose ``finished`` says that the model ended the answer by itself
_VERSION: Final = 2
#: how an answer ends that was not cut off: with a sentence, a bracket, a number; or it is a word
_WHOLE: Final = re.compile(r"[^\w\s,;:(\[{-]\s*$|\d\s*$|^\s*\w+\s*$")


def _entry(line: bytes) -> tuple[str, Answer | None] | None:
    """Key and answer; no answer for one of an earlier version that is none."""
    try:
        value = json.loads(line)
        key, text, finished = value["key"], value["text"], value["finished"]
        pairs = value.get("probabilities")
        if not (isinstance(key, str) and isinstance(text, str) and isinstance(finished, bool)):
            return None
        probabilities = None if pairs is None else {o: float(p) for o, p in pairs}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if "version" not in value and finished and not _WHOLE.search(text):
        return key, None
    return key, Answer(text, finished, probabilities)
