"""What the tests of this folder share: the repository's pages and the commands on them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
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
    ]
)

_BLOCK = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


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
