"""The door: what a package exports is imported on first use (PEP 562), with its real type.

A package names its exports once, in a block ``if TYPE_CHECKING:`` of ``from … import name as name``
(PEP 484's form for what is exported), which type checkers and editors read. At run time the block
is skipped, and :func:`exports` reads the same lines, so that ``import companion`` and ``companion
--help`` do not pay for torch and transformers. (lazy-loader reads such lines from a second file, a
stub, which hides a package's own code from mypy; a table of names beside the block would say
everything twice.)
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def exports(
    package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package, from its ``if TYPE_CHECKING:``.

    Parameters
    ----------
    package, file : str
        The package's ``__name__`` and ``__file__``.
    """
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If)).body
    places = {
        alias.name: str(node.module)
        for node in block
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with no_collection():
            value = getattr(importlib.import_module(places[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    names = sorted(places)
    return get, lambda: names, names


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection inside the block, which imports.

    torch, transformers and TRL bring a million objects; the collections on the way walk those that
    are there already, again and again, which took a fifth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
