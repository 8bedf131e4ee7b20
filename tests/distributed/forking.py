"""Programs that start with what pytest has imported already.

A fresh interpreter takes five seconds of torch, transformers, datasets and TRL, and each rank of
each program takes them again. So one process, the *stem*, is forked from pytest when all tests are
collected and none has run; each rank is forked from the stem. It is a process of its own with the
environment, arguments and output it would have, and no test has left anything in it. What it lacks
are imports from nothing and the end of an interpreter: each command has a test with a real start.

The ranks are waited for, by the stem, and the stem by pytest, so that their time is seen.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import runpy
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Program:
    """``python *arguments``, with these variables on top; standard output and error to a file."""

    arguments: list[str]
    environment: dict[str, str]
    output: str


_stem: tuple[Any, Connection] | None = None


def start_stem() -> None:
    """Fork the stem; to be called once, before any test runs."""
    global _stem
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(here, there))
    with warnings.catch_warnings():
        # Python 3.12 on: a thread of xdist's runs; it holds no lock that the stem would take
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    there.close()
    _stem = process, here
    atexit.register(end_stem)


def end_stem() -> None:
    """Let the stem end, and wait for it."""
    global _stem
    if _stem is not None:
        process, connection = _stem
        _stem = None
        connection.close()
        process.join()


def run_forked(
    programs: Sequence[Program], *, seconds: float, patience: float = 0.0
) -> list[int | None]:
    """Run the programs side by side; their exit codes, as ``subprocess`` has them.

    `patience` seconds after one has failed, or after `seconds`, the others are killed: they may
    wait for it.
    """
    assert _stem is not None, "no test of this run is marked as distributed"
    _stem[1].send((list(programs), seconds, patience))
    return list(_stem[1].recv())


def _serve(theirs: Connection, own: Connection) -> None:
    """The stem: run what is asked for until pytest ends or hangs up."""
    theirs.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, which pytest gets too
    with contextlib.suppress(EOFError):
        while True:
            programs, seconds, patience = own.recv()
            fork = multiprocessing.get_context("fork")
            started = [fork.Process(target=_become, args=(program,)) for program in programs]
            for process in started:
                process.start()
            end = time.monotonic() + seconds
            while any(process.exitcode is None for process in started):
                if any(process.exitcode for process in started):
                    end, patience = min(end, time.monotonic() + patience), float("inf")
                if time.monotonic() >= end:
                    break
                time.sleep(0.05)
            for process in started:
                process.kill()
                process.join()
            own.send([process.exitcode for process in started])


def _become(program: Program) -> None:
    """A rank: leave behind what is pytest's, and be the program."""
    out = os.open(program.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = os.fdopen(1, "w", 1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", closefd=False)
    warnings.resetwarnings()
    logging.getLogger().handlers.clear()
    os.environ.update(program.environment)
    sys.path[:0] = program.environment.get("PYTHONPATH", "").split(os.pathsep)
    first, *rest = program.arguments
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program.arguments
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
