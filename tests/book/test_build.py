"""The book builds, executed and without a warning, into pages that need no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from book_pages import BOOK, CHAPTERS, ROOT

bs4 = pytest.importorskip("bs4")
JUPYTER_BOOK = Path(sys.executable).with_name("jupyter-book")

pytestmark = [
    pytest.mark.xdist_group("book"),
    pytest.mark.skipif(not JUPYTER_BOOK.exists(), reason="jupyter-book is not installed"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Root folder of the built pages."""
    output = tmp_path_factory.mktemp("book")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [str(JUPYTER_BOOK), "build", ".", "--toc", "book/_toc.yml", "--path-output", str(output),
         "--all", "-W", "--keep-going"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
    )  # fmt: skip
    log = done.stdout + done.stderr
    warnings = [line for line in log.splitlines() if "WARNING:" in line or "ERROR:" in line]
    assert done.returncode == 0, "\n".join(warnings) or log[-4000:]
    return output / "_build" / "html"


def _pages(site):
    pages = sorted((site / "book").rglob("*.html"))
    assert len(pages) >= 10
    for page in pages:
        yield page, bs4.BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


def test_pages_load_nothing_from_the_network(site):
    for page, soup in _pages(site):
        addresses = [tag.get("src") or "" for tag in soup.select("script, img, iframe, source")]
        addresses += [
            tag.get("href") or ""
            for tag in soup.select("link")
            if set(tag.get("rel") or []) & {"stylesheet", "preload", "icon", "modulepreload"}
        ]
        assert [a for a in addresses if re.match(r"(https?:)?//", a)] == [], page.name
        inline = " ".join(tag.get_text() for tag in soup.select("script:not([src])"))
        assert not re.search(r"https?://\S+\.js", inline), page.name


def test_what_the_pages_load_is_there(site):
    for page, soup in _pages(site):
        for tag in soup.select("script[src], img[src], link[rel=stylesheet]"):
            address = (tag.get("src") or tag.get("href")).split("?")[0]
            if address.startswith("data:"):
                continue
            assert (page.parent / address).exists(), f"{page.name}: {address}"
    assert (site / "_static" / "mathjax" / "tex-chtml.js").exists()


def test_links_between_pages_lead_somewhere(site):
    found = {page.resolve(): soup for page, soup in _pages(site)}
    for page, soup in found.items():
        for tag in soup.select("article a[href]"):
            target, _, anchor = tag["href"].partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            other = (page.parent / target).resolve() if target else page
            assert other.exists(), f"{page.name}: {tag['href']}"
            if anchor and other in found:
                assert found[other].find(id=anchor), f"{page.name}: {tag['href']}"


def test_numbers_in_the_prose_came_from_cells(site):
    for chapter in CHAPTERS:
        text = chapter.read_text(encoding="utf-8")
        page = site / "book" / f"{chapter.stem}.html"
        soup = bs4.BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        shown = soup.select(".pasted-text")
        assert len(shown) == len(re.findall(r"\{glue:text\}`", text))
        assert all(re.search(r"\d", tag.get_text()) for tag in shown)
        assert len(soup.select("figure img[alt]")) >= 3


def test_reference_and_chapter_link_each_other(site):
    reference = (site / "book" / "api" / "maths.html").read_text(encoding="utf-8")
    chapter = (site / "book" / "ch01_bradley_terry.html").read_text(encoding="utf-8")
    assert 'href="../ch01_bradley_terry.html"' in reference
    assert 'href="api/maths.html#companion.losses.bradley_terry_loss"' in chapter


def test_both_themes_have_their_drawings(site):
    for name in ("index", "when"):
        page = (site / "book" / f"{name}.html").read_text(encoding="utf-8")
        assert "only-light" in page
        assert "only-dark" in page
    assert (BOOK / "_static" / "companion.css").exists()
    assert (site / "_static" / "companion.css").exists()
