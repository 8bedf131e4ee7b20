"""Calls that take a while, from code that runs an event loop: in a thread, which ends if cancelled.

Chapter 6.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

#: Set when whoever awaits the call of this thread has given up.
_STOP: ContextVar[threading.Event | None] = ContextVar("stop", default=None)
#: Seconds between two looks at it while a server is waited for.
_LOOK = 0.05


class Stopped(Exception):
    """Raised in the thread of a call that nobody waits for any more."""


async def in_thread(
    call: Callable[..., T],
    *arguments: Any,
    executor: Executor | None = None,
    progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> T:
    """Await ``call(*arguments, progress=…, **settings)``, run in a thread of `executor`.

    `progress` is called in the loop's thread. If the awaiting task is cancelled, a call that has
    not begun never begins; one that runs ends the next time it reports progress, or at once where
    it waits in :func:`wait_for`.
    """
    loop, stop = asyncio.get_running_loop(), threading.Event()

    def moved(n: int) -> None:
        if stop.is_set():
            raise Stopped
        if progress is not None:
            loop.call_soon_threadsafe(progress, n)

    def run() -> T:
        _STOP.set(stop)
        return call(*arguments, progress=moved, **settings)

    context = contextvars.copy_context()
    try:
        return await loop.run_in_executor(executor, lambda: context.run(run))
    except asyncio.CancelledError:
        stop.set()
        raise


def wait_for(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, from code that is none; what :func:`in_thread` stops, it cancels.

    In a thread whose event loop runs (a notebook's), it runs in a thread beside it.
    """
    stop = _STOP.get() or threading.Event()
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_until(stop, coroutine))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, _until(stop, coroutine))
        try:
            return future.result()
        except BaseException:  # Ctrl-C: the thread must not wait for the server
            stop.set()
            raise


async def _until(stop: threading.Event, coroutine: Coroutine[Any, Any, T]) -> T:
    task = asyncio.create_task(coroutine)
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK))[0]:
            if stop.is_set():
                raise Stopped
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
