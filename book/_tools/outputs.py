"""Outputs of executed notebooks, for the build of the book: ``python book/_tools/outputs.py``.

``make test`` executes each notebook once, as a test. This puts what the cells gave into the cache
in which the build looks before it executes anything itself: so the pages show what was tested. They
are still made of the Markdown sources, and what has no outputs in the cache is executed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract
from myst_nb.core.read import is_myst_markdown_notebook, read_myst_markdown_notebook

from build import MARKER
from companion.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("book", "exercises", "solutions")


def with_outputs(source: str, executed: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The notebook that the build reads from a source, with the outputs of an executed one.

    Parameters
    ----------
    source : str
        A MyST notebook.
    executed : nbformat.NotebookNode
        The same notebook, converted and executed.
    name : str
        What a message calls it.

    Raises
    ------
    DataError
        If the two have different cells, or a cell was not executed or ended in an error.
    """
    # the book's extension takes these lines out as well, before the build reads a page's cells
    notebook = read_myst_markdown_notebook(MARKER.sub("", source))
    cells, done = (
        [cell for cell in book.cells if cell.cell_type == "code"] for book in (notebook, executed)
    )
    if [cell.source for cell in cells] != [
        MARKER.sub("", f"{cell.source}\n").removesuffix("\n") for cell in done
    ]:
        raise DataError(f"{name}: the executed notebook has other cells than the source")
    for number, (cell, ran) in enumerate(zip(cells, done, strict=True), start=1):
        failed = any(output.output_type == "error" for output in ran.outputs)
        if failed or ran.execution_count != number:
            raise DataError(f"{name}: cell {number} {'failed' if failed else 'was not executed'}")
        cell.outputs, cell.execution_count = ran.outputs, number
    return notebook


def sources(root: Path = ROOT) -> list[Path]:
    """The notebooks among the pages of the book."""
    pages = (path for folder in FOLDERS for path in sorted((root / folder).glob("*.md")))
    return [path for path in pages if is_myst_markdown_notebook(path.read_text(encoding="utf-8"))]


def keep(cache: JupyterCacheAbstract, executed: Path, root: Path = ROOT) -> list[Path]:
    """Put the outputs of all executed notebooks into the cache; returns the sources.

    Parameters
    ----------
    cache : JupyterCacheAbstract
        What it held is dropped.
    executed : Path
        A folder with one ``.ipynb`` for each source, at the same place below it.
    root : Path
        The repository.
    """
    cache.clear_cache()
    found = sources(root)
    for source in found:
        name = source.relative_to(root)
        notebook = nbformat.read(executed / name.with_suffix(".ipynb"), 4)
        notebook = with_outputs(source.read_text(encoding="utf-8"), notebook, str(name))
        cache.cache_notebook_bundle(CacheBundleIn(notebook, str(source)))
    return found


def main(argv: list[str] | None = None) -> int:
    """Keep the outputs of a folder of executed notebooks. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python book/_tools/outputs.py", description=__doc__)
    parser.add_argument("executed", type=Path, help="folder of the executed .ipynb files")
    parser.add_argument("cache", type=Path, help="folder of the cache")
    args = parser.parse_args(argv)
    kept = keep(get_cache(args.cache), args.executed)
    print(f"outputs of {len(kept)} notebooks are kept for the book, in {args.cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
