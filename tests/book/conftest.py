"""The built book, for all tests of this folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from book_pages import PAGES, ROOT
from chromium import browser as browser


@pytest.fixture(scope="session")
def site() -> Path:
    """Root folder of the built pages, which ``make test`` and ``make book`` build beforehand.

    In ``make test`` a book that was not built is a failure, elsewhere the tests skip.
    """
    named = os.environ.get("COMPANION_BOOK")
    build = Path(named or ROOT / "build")
    stamp = build / ".stamp-pages"
    if named and not stamp.exists():
        pytest.fail("a notebook or the book's build failed: see the output above", pytrace=False)
    if not named:
        newest = max([*PAGES, ROOT / "_config.yml"], key=lambda path: path.stat().st_mtime)
        if not stamp.exists() or stamp.stat().st_mtime < newest.stat().st_mtime:
            pytest.skip(f"no built pages, or older than {newest.name}: run 'make book'")
    return build / "_build" / "html"
