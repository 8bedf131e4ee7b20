"""Headless Chromium for tests that look at pages, and what they ask of each page."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

NO_CHROMIUM = (
    "NO CHROMIUM: the pages were NOT looked at in a browser. Install one and run again: "
    "'apt-get install chromium' (as root, Debian), or '{python} -m playwright install chromium' "
    "(any system, no root), or name one: CHROMIUM=/path/to/chrome"
)


def find_chromium(own: str | None) -> str | None:
    """Path of a browser: ``$CHROMIUM``, one on the path, or `own`, where Playwright keeps its."""
    if named := os.environ.get("CHROMIUM"):
        return named
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    return found or (own if own and Path(own).exists() else None)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium.

    It ends with the file: while Playwright runs, its thread has an event loop, and tests of other
    files could not start one.
    """
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


def watch(page):
    """Lists that fill as the page is used: its console, its requests, those that failed."""
    console, requests, failed = [], [], []
    page.on("console", lambda m: console.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: console.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.on("requestfailed", lambda request: failed.append(request.url))
    return console, requests, failed


def axe(page, contrast):
    """What axe calls critical or serious, with the first element."""
    library = pytest.importorskip("axe_playwright_python.sync_playwright")
    rules = {
        "label-content-name-mismatch": {"enabled": True},
        "color-contrast": {"enabled": contrast},
    }
    options = {"rules": rules, "resultTypes": ["violations"]}
    return [
        f"{found['id']}: {found['nodes'][0]['html'][:120]}"
        for found in library.Axe().run(page, options=options).response["violations"]
        if found["impact"] in ("critical", "serious")
    ]


@contextmanager
def opened(browser: Any, url: str, *, width: int = 1200, scheme: str = "light") -> Iterator[Any]:
    """A page, its requests and its console; it ends in no error and asked no other host."""
    view = {"width": width, "height": 900}
    with browser.new_context(viewport=view, color_scheme=scheme) as context:
        page = context.new_page()
        page.set_default_timeout(30_000)
        console, requests, failed = watch(page)
        page.goto(url + "/")
        yield page, console
        assert {urlsplit(one).netloc for one in requests} <= {urlsplit(url).netloc, ""}, requests
        assert failed == []
