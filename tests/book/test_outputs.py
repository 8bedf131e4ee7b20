"""Outputs of executed notebooks reach the build of the book, and only those that fit its cells."""

from __future__ import annotations

import nbformat
import pytest
from book_pages import ROOT
from jupyter_cache import get_cache
from myst_nb.core.read import read_myst_markdown_notebook

import outputs
from companion.errors import DataError

SOURCE = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# Title

```{code-cell} ipython3
:tags: [hide-input]
x = 1
# <solution>
x
# </solution>
```

Text.

```{code-cell} ipython3
print(2)
```
"""


def executed(*results: str) -> nbformat.NotebookNode:
    """The notebook of SOURCE as nbmake leaves it behind, with these texts as outputs."""
    notebook = read_myst_markdown_notebook(SOURCE)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, (cell, text) in enumerate(zip(cells, results, strict=False), start=1):
        cell.execution_count = number
        cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    return notebook


@pytest.fixture
def root(tmp_path):
    """A repository of one notebook and one page without cells, executed."""
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "one.md").write_text(SOURCE)
    (tmp_path / "book" / "text.md").write_text("# No notebook\n")
    (tmp_path / "done" / "book").mkdir(parents=True)
    nbformat.write(executed("a", "b"), tmp_path / "done" / "book" / "one.ipynb")
    return tmp_path


def test_the_build_finds_what_was_executed(root):
    cache = get_cache(root / "cache")
    assert outputs.keep(cache, root / "done", root) == [root / "book" / "one.md"]
    asked = read_myst_markdown_notebook(outputs.MARKER.sub("", SOURCE), add_source_map=True)
    _, merged = cache.merge_match_into_notebook(asked)
    first, second = [cell for cell in merged.cells if cell.cell_type == "code"]
    assert (first.outputs[0].text, second.outputs[0].text) == ("a", "b")
    assert first.metadata == {"tags": ["hide-input"]}  # nothing of when it ran
    assert "solution" not in first.source
    # nothing of an earlier run is left
    nbformat.write(executed("c", "d"), root / "done" / "book" / "one.ipynb")
    outputs.keep(cache, root / "done", root)
    assert len(cache.list_cache_records()) == 1
    _, merged = cache.merge_match_into_notebook(asked)
    assert merged.cells[1].outputs[0].text == "c"
    cache.db.dispose()


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match=r"x\.md: the executed notebook has other cells"):
        outputs.with_outputs(SOURCE.replace("print(2)", "print(3)"), executed("a", "b"), "x.md")
    with pytest.raises(DataError, match=r"x\.md: cell 2 was not executed"):
        outputs.with_outputs(SOURCE, executed("a"), "x.md")
    failed = executed("a", "b")
    failed.cells[1].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    with pytest.raises(DataError, match=r"x\.md: cell 1 failed"):
        outputs.with_outputs(SOURCE, failed, "x.md")


def test_the_sources_are_the_notebooks_of_the_book():
    names = {str(path.relative_to(ROOT)) for path in outputs.sources()}
    assert {"book/ch01_bradley_terry.md", "book/speed.md", "solutions/ch05_use.md"} <= names
    assert not names & {"book/index.md", "exercises/README.md"}
