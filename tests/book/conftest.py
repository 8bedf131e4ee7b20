"""One build of the book and one start of a browser, for all tests of this folder.

The tests that use them share one group of pytest-xdist, so that one process does both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from book_pages import ROOT

JUPYTER_BOOK = Path(sys.executable).with_name("jupyter-book")
NO_CHROMIUM = (
    "NO CHROMIUM: the built pages were NOT looked at in a browser. Install one and run again: "
    "'apt-get install chromium' (as root, Debian), or '{python} -m playwright install chromium' "
    "(any system, no root), or name one: CHROMIUM=/path/to/chrome"
)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Root folder of the built pages."""
    if not JUPYTER_BOOK.exists():
        pytest.skip("jupyter-book is not installed")
    output = tmp_path_factory.mktemp("book")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [str(JUPYTER_BOOK), "build", ".", "--toc", "book/_toc.yml", "--path-output", str(output),
         "--all", "-W", "--keep-going"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={
            **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "COMPANION_PROGRESS_FILE": "",
        },
    )  # fmt: skip
    log = done.stdout + done.stderr
    warnings = [line for line in log.splitlines() if "WARNING:" in line or "ERROR:" in line]
    assert done.returncode == 0, "\n".join(warnings) or log[-4000:]
    return output / "_build" / "html"


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
