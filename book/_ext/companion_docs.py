"""Sphinx extension of the book: links from the reference to the chapters, and two lists.

A docstring says ``Chapter 1``; on its page in the API reference that becomes a link to the chapter,
as far as the chapter stands in the book's table of contents. The chapters link the functions in
their turn, so that the way is open in both directions. ``.. companion-exports::`` lists the
public names, ``.. companion-commands::`` the commands, both as the package has them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_CHAPTER = re.compile(r"\b(Chapter|Chapters) (\d{1,2})\b")


def chapter_documents(book: Path) -> dict[int, str]:
    """Chapter number -> document name, of the chapters in the table of contents."""
    toc = (book / "_toc.yml").read_text(encoding="utf-8")
    found = re.findall(rf"^ *- file: ({book.name}/ch(\d\d)_\w+)$", toc, re.MULTILINE)
    return {int(number): f"/{document}" for document, number in found}


def link_chapters(lines: list[str], documents: dict[int, str]) -> None:
    """Turn each ``Chapter n`` whose document exists into a link, in place."""

    def link(match: re.Match[str]) -> str:
        document = documents.get(int(match[2]))
        return match[0] if document is None else f":doc:`{match[0]} <{document}>`"

    lines[:] = [_CHAPTER.sub(link, line) for line in lines]


class _Lines(SphinxDirective):
    """Base of directives that stand for lines of reStructuredText."""

    def lines(self) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        container = nodes.container()
        content = StringList(self.lines(), source=type(self).__name__)
        self.state.nested_parse(content, self.content_offset, container)
        return container.children


class Exports(_Lines):
    """The names that ``from companion import …`` knows, by the module that defines them."""

    def lines(self) -> list[str]:
        import companion

        by_module: dict[str, list[str]] = {}
        for name, module in companion._EXPORTS.items():
            by_module.setdefault(module, []).append(name)
        return [
            f"- ``{module}``: " + ", ".join(f":py:obj:`~{module}.{name}`" for name in sorted(names))
            for module, names in by_module.items()
        ]


class Commands(_Lines):
    """The commands with their line of help."""

    def lines(self) -> list[str]:
        from companion.cli.main import COMMANDS

        return [f"- ``companion {name}``: {text}" for name, (_, text) in COMMANDS.items()]


def drop_thebe(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Take sphinx-thebe's scripts off the page.

    Jupyter Book adds them even with ``thebe: false``, each page twice, so that a constant is
    declared again (an error in the console), and they name a script on a CDN.
    """
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in f"{script}{getattr(script, 'attributes', {})}".lower()
    ]


def setup(app: Sphinx) -> dict[str, Any]:
    documents = chapter_documents(Path(__file__).resolve().parent.parent)

    def process(
        app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
    ) -> None:
        link_chapters(lines, documents)

    app.add_directive("companion-exports", Exports)
    app.add_directive("companion-commands", Commands)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
