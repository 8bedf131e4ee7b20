"""What the exercise pages may not give away, and what a lab copy may not mix up."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import jupytext
import pytest

import companion
import lab
from companion import functional
from companion.course import check
from companion.course.catalogue import BY_ID, CATALOGUE, CHAPTERS, entries_of
from companion.course.checking import load_exercise
from companion.course.exercise import Prediction

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import IDS, ROOT, path_of

COPIES = lab.pages()


def cells_of(text: str) -> list:
    return [c for c in jupytext.reads(text, fmt="md:myst").cells if c.cell_type == "code"]


def part_of(text: str, name: str) -> str:
    """The part of a notebook that belongs to one exercise."""
    start = text.index(f"## {BY_ID[name].title}\n")
    end = text.find("\n## ", start)
    return text[start : end if end > 0 else None]


# names: in a lab copy, chapter and exercises are one notebook


def bound_names(source: str) -> set[str]:
    """What a cell imports, defines or assigns at its top level, or within a block."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    names = set()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("name", IDS)
def test_a_stub_has_a_name_of_its_own(name):
    """Else a check of a cell that was not run would be given the chapter's function."""
    stub = name.split(".")[1]
    exports = {*dir(companion), *companion.__all__, *dir(functional), *functional.__all__}
    assert stub not in exports
    stem = CHAPTERS[BY_ID[name].chapter][1]
    copy = COPIES[Path("book") / f"{stem}.md"]
    makers = [cell.source for cell in cells_of(copy) if stub in bound_names(cell.source)]
    assert len(makers) == 1, f"{stub} is bound by {len(makers)} cells of the chapter's copy"
    assert "NotImplementedError" in makers[0] or ": ...," in makers[0]


def test_bound_names_are_found():
    cell = (
        "%magic\nimport a.b, c as d\nfrom e import f as g\ndef h(): pass\nfor i in x:\n    j = 1\n"
    )
    assert bound_names(cell) == {"a", "d", "g", "h", "i", "j"}


# pages: nothing of an answer shows below its question


@pytest.mark.parametrize("name", [n for n in IDS if isinstance(load_exercise(n), Prediction)])
def test_what_runs_after_a_prediction_is_folded_away_on_the_page(name):
    for folder in ("exercises", "solutions"):
        part = part_of(path_of(folder, BY_ID[name].chapter).read_text("utf-8"), name)
        run = [c for c in cells_of(part) if "print(" in c.source]
        assert run
        assert all("hide-output" in c.metadata.get("tags", []) for c in run)
    # JupyterLab does not heed the tag, so that whoever runs the cell sees what it prints
    copy = COPIES[Path("book") / f"{CHAPTERS[BY_ID[name].chapter][1]}.md"]
    assert not any("jupyter" in c.metadata for c in cells_of(copy))


@pytest.mark.parametrize("name", [n for n in IDS if isinstance(load_exercise(n), Prediction)])
def test_the_options_of_a_prediction_can_be_copied(name):
    part = part_of(path_of("exercises", BY_ID[name].chapter).read_text("utf-8"), name)
    comments = re.findall(r"((?:^ +# .+\n)+) +\"", part, re.MULTILINE)
    offered = [json.loads(f"[{re.sub('^ +# ', '', c, flags=re.MULTILINE)}]") for c in comments]
    assert offered == [list(question.options) for question in load_exercise(name).questions]


# transfer: an exercise asks for more than its section prints


def code_lines(source: str) -> list[str]:
    """Lines of code without comments, blank lines and differences of spacing."""
    bare = (re.sub(r"(^|\s+)#.*$", "", line) for line in source.splitlines())
    return [" ".join(line.split()) for line in bare if line.strip()]


def section_of(page: str, anchor: str) -> str:
    """A section with its subsections."""
    parts = re.split(r"^(##+) (.+)$", page, flags=re.MULTILINE)
    for i in range(1, len(parts), 3):
        if re.sub(r"[^\w\- ]", "", parts[i + 1].lower()).replace(" ", "-") == anchor:
            j = i + 3
            while j < len(parts) and len(parts[j]) > len(parts[i]):
                j += 3
            return "".join(parts[i:j])
    raise AssertionError(f"no section {anchor}")


def shared_lines(solution: list[str], printed: list[str]) -> list[tuple[str, ...]]:
    """Three consecutive lines of the solution, or all if it is shorter, that are printed."""
    run = min(3, len(solution))
    there = {tuple(printed[i : i + run]) for i in range(len(printed) - run + 1)}
    ours = [tuple(solution[i : i + run]) for i in range(len(solution) - run + 1)]
    return [lines for lines in ours if lines in there]


@pytest.mark.parametrize("name", IDS)
def test_a_solution_does_not_stand_in_its_section(name):
    entry = BY_ID[name]
    part = part_of(path_of("solutions", entry.chapter).read_text("utf-8"), name)
    solution = code_lines(re.search(r"# <solution>\n(.*?)# </solution>", part, re.DOTALL)[1])
    page, anchor = re.search(r"\]\(\.\./(book/\w+\.md)#([\w-]+)\)", part).groups()
    section = section_of((ROOT / page).read_text("utf-8"), anchor)
    printed = code_lines(
        "\n".join(re.findall(r"^```\{code-cell\}.*?\n(.*?)^```", section, re.M | re.S))
    )
    assert solution
    if not entry.warm_up:
        assert not shared_lines(solution, printed)


def test_shared_lines_are_found():
    printed = code_lines("a = 1\n# x\nb  =  2\nc = 3  # y\nd = 4\n")
    assert shared_lines(["z", "b = 2", "c = 3", "d = 4"], printed) == [("b = 2", "c = 3", "d = 4")]
    assert shared_lines(["c = 3"], printed) == [("c = 3",)]
    assert not shared_lines(["a = 1", "c = 3", "d = 4"], printed)


def test_a_warm_up_says_so():
    warm = [entry for entry in CATALOGUE if entry.warm_up]
    assert [entry.id for entry in warm] == ["ch01.pair_loss"]
    for entry in warm:
        assert entry.line.startswith("warm-up · ")
    for number in CHAPTERS:
        asks = [e for e in entries_of(number) if not e.warm_up]
        assert not any("warm-up" in entry.line for entry in asks)


def test_what_a_chapter_defines_by_itself_is_no_warm_up():
    """The chapters' own lines, given to the exercises that were made from them."""
    import numpy as np
    import torch

    def last_token_index(input_ids, attention_mask, eos_id):
        position = np.arange(attention_mask.shape[1])
        return torch.from_numpy((position * attention_mask.numpy()).max(axis=1))

    def best_shift(chosen, rejected, weights, target, coefficient):
        return functional.best_global_shift(chosen, rejected)

    def best_of_n_kl(probabilities, n):
        return functional.best_of_n_kl(n)

    for name, function in (
        ("ch02.last_content_index", last_token_index),
        ("ch04.weighted_shift", best_shift),
        ("ch05.best_of_few_kl", best_of_n_kl),
    ):
        assert check(name, function).outcome == "wrong"
