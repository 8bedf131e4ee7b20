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
        finished, lock = threading.Event(), threading.RLock()
        thread = threading.get_ident()

        def watch() -> None:
            wait = self.seconds - self.used
            while not finished.wait(wait):
                with lock:
                    if not finished.is_set():
                        _raise_in(thread, TooLong)
                wait = _AGAIN

        started = time.monotonic()
        self._running = True
        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            # the exception may be on its way while the call ends: take it back, or catch it here
            while self._running:
                with contextlib.suppress(TooLong), lock:
                    finished.set()
                    _raise_in(thread, None)
                    self._running = False
            self.used += time.monotonic() - started


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Raise this in another thread as soon as it runs Python code; None takes it back."""
    raised = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)
