"""What the tests of this folder share: the repository's pages and the commands on them."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
CHAPTERS = sorted(BOOK.glob("ch[0-9][0-9]_*.md"))
#: everything that a reader reads
PAGES = sorted(
    [
        ROOT / "README.md",
        *BOOK.rglob("*.md"),
        *(ROOT / "exercises").glob("*.md"),
        *(ROOT / "solutions").glob("*.md"),
        *(ROOT / "recipes").glob("*.md"),
    ]
)

_BLOCK = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def load_module(path: Path) -> ModuleType:
    """Import a file that lies in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Command(NamedTuple):
    """One command of a page."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands_of(text: str, page: str = "page") -> list[Command]:
    """The commands of all shell blocks, continued lines joined, comments and prompts dropped."""
    found = []
    for block in _BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                found.append(Command(page, tuple(words)))
    return found


def inline_commands(text: str) -> list[tuple[str, ...]]:
    """Commands of several words in the running text: code spans that are no role."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"(?<![}`])`((?:companion|make|python|accelerate|torchrun) [^`]*)`", prose)
    return [tuple(span.split()) for span in spans]


def all_commands() -> list[Command]:
    """The commands of every page."""
    return [
        command
        for path in PAGES
        for command in commands_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]


def companion_arguments(words: tuple[str, ...]) -> list[str] | None:
    """What follows ``companion``, however it is started; None if the command is another one."""
    if Path(words[0]).name == "companion":
        return list(words[1:])
    for index in range(len(words) - 1):
        if words[index : index + 2] == ("-m", "companion"):
            return list(words[index + 2 :])
    return None
