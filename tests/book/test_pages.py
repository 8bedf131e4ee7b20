"""Links, anatomy and figures of the pages; what needs a built book is in test_build.py."""

from __future__ import annotations

import pkgutil
import re

import pytest
from book_pages import BOOK, CHAPTERS, PAGES, ROOT, load_module

import companion

_LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_DIRECTIVE_FILE = re.compile(r"^```\{(?:image|figure)\} (\S+)", re.MULTILINE)
_SECTIONS = ("At scale", "Exercises", "Key points", "Pitfalls", "References", "Break it on purpose")


def local_links(text: str) -> list[str]:
    """Targets of links and images that are no URL, without their anchors."""
    prose = _CODE.sub("", text)
    targets = [a or b for a, b in _LINK.findall(prose)] + _DIRECTIVE_FILE.findall(text)
    return [
        target.split("#")[0]
        for target in targets
        if not re.match(r"[a-z]+:|#", target) and target.split("#")[0]
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    missing = [
        target
        for target in local_links(page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not missing


def test_links_are_found():
    text = '[a](x.md#b) ![c](d.svg) <img src="e.svg"> [f](https://g.h) `[no](i)`\n'
    assert local_links(text) == ["x.md", "d.svg", "e.svg"]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_has_its_parts(chapter):
    text = chapter.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [name for name in _SECTIONS if not any(h.startswith(name) for h in headings)] == []
    assert ":class: chapter-card" in text
    assert re.search(r"https://github\.com/\S+/(issues|pull)/\d+", text), "no upstream thread"
    cells = "".join(re.findall(r"^```\{code-cell\}.*?^```", text, re.MULTILINE | re.DOTALL))
    assert "from companion" in cells
    assert cells.count("assert") >= 10


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_glued_names_are_made_and_used(chapter):
    """A number that is glued but not shown, or shown but not glued, is a slip."""
    text = chapter.read_text(encoding="utf-8")
    made = re.findall(r"\bglue\(\s*f?\"([^\"]+)\"", text)
    used = set(re.findall(r"\{glue:[a-z]+\}`([^:`]+)", text))
    assert len(made) == len(set(made))
    # a name that a loop makes holds a {…}, which may be anything
    patterns = [re.sub(r"\\\{.*?\\\}", r"[\\w-]+", re.escape(name)) for name in made]
    unused = [p for p in patterns if not any(re.fullmatch(p, name) for name in used)]
    assert unused == []
    assert [name for name in used if not any(re.fullmatch(p, name) for p in patterns)] == []


def test_chapters_stand_in_the_table_of_contents():
    toc = (BOOK / "_toc.yml").read_text(encoding="utf-8")
    assert [path.stem for path in CHAPTERS if f"file: book/{path.stem}\n" not in toc] == []


def test_every_room_stands_in_the_reference():
    rooms = {
        module.name
        for module in pkgutil.iter_modules(companion.__path__, "companion.")
        if not module.name.startswith(("companion._", "companion.cli"))
    }
    pages = "".join(path.read_text(encoding="utf-8") for path in (BOOK / "api").glob("*.md"))
    listed = re.findall(r"^\.\. automodule:: (\S+)$", pages, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == rooms, "add the room to, or take it from, its page in book/api/"


def test_drawings_are_those_that_the_code_draws():
    drawn = load_module(BOOK / "figures" / "draw.py").drawings()
    assert len(drawn) == 8
    stale = [
        name
        for name, svg in drawn.items()
        if (BOOK / "figures" / name).read_text(encoding="utf-8") != svg
    ]
    assert not stale, "run 'make figures'"


def test_docstrings_link_the_chapters_that_exist():
    extension = load_module(BOOK / "_ext" / "companion_docs.py")
    documents = extension.chapter_documents(BOOK)
    assert documents[1] == "/book/ch01_bradley_terry"
    lines = ["See Chapter 1, and Chapter 99.", "chapter 1 in passing"]
    extension.link_chapters(lines, documents)
    assert lines == [
        "See :doc:`Chapter 1 </book/ch01_bradley_terry>`, and Chapter 99.",
        "chapter 1 in passing",
    ]


#: what every chapter uses, so that none is its home
_OF_ALL = ("companion.errors", "companion.course")


def test_every_public_name_has_its_chapter():
    extension = load_module(BOOK / "_ext" / "companion_docs.py")
    found = extension.documented(BOOK)
    assert sum(map(len, found.values())) > 150
    homeless = [
        f"{module}.{name}"
        for module, things in found.items()
        for name, chapters in things.items()
        if not chapters and not module.startswith(_OF_ALL)
    ]
    assert homeless == [], "name its chapter in the docstring, or in that of its module"


def test_reading_time_is_that_of_words_and_shown_code():
    reading_minutes = load_module(BOOK / "_ext" / "companion_docs.py").reading_minutes
    cell = "```{code-cell} ipython3\n%s" + "x = 1\n" * 75 + "```\n"
    assert reading_minutes("word " * 600) == 5
    assert reading_minutes("word " * 601) == 10
    assert reading_minutes(cell % "") == 5
    assert reading_minutes("---\nkernelspec: words words\n---\n" + cell % "" + "word\n") == 10
    hidden = (":tags: [hide-input]\n\n", "---\ntags: [hide-cell]\nmystnb:\n  figure: a b\n---\n")
    for options in hidden:
        assert reading_minutes(cell % options) == 0
    exercise = "````{exercise} A\n:label: b\n" + "word " * 590 + "\n" + cell % "" + "````\n"
    assert reading_minutes(exercise) == 10
    assert reading_minutes("$$\n" + "word " * 900 + "\n$$\n") == 0


def test_a_function_without_a_chapter_takes_that_of_its_module():
    extension = load_module(BOOK / "_ext" / "companion_docs.py")
    from companion.functional import last_token_index

    lines = ["Index of the last token."]
    extension.name_chapter(last_token_index, lines)
    assert "Chapter 2." in lines
    lines = ["Chapter 5."]
    extension.name_chapter(last_token_index, lines)
    assert lines == ["Chapter 5."]


def test_a_chapter_gets_its_section_before_its_references():
    extension = load_module(BOOK / "_ext" / "companion_docs.py")
    source = ["# Title\n\n## References\n\n- one\n"]
    extension.add_section(BOOK, "book/ch01_bradley_terry", source)
    assert re.search(r"companion-chapter\} 1\n```\n\n## References\n\n- one\n$", source[0])
    other = ["# Title\n\n## References\n"]
    extension.add_section(BOOK, "book/when", other)
    assert other == ["# Title\n\n## References\n"]


def test_no_registry_host_is_written_down():
    """Where packages come from is the business of whoever installs, not of this repository."""
    names = ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run")
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in names)
    assert "://" not in text
    assert "+cpu" not in text.replace("(`+cpu`)", "").replace("2.13.0+cpu and", "")
