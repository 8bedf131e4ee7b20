"""Sphinx extension of the book: links from the reference to the chapters, and two lists.

A docstring says ``Chapter 1``; on its page in the API reference that becomes a link to the chapter,
as far as the chapter stands in the book's table of contents. A function whose docstring names none
belongs to the chapter that its module's docstring names, and gets that link. The other way round,
each chapter gets a section before its references that links all that is documented as belonging to
it, so that the way is open in both directions and no list is kept by hand.

``.. companion-exports::`` lists the public names, ``.. companion-commands::`` the commands,
``.. companion-chapter:: 1`` what belongs to a chapter, all as the package has them.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

BOOK = Path(__file__).resolve().parent.parent
_CHAPTER = re.compile(r"\b(Chapter|Chapters) (\d{1,2})\b")
#: the section that each chapter gets, and the heading that it stands before
OWN_SECTION = """## In the companion

What the package has on the matter of this chapter, made from the docstrings that name it.

```{{companion-chapter}} {number}
```

"""
BEFORE = "## References\n"
#: lines of the solved notebooks that tell `book/_tools/build.py` what to leave out
MARKER = re.compile(r"^ *# </?(?:solution|only)>\n", re.MULTILINE)


def chapter_documents(book: Path) -> dict[int, str]:
    """Chapter number -> document name, of the chapters in the table of contents.

    Of several pages of one chapter the first is meant.
    """
    toc = (book / "_toc.yml").read_text(encoding="utf-8")
    found = re.findall(rf"^ *- file: ({book.name}/ch(\d\d)_\w+)$", toc, re.MULTILINE)
    return {int(number): f"/{document}" for document, number in reversed(found)}


def chapters_named(text: str | None) -> set[int]:
    """Numbers of the chapters that a docstring names."""
    return {int(number) for _, number in _CHAPTER.findall(text or "")}


def chapters_of(thing: Any) -> set[int]:
    """Chapters of a function or class: those that it names, or else those that its module names."""
    return chapters_named(thing.__doc__) or chapters_named(inspect.getmodule(thing).__doc__)


def documented_modules(book: Path) -> list[str]:
    """Names of the modules on the reference's pages, in their order: the faces of the package."""
    pages = sorted((book / "api").glob("*.md"))
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    return re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE)


@cache
def documented(book: Path) -> dict[str, dict[str, set[int]]]:
    """Face -> the functions and classes that it exports -> their chapters."""
    found = {}
    for face in documented_modules(book):
        module = importlib.import_module(face)
        # a face exports what its room defines; `companion.errors` has no list, and defines its own
        public = getattr(module, "__all__", [key for key in vars(module) if key[0] != "_"])
        things = ((key, getattr(module, key)) for key in public)
        found[face] = {
            key: chapters_of(thing)
            for key, thing in things
            if (inspect.isfunction(thing) or inspect.isclass(thing))
            and thing.__module__.startswith(face)
            and thing.__doc__
        }
    return found


def link_chapters(lines: list[str], documents: dict[int, str]) -> None:
    """Turn each ``Chapter n`` whose document exists into a link, in place."""

    def link(match: re.Match[str]) -> str:
        document = documents.get(int(match[2]))
        return match[0] if document is None else f":doc:`{match[0]} <{document}>`"

    lines[:] = [_CHAPTER.sub(link, line) for line in lines]


def name_chapter(thing: Any, lines: list[str]) -> None:
    """Let a function or class that names no chapter name that of its module, in place."""
    if inspect.getmodule(thing) is not None and not chapters_named("\n".join(lines)):
        numbers = sorted(chapters_of(thing))
        if numbers:
            lines += ["", ", ".join(f"Chapter {number}" for number in numbers) + ".", ""]


def add_section(book: Path, document: str, source: list[str]) -> None:
    """Put the chapter's section before its references, in place; other pages stay as they are."""
    numbers = {name.removeprefix("/"): number for number, name in chapter_documents(book).items()}
    if document in numbers:
        section = OWN_SECTION.format(number=numbers[document])
        source[0] = source[0].replace(f"\n{BEFORE}", f"\n{section}{BEFORE}", 1)


def hide_markers(document: str, source: list[str]) -> None:
    """Take the marks of what an exercise leaves open out of a solved notebook, in place."""
    if document.startswith("solutions/"):
        source[0] = MARKER.sub("", source[0])


#: what a page asks of its reader, by estimate and not by trial
WORDS_A_MINUTE, LINES_A_MINUTE = 120, 15
_FENCE = re.compile(
    r"^(?P<fence>```+|:::+)(?P<what>[^\n]*)\n(?P<body>.*?)^(?P=fence) *$", re.M | re.S
)


def reading_minutes(source: str) -> int:
    """Minutes to read a page in MyST: its words and its lines of code, to the next five.

    Code that is hidden does not count, nor do options of a cell and what is in a picture.
    """
    code = 0

    def take(match: re.Match[str]) -> str:
        nonlocal code
        what, body = match["what"], match["body"]
        if what.startswith(("{code-cell}", "bash", "python", "text")):
            hidden = re.search(r"^(:tags:|tags:).*(hide-input|hide-cell|remove-)", body, re.M)
            body = re.sub(r"\A---\n.*?^---\n", "", body, flags=re.M | re.S)
            lines = [x for x in body.splitlines() if x.strip() and not x.startswith(":")]
            code += 0 if hidden else len(lines)
            return ""
        if what.startswith(("{image}", "{figure}", "{math}")):
            return ""
        return _FENCE.sub(take, body)

    text = _FENCE.sub(take, re.sub(r"\A---\n.*?^---\n", "", source, flags=re.M | re.S))
    text = re.sub(r"^\$\$.*?^\$\$", "", text, flags=re.M | re.S)
    minutes = len(re.findall(r"[^\W\d_]{2,}", text)) / WORDS_A_MINUTE + code / LINES_A_MINUTE
    return 5 * math.ceil(minutes / 5)


def reading_time(
    name: str, rawtext: str, text: str, lineno: int, inliner: Any, *_: Any
) -> tuple[list[nodes.Node], list[Any]]:
    """The role ``{reading-time}`minutes```: the :func:`reading_minutes` of its page."""
    env = inliner.document.settings.env
    source = Path(env.doc2path(env.docname)).read_text(encoding="utf-8")
    return [nodes.Text(f"{reading_minutes(source)} {text}")], []


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
    """The names that ``from companion import …`` knows, by the room that has more."""

    def lines(self) -> list[str]:
        import companion

        places = {
            name: face for face, things in documented(BOOK).items() for name in reversed(things)
        }
        by_face: dict[str, list[str]] = {}
        for name in companion.__all__:
            by_face.setdefault(places[name], []).append(name)
        return [
            f"- :py:mod:`{face}`: " + ", ".join(f":py:obj:`~{face}.{name}`" for name in names)
            for face, names in sorted(by_face.items())
        ]


class Chapter(_Lines):
    """What belongs to a chapter, by the module that defines it. For MyST pages."""

    required_arguments = 1

    def lines(self) -> list[str]:
        number = int(self.arguments[0])
        found = {
            face: [name for name, chapters in things.items() if number in chapters]
            for face, things in documented(BOOK).items()
        }
        return [
            f"- {{py:mod}}`{module}`: "
            + ", ".join(f"{{py:obj}}`~{module}.{name}`" for name in names)
            for module, names in found.items()
            if names
        ]


class Commands(_Lines):
    """The commands with their line of help."""

    def lines(self) -> list[str]:
        from companion.cli.main import COMMANDS

        return [f"- ``companion {name}``: {text}" for name, (_, text) in COMMANDS.items()]


def find(target: str) -> Any:
    """The module, function, class or attribute of a dotted name; None if there is none."""
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            thing = getattr(thing, part, None)
        return thing
    return None


def documented_name(target: str) -> str | None:
    """Where a name of the package is documented: in the face that exports it, or its class."""
    parts = target.split(".")
    for cut in range(len(parts), 1, -1):
        thing = find(".".join(parts[:cut]))
        for face, things in documented(BOOK).items():
            for name in things:
                if find(f"{face}.{name}") is thing:
                    return ".".join([face, name, *parts[cut:]])
    return None


def resolve_exported(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.Element | None:
    """Lead a link to where its name is documented.

    Docstrings name things by the module that has them, pages by a face. What no face exports is
    internal, has no page, and stays plain text; a name that is not there at all is a warning.
    """
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("companion"):
        return None
    name = documented_name(target)
    if name is not None and name != target:
        domain = env.get_domain("py")
        found = domain.resolve_xref(
            env, node["refdoc"], app.builder, node["reftype"], name, node, contnode
        )
        if found is not None:
            return found
    return None if find(target) is None else contnode


def number_chapters(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Give each chapter the number of its file, whatever its place in the table of contents.

    Sphinx counts the chapters that there are. Docstrings, links and exercises name them by their
    numbers, so a chapter that is still to come must not shift those behind it.
    """
    for number, path in chapter_documents(BOOK).items():
        document = path.removeprefix("/")
        for table in (
            env.toc_secnumbers.get(document, {}),
            *env.toc_fignumbers.get(document, {}).values(),
        ):
            table.update({key: (number, *place[1:]) for key, place in table.items() if place})
        numbered = [env.titles[document], *env.tocs[document].findall(nodes.reference)]
        for node in numbered:
            if node.get("secnumber"):
                node["secnumber"] = (number, *node["secnumber"][1:])
    return []


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
    documents = chapter_documents(BOOK)

    def process(
        app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
    ) -> None:
        if what in ("function", "class", "exception"):
            name_chapter(obj, lines)
        link_chapters(lines, documents)

    def short_signature(
        app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, back: Any
    ) -> tuple[str | None, Any]:
        # a configuration inherits over a hundred fields; its page lists those of its own
        long = what == "class" and signature is not None and signature.count(": ") > 40
        return ("(**fields)" if long else signature), back

    app.add_role("reading-time", reading_time)
    app.add_directive("companion-exports", Exports)
    app.add_directive("companion-commands", Commands)
    app.add_directive("companion-chapter", Chapter)
    app.connect("source-read", lambda app, document, source: add_section(BOOK, document, source))
    app.connect("source-read", lambda app, document, source: hide_markers(document, source))
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", short_signature)
    app.connect("missing-reference", resolve_exported)
    app.connect("env-get-updated", number_chapters, priority=900)  # after Sphinx has counted
    return {"parallel_read_safe": True, "parallel_write_safe": True}
