"""What a notebook's kernel runs first: collections begin after the first cell, nothing is left."""

from __future__ import annotations

import gc
import runpy
from types import SimpleNamespace

import IPython
from book_pages import BOOK


def test_collections_begin_after_the_first_cell(monkeypatch):
    found = []
    events = SimpleNamespace(
        register=lambda name, call: found.append((name, call)),
        unregister=lambda name, call: found.remove((name, call)),
    )
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(events=events))
    try:
        names = runpy.run_path(str(BOOK / "_tools" / "startup.py"))
        assert [name for name in names if not name.startswith("__")] == []
        assert not gc.isenabled()
        ((event, call),) = found
        assert event == "post_run_cell"
        call(None)
        assert gc.isenabled()
        assert found == []
    finally:
        gc.enable()
