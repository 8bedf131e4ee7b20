"""Copies of the notebooks to work in, made for JupyterLab: ``python book/_tools/lab.py``.

``make lab`` calls it. A chapter's copy holds the chapter's exercises too, so that nobody has to
leave the page. JupyterLab knows nothing of Sphinx: what the book's sources say through it
(references to functions and to the bibliography, numbers that a cell puts into a sentence) is
written in words that JupyterLab shows; what the copies' cells need for it lies beside them, as
``lab_helpers.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import sys
from pathlib import Path

from build import MARKER
from companion.course.catalogue import CHAPTERS
from companion.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
HELPERS = Path(__file__).with_name("lab_helpers.py")
_COMMENT = re.compile(r"<!--.*?-->\n*", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n+", re.DOTALL)
_HEADING = re.compile(r"^(#+) ", re.MULTILINE)
_CODE = re.compile(r"^```\{code-cell\}.*?^```$", re.MULTILINE | re.DOTALL)
_SLIDER = re.compile(
    r"^```\{slider-figure\} (\w+)\n(?::[^\n]*\n)*\n*(.*?)^```$", re.MULTILINE | re.DOTALL
)
_SLIDER_CELL = """```{{code-cell}} ipython3
from lab_helpers import show

show("../figures/{kind}.html")
```

{caption}"""
_SLIDER_PAGE = """<!doctype html>
<html data-theme="light"><head><meta charset="utf-8"><title>{kind}</title><style>
html {{ --pst-color-text-base: #1c2733; font-family: sans-serif; }}
{style}</style></head>
<body class="bd-content"><figure class="slider-figure">{drawing}</figure>
<script>{script}</script></body></html>
"""
_ROLE = re.compile(r"\{([a-z:]+)\}`([^`]+)`")
_GLUE = "from myst_nb import glue"


def _prose(text: str, role: str, references: dict[str, str]) -> str:
    """One role of Sphinx as plain Markdown."""
    found = re.fullmatch(r"(.+?) ?<(.+)>", text, re.DOTALL)
    title, target = (found[1], found[2]) if found else ("", text)
    if role == "glue:text":
        name, _, form = text.partition(":")
        return f'{{eval}}`glued("{name}", "{form}")`' if form else f'{{eval}}`glued("{name}")`'
    if role in ("cite", "cite:t", "cite:p"):
        cited = [references.get(key.strip(), key.strip()) for key in text.split(",")]
        return "; ".join(cited) if role == "cite:t" else f"({'; '.join(cited)})"
    if role == "doc":
        target = target if target.startswith("/") else f"/book/{target}"
        heading = re.search(
            r"^# (.+)$", (ROOT / f"{target[1:]}.md").read_text("utf-8"), re.MULTILINE
        )
        return f"[{title or (heading[1] if heading else target)}](..{target}.md)"
    if role == "numref":
        return "the figure"
    if role == "term":
        return title or target
    name = target.lstrip("~")
    return f"`{title or (name.rsplit('.', 1)[-1] if target.startswith('~') else name)}`"


def _mend(text: str, references: dict[str, str]) -> str:
    """Everything outside of code cells in JupyterLab's words."""
    parts: list[str] = []
    end = 0
    for code in _CODE.finditer(text):
        parts += [_mend_prose(text[end : code.start()], references), code.group()]
        end = code.end()
    return "".join([*parts, _mend_prose(text[end:], references)])


def _mend_prose(text: str, references: dict[str, str]) -> str:
    text = _SLIDER.sub(
        lambda found: _SLIDER_CELL.format(kind=found[1], caption=found[2].strip()), text
    )
    return _ROLE.sub(
        lambda found: (
            found.group()
            if found[1] in ("math", "eval")
            else _prose(found[2], found[1], references)
        ),
        text,
    )


def references_of(bibliography: str) -> dict[str, str]:
    """Key to 'Author (year)', linked where the entry has an address.

    Parameters
    ----------
    bibliography : str
        The text of a BibTeX file.
    """
    from pybtex.database import parse_string

    out: dict[str, str] = {}
    for key, entry in parse_string(bibliography, "bibtex").entries.items():
        people = entry.persons.get("author", [])
        names = [" ".join(p.prelast_names + p.last_names).strip("{}") for p in people]
        if len(names) > 2:
            who = f"{names[0]} et al."
        else:
            who = " and ".join(names) or str(entry.fields.get("title", key)).strip("{}")
        label = f"{who}, {entry.fields['year']}" if "year" in entry.fields else who
        fields = entry.fields
        if "eprint" in fields:
            address = f"https://arxiv.org/abs/{fields['eprint']}"
        elif "doi" in fields:
            address = f"https://doi.org/{fields['doi']}"
        else:
            address = fields.get("url", "")
        out[key] = f"[{label}]({address})" if address else label
    return out


def with_exercises(chapter: str, exercises: str, stem: str) -> str:
    """The chapter with its exercises at the end of its section *Exercises*.

    Parameters
    ----------
    chapter, exercises : str
        Two MyST notebooks.
    stem : str
        Of the chapter's file: links to the chapter become links within the page.

    Raises
    ------
    DataError
        If the chapter has no section *Exercises*.
    """
    section = re.search(r"^## Exercises\n.*?(?=^## |\Z)", chapter, re.MULTILINE | re.DOTALL)
    if section is None:
        raise DataError(f"{stem}: the chapter has no section '## Exercises'")
    body = _FRONT_MATTER.sub("", exercises)
    pieces = []
    end = 0
    for code in _CODE.finditer(body):  # a comment in a cell is no heading
        pieces += [_HEADING.sub(r"##\1 ", body[end : code.start()]), code.group()]
        end = code.end()
    body = "".join([*pieces, _HEADING.sub(r"##\1 ", body[end:])])
    body = body.replace(f"../book/{stem}.md#", "#").rstrip() + "\n\n"
    return chapter[: section.end()] + body + chapter[section.end() :]


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Path within the copy, and text, of every notebook.

    Parameters
    ----------
    root : Path
        The repository.
    """
    references = references_of((root / "book" / "references.bib").read_text(encoding="utf-8"))
    exercises = {
        stem: (root / "exercises" / f"{stem}.md").read_text(encoding="utf-8")
        for _, stem in CHAPTERS.values()
    }
    made: dict[Path, str] = {}
    for folder in ("book", "exercises", "solutions"):
        for path in sorted((root / folder).glob("ch*.md")):
            text = path.read_text(encoding="utf-8")
            if folder == "book" and path.stem in exercises:
                text = with_exercises(text, exercises[path.stem], path.stem)
            text = _COMMENT.sub("", MARKER.sub("", text))
            text = text.replace(_GLUE, "from lab_helpers import glue, glued")
            made[Path(folder) / path.name] = _mend(text, references)
    return made


def figures(root: Path = ROOT) -> dict[Path, str]:
    """Path within the copy, and text, of a page for each figure with sliders.

    Parameters
    ----------
    root : Path
        The repository; the book's own extension draws them.
    """
    place = root / "book" / "_ext" / "companion_sliders.py"
    spec = importlib.util.spec_from_file_location(place.stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[place.stem] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    static = root / "book" / "_static"
    style, script = (
        (static / name).read_text(encoding="utf-8") for name in ("companion.css", "sliders.js")
    )
    return {
        Path("figures") / f"{kind}.html": _SLIDER_PAGE.format(
            kind=kind, style=style, script=script, drawing=draw().html(f"slider-{kind}")
        )
        for kind, draw in module.DRAWINGS.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Write the copies that are missing; what a reader has changed stays. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python book/_tools/lab.py", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "lab")
    args = parser.parse_args(argv)
    for path, text in {**pages(), **figures()}.items():
        if not (args.folder / path).exists():
            (args.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (args.folder / path).write_text(text, encoding="utf-8")
    shutil.copy(HELPERS, args.folder / "book")  # no reader's file: always that of these pages
    return 0


if __name__ == "__main__":
    sys.exit(main())
