"""The built book and one start of a browser, for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from book_pages import PAGES, ROOT

NO_CHROMIUM = (
    "NO CHROMIUM: the built pages were NOT looked at in a browser. Install one and run again: "
    "'apt-get install chromium' (as root, Debian), or '{python} -m playwright install chromium' "
    "(any system, no root), or name one: CHROMIUM=/path/to/chrome"
)


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


def find_chromium(own: str | None) -> str | None:
    """Path of a browser: ``$CHROMIUM``, one on the path, or `own`, where Playwright keeps its."""
    if named := os.environ.get("CHROMIUM"):
        return named
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    return found or (own if own and Path(own).exists() else None)


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        path = find_chromium(driver.chromium.executable_path)
        if path is None:
            pytest.skip(NO_CHROMIUM.format(python=sys.executable))
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        chromium = driver.chromium.launch(
            executable_path=path,
            args=["--no-sandbox"] if root else [],  # Chromium refuses its sandbox to root
        )
        yield chromium
        chromium.close()
