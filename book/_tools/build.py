"""Write the exercise notebooks from the solved ones: ``python book/_tools/build.py``.

``solutions/*.md`` are the source. In them

* what stands between ``# <solution>`` and ``# </solution>`` in a cell becomes the stub: a line that
  raises NotImplementedError, the script with the bugs, or the open questions of a prediction;
* what stands between ``# <only>`` and ``# </only>`` in a cell, or between ``<!-- solution -->`` and
  ``<!-- /solution -->`` in the text, is left out;
* what stands between ``<!-- exercise`` and ``/exercise -->`` shows in the exercise alone.

The markers themselves do not show in the solved notebook's results, and the stub's script comes
from the exercise's own ``broken`` function, so that what the tests diagnose is what readers get.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
import textwrap
from pathlib import Path

from companion.course.catalogue import CHAPTERS
from companion.course.checking import load_exercise
from companion.course.exercise import Prediction
from companion.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
_CELL = re.compile(r"^```\{code-cell\}.*?^```$", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^( *)# <solution>\n.*?^ *# </solution>\n", re.MULTILINE | re.DOTALL)
_ONLY = re.compile(r"(?:(?<=\n)\n)?^ *# <only>\n.*?^ *# </only>\n", re.MULTILINE | re.DOTALL)
_PROSE = re.compile(r"<!-- solution -->\n.*?<!-- /solution -->\n\n?", re.DOTALL)
_SHOWN = re.compile(r"<!-- exercise\n(.*?)/exercise -->\n", re.DOTALL)
_NAME = re.compile(r"^def (\w+)\(|^(\w+) = \{$", re.MULTILINE)
#: lines that show in no page and no copy
MARKER = re.compile(r"^ *# </?(?:solution|only)>\n", re.MULTILINE)
#: of a line of options, which stands indented by 4
COMMENT_WIDTH = 72
NOT_YET = "raise NotImplementedError  # your code here"
BUGS = "raise NotImplementedError  # delete this line when you have mended the bugs below"


def _body(function: object) -> str:
    """Source of a function's body, without indentation."""
    source = textwrap.dedent(inspect.getsource(function))  # type: ignore[arg-type]
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.FunctionDef)
    lines = source.splitlines()[definition.body[0].lineno - 1 :]
    kept = [re.sub(r"  # type: ignore\S*$", "", line) for line in lines]
    return textwrap.dedent("\n".join(kept))


def stub_of(exercise_id: str) -> str:
    """What stands in the exercise where the solution stood, without indentation."""
    exercise = load_exercise(exercise_id)
    if isinstance(exercise, Prediction):
        lines = []
        for question in exercise.questions:
            # JSON's quotes are double ones, and leave an apostrophe within a text alone
            rows = ["#"]
            for one in question.options:
                option = json.dumps(one, ensure_ascii=False)
                if len(f"{rows[-1]} {option},") > COMMENT_WIDTH:
                    rows.append("#")
                rows[-1] += f" {option},"
            options = "\n".join(rows).removesuffix(",")
            lines.append(f'{options}\n"{question.key}": ...,')
        return "\n".join(lines)
    if exercise.broken is not None:
        return f"{BUGS}\n{_body(exercise.broken)}"
    return NOT_YET


def to_exercise(text: str, chapter: int) -> str:
    """The exercise notebook of a solved one.

    Raises
    ------
    DataError
        If a solution stands in a cell that defines no exercise.
    """

    def mend(found: re.Match[str]) -> str:
        cell = re.sub(r"^(```.*\n)\n+", r"\1", _ONLY.sub("", found.group()))
        block = _BLOCK.search(cell)
        if block is None:
            return cell
        names = [a or b for a, b in _NAME.findall(cell[: block.start()])]
        if not names:
            raise DataError(f"chapter {chapter}: a solution in a cell without a function or dict")
        stub = stub_of(f"ch{chapter:02d}.{names[-1]}")
        return _BLOCK.sub(lambda _: textwrap.indent(stub, block.group(1)) + "\n", cell, count=1)

    return _CELL.sub(mend, _SHOWN.sub(r"\1", _PROSE.sub("", text)))


def exercises(root: Path = ROOT) -> dict[Path, str]:
    """Path and text of every exercise notebook, made from the solutions."""
    made = {}
    for chapter, (_, stem) in CHAPTERS.items():
        source = (root / "solutions" / f"{stem}.md").read_text(encoding="utf-8")
        made[root / "exercises" / f"{stem}.md"] = to_exercise(source, chapter)
    return made


def main(argv: list[str] | None = None) -> int:
    """Write them; with ``--check`` only say which are out of date. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python book/_tools/build.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if any is stale")
    args = parser.parse_args(argv)
    stale = []
    for path, text in exercises().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not args.check:
                path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{'out of date' if args.check else 'written'}: {path.relative_to(ROOT)}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
