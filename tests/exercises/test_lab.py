"""The copies that ``make lab`` opens: everything that the page needs stands in it."""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import pytest

import lab
import lab_helpers
from companion.course.catalogue import CHAPTERS, entries_of
from companion.errors import DataError

PAGES = lab.pages()
CHAPTER_PAGES = {
    number: PAGES[Path("book") / f"{stem}.md"] for number, (_, stem) in CHAPTERS.items()
}


def headings(text: str) -> list[str]:
    """Headings outside of code cells."""
    cells = jupytext.reads(text, fmt="md:myst").cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.findall(r"^#+ .+$", prose, re.MULTILINE)


@pytest.mark.parametrize("number", CHAPTER_PAGES)
def test_a_chapters_copy_holds_its_exercises_in_their_section(number: int) -> None:
    text = CHAPTER_PAGES[number]
    section = text[text.index("\n## Exercises\n") :]
    section = section[: section.index("\n## Key points")]
    for entry in entries_of(number):
        assert f'check("{entry.id}", ' in section
        assert f"#### {entry.title}\n" in section
        assert entry.line in section
    assert len([h for h in headings(text) if h.startswith("# ")]) == 1


@pytest.mark.parametrize("number", CHAPTER_PAGES)
def test_every_cell_of_chapter_and_exercises_is_in_the_copy(number: int) -> None:
    def cells(text: str) -> list[str]:
        return [
            c.source for c in jupytext.reads(text, fmt="md:myst").cells if c.cell_type == "code"
        ]

    stem = CHAPTERS[number][1]
    copied = cells(CHAPTER_PAGES[number])
    for folder in ("book", "exercises"):
        for cell in cells((lab.ROOT / folder / f"{stem}.md").read_text(encoding="utf-8")):
            assert cell.replace(lab._GLUE, "from lab_helpers import glue, glued") in copied


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_nothing_of_sphinx_and_no_marker_is_left(path: Path) -> None:
    text = PAGES[path]
    assert set(re.findall(r"\{([a-z:]+)\}`", text)) <= {"eval", "math"}
    assert "slider-figure}" not in text
    assert "<!--" not in text
    assert not re.search(r"^ *# </?(solution|only)>", text, re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_links_between_the_copies_resolve(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((\.\.?/[^)#]+|)(?:#([^)]+))?\)", PAGES[path]):
        place = (path.parent / target) if target else path
        resolved = Path(*[p for p in place.parts if p != ".."][-2:]) if target else path
        assert (lab.ROOT / resolved).exists(), target
        if anchor and resolved in PAGES:
            names = [
                re.sub(r"[^\w\- ]", "", h.lstrip("# ").lower()).replace(" ", "-")
                for h in headings(PAGES[resolved])
            ]
            assert anchor in names, (target, anchor)


def test_a_number_is_shown_after_its_cell_ran() -> None:
    assert repr(lab_helpers.glued("test-lab", ".2f")) == "…"
    lab_helpers.glue("test-lab", 1.2345)
    assert repr(lab_helpers.glued("test-lab", ".2f")) == "1.23"
    assert repr(lab_helpers.glued("test-lab")) == "1.2345"


def test_sliders_are_whole_pages(tmp_path: Path) -> None:
    pages = lab.figures()
    asked = {kind for text in PAGES.values() for kind in re.findall(r"figures/(\w+)\.html", text)}
    assert asked
    assert {Path("figures") / f"{kind}.html" for kind in asked} <= set(pages)
    for text in pages.values():
        assert not re.search(r'(src|href)="', text)  # nothing is loaded
    place = tmp_path / "figure.html"
    place.write_text('<p title="a">', encoding="utf-8")
    assert "&lt;p title=&quot;a&quot;&gt;" in lab_helpers.show(str(place)).data


def test_what_a_reader_changed_stays(tmp_path: Path) -> None:
    assert lab.main([str(tmp_path)]) == 0
    changed = tmp_path / "book" / "ch01_bradley_terry.md"
    other = tmp_path / "exercises" / "ch01_bradley_terry.md"
    changed.write_text("mine", encoding="utf-8")
    other.unlink()
    assert lab.main([str(tmp_path)]) == 0
    assert changed.read_text(encoding="utf-8") == "mine"
    assert other.exists()


def test_what_the_cells_call_lies_beside_them(tmp_path: Path) -> None:
    assert lab.main([str(tmp_path)]) == 0
    callers = {path.parent for path, text in PAGES.items() if "lab_helpers" in text}
    assert callers == {Path("book")}
    assert (tmp_path / "book" / "lab_helpers.py").read_bytes() == lab.HELPERS.read_bytes()


def test_references_have_author_year_and_address() -> None:
    bib = """@article{a, author={Bradley, Ralph and Terry, Milton}, title={T}, year={1952},
    doi={10.1/2}}
    @misc{b, author={One, A and Two, B and Three, C}, title={T}, year={2024}, eprint={2401.1}}
    @book{c, author={Luce, R. Duncan}, title={T}, year={1959}}"""
    assert lab.references_of(bib) == {
        "a": "[Bradley and Terry, 1952](https://doi.org/10.1/2)",
        "b": "[One et al., 2024](https://arxiv.org/abs/2401.1)",
        "c": "Luce, 1959",
    }


def test_a_chapter_without_the_section_is_an_error() -> None:
    with pytest.raises(DataError, match="no section"):
        lab.with_exercises("# A chapter\n", "# Exercises\n", "ch99")
