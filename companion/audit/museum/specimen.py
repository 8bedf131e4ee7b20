"""A specimen: one bug, planted in a small sound model, server, script or set of rows. Chapter 9."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Planted:
    """What to audit.

    Attributes
    ----------
    target : str
        A folder, or the URL of a server that runs.
    data : Path or None
        Pairs for ``--data``.
    against : Path or None
        Rows for ``--against``.
    trust_remote_code : bool
        The folder's own code is to run.
    protocol : str or None
        Of a server, where it is to be named.
    model : Path or None
        Of a server, the folder of what it runs, for ``--model``.
    """

    target: str
    data: Path | None = None
    against: Path | None = None
    trust_remote_code: bool = False
    protocol: str | None = None
    model: Path | None = None


@dataclass(frozen=True)
class Specimen:
    """A bug that others met, made to stand still.

    Attributes
    ----------
    name : str
    story : str
        Where it comes from and what it does, in one or two sentences.
    threads : tuple of str
        Addresses of the upstream threads.
    caught_by : str
        Name of the check that must find it.
    plant : callable
        Takes an empty folder, gives a context in which the bug is there; a server stops with it.
    also : tuple of str
        Further checks that rightly find the same bug.
    """

    name: str
    story: str
    threads: tuple[str, ...]
    caught_by: str
    plant: Callable[[Path], AbstractContextManager[Planted]]
    also: tuple[str, ...] = ()
