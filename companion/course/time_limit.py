"""Ends an attempt that does not end by itself: in any thread, on any platform."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator

#: How often the end is asked for again: an attempt may swallow it with a bare ``except``.
_AGAIN = 0.25


class TooLong(BaseException):
    """The attempt has used up its time. Not an ``Exception``, which attempts may catch."""


class TimeLimit:
    """Time that all calls of one attempt may take together.

    Parameters
    ----------
    seconds : float
        Wall time.

    Notes
    -----
    A second thread raises :class:`TooLong` in the one that runs the attempt. A signal would reach
    the main thread alone, and not on Windows. Either way, a single long call of a library (a
    sleep, a product of huge matrices) ends first.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.used = 0.0
        self._running = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what runs inside; a call within a call is counted once.

        Raises
        ------
        TooLong
            If the time is used up.
        """
        if self._running:
            yield
            return
        if self.used >= self.seconds:
            raise TooLong
        finished = threading.Event()
        thread = threading.get_ident()

        def watch() -> None:
            wait = self.seconds - self.used
            while not finished.wait(wait):
                _raise_in(thread)
                wait = _AGAIN

        started = time.monotonic()
        self._running = True
        threading.Thread(target=watch, daemon=True).start()
        try:
            try:
                yield
            finally:
                finished.set()
        finally:
            finished.set()  # once more: the exception may arrive within the line above
            self._running = False
            self.used += time.monotonic() - started


def _raise_in(thread: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TooLong))
