"""The book was built, executed and without a warning, into pages that need no network."""

from __future__ import annotations

import gc
import os
import re
from functools import cache

import pytest
from book_pages import BOOK, CHAPTERS, ROOT, load_module
from jupyter_cache import get_cache

import outputs

bs4 = pytest.importorskip("bs4")

extension = load_module(BOOK / "_ext" / "companion_docs.py")


@cache
def _parsed(site):
    pages = sorted((site / "book").rglob("*.html"))
    assert len(pages) >= 10
    gc.disable()  # a million tags that stay: collections on the way took most of the time
    try:
        return [(path, bs4.BeautifulSoup(path.read_text("utf-8"), "html.parser")) for path in pages]
    finally:
        gc.freeze()
        gc.enable()


def _pages(site):
    """Each page and what stands on it, read once for all tests: they change nothing."""
    yield from _parsed(site)


def test_no_notebook_was_executed_twice(site):
    """The build had the outputs of all notebooks before it began, and so added none of its own."""
    if "COMPANION_BOOK" not in os.environ:
        pytest.skip("only 'make test' executes the notebooks before it builds the book")
    cache = get_cache(site.parent / ".jupyter_cache")
    assert len(cache.list_cache_records()) == len(outputs.sources())
    cache.db.dispose()


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
    anchors = {page: {tag["id"] for tag in soup.find_all(id=True)} for page, soup in found.items()}
    for page, soup in found.items():
        for tag in soup.select("article a[href]"):
            target, _, anchor = tag["href"].partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            other = (page.parent / target).resolve() if target else page
            assert other.exists(), f"{page.name}: {tag['href']}"
            if anchor and other in found:
                assert anchor in anchors[other], f"{page.name}: {tag['href']}"


def test_numbers_in_the_prose_came_from_cells(site):
    pages = {path.name: soup for path, soup in _pages(site)}
    for chapter in CHAPTERS:
        text = chapter.read_text(encoding="utf-8")
        soup = pages[f"{chapter.stem}.html"]
        shown = soup.select(".pasted-text")
        assert len(shown) == len(re.findall(r"\{glue:text\}`", text))
        assert all(re.search(r"\d", tag.get_text()) for tag in shown)
        drawn = len(re.findall(r"^    name: fig-", text, re.MULTILINE))
        assert len(soup.select("figure img[alt]")) >= drawn >= 1


def test_tables_are_tables(site):
    for path, soup in _pages(site):
        text = "".join(
            text
            for text in soup.find_all(string=True)
            if type(text) is bs4.NavigableString and text.find_parent(["pre", "code"]) is None
        )
        assert not re.search(r"\|\s*(---|—)\s*\|", text), path.name


def test_reference_and_chapters_link_each_other(site):
    """Each function links its chapter, and the chapter links the function."""
    pages = {path.name: soup for path, soup in _pages(site)}
    anchors = {tag["id"]: tag for soup in pages.values() for tag in soup.select("dt.sig[id]")}
    links = {
        name: {a["href"].split("#")[-1] for a in soup.select("article a[href*='#companion.']")}
        for name, soup in pages.items()
    }
    documents = extension.chapter_documents(BOOK)
    count = 0
    for module, things in extension.documented(BOOK).items():
        for name, chapters in things.items():
            target = f"{module}.{name}"
            shown = {a["href"].split("/")[-1] for a in anchors[target].parent.select("dd a[href]")}
            for number in chapters & set(documents):
                chapter = documents[number].split("/")[-1] + ".html"
                assert chapter in shown, f"{target} does not link chapter {number}"
                assert target in links[chapter], f"chapter {number} does not link {target}"
                count += 1
    assert count > 100


def test_chapters_have_the_numbers_of_their_files(site):
    for number, document in extension.chapter_documents(BOOK).items():
        soup = next(s for path, s in _pages(site) if path.stem == document.split("/")[-1])
        assert soup.select_one("h1 .section-number").get_text().strip() == f"{number}."
        assert soup.select_one("h2 .section-number").get_text().startswith(f"{number}.1")
        captions = [tag.get_text() for tag in soup.select(".caption-number")]
        assert all(f" {number}." in caption for caption in captions)


def test_no_page_shows_where_it_was_built(site):
    for page, soup in _pages(site):
        assert str(ROOT) not in soup.get_text(), page.name


def test_roles_that_name_code_became_links(site):
    """What a page writes as {func}`~companion.…` leads somewhere."""
    for page, soup in _pages(site):
        dead = [
            tag.get_text()
            for tag in soup.select("article code.xref.py")
            if tag.find_parent("a") is None and tag.find_parent("dl") is None
        ]
        assert dead == [], page.name


def test_what_was_predicted_is_folded_away(site):
    """The output of "then run" stands on the page, behind a line that the reader opens."""
    for folder in ("exercises", "solutions"):
        for path in sorted((site / folder).glob("ch*.html")):
            cells = bs4.BeautifulSoup(path.read_text("utf-8"), "html.parser").select(
                ".tag_hide-output"
            )
            assert cells, path.name
            for cell in cells:
                outputs_ = cell.select(".cell_output")
                assert outputs_, path.name
                assert all(one.find_parent("details") for one in outputs_), path.name


def test_both_themes_have_their_drawings(site):
    for name in ("index", "when"):
        page = (site / "book" / f"{name}.html").read_text(encoding="utf-8")
        assert "only-light" in page
        assert "only-dark" in page
    assert (BOOK / "_static" / "companion.css").exists()
    assert (site / "_static" / "companion.css").exists()
