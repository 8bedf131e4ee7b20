"""What can be wrong with a row, said so that it can be mended.

A converter raises :class:`RowError` (reason, field, detail). The loader adds the place and keeps a
:class:`RowProblem`; the :class:`LoadReport` counts them and turns the first few into one message.
Chapter 4.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from companion.errors import DataError
from companion.layouts import LAYOUT_CURES, RowError as RowError

#: How many problems one error message shows; all are counted.
SHOWN: Final = 5

#: reason -> cure. The keys are the reasons there are; reports count by them.
CURES: Final[dict[str, str]] = {
    **LAYOUT_CURES,
    "malformed JSON": "mend the line; each line of a JSONL file is one complete JSON object",
    "malformed CSV": "quote cells that hold commas or line breaks; as many cells as the header has",
    "not a row": "write each row as an object with named fields",
    "missing field": "add the field, or rename a column to it (--columns old=new, in Python "
    "columns={'old': 'new'})",
    "wrong type": "write text as a string, or as a list of {role, content} messages",
    "mixed types": "give a field the same form in all rows of a file: all text or all messages, "
    "all numbers; or leave the column out (--columns NAME=)",
    "unknown role": "use the roles system, developer, user, assistant, tool",
    "empty completion": "leave the row out: an empty text has nothing to score",
    "chosen equals rejected": "leave the row out: equal texts hold no preference",
    "no shared prompt": "chosen and rejected must begin with the same messages, or add a prompt",
    "no valid text": "write whole characters: \\ud83d\\ude00 is one, \\ud83d alone is none",
    "margin not finite": "give a finite number, or leave the field out of all rows",
    "rating not finite": "give each completion a finite number",
    "label not bool": "write true (right) or false (wrong), or 1 and 0",
    "no ratings": "leave the row out: none of its steps has a rating",
    "not text": "leave the row out: a text model does not read images or other blocks",
    "nested too deeply": "a row's values may be nested 50 deep",
    "number too large": "write it as text; a column of numbers holds 64 bits",
    "unknown label": "write +1 (right), 0 (neutral), -1 (wrong), null (none), or true and false",
    "unknown preference": "write a, b or tie; or as the data set does (companion data --help)",
    "lengths differ": "give as many of the one as of the other",
    "several answers": "write a row for each pair: companion data convert does",
    "too few completions": "give at least two completions to rank",
    "printed messages": "write messages as JSON (pandas' to_json does); to_csv prints Python",
    "verdicts disagree": "leave out the column that is wrong (--columns winner=)",
}


@dataclass(frozen=True)
class RowProblem:
    """A :class:`RowError` with its place (``x.jsonl, line 7``)."""

    where: str
    reason: str
    field: str | None = None
    detail: str = ""

    @classmethod
    def of(cls, error: RowError, where: str) -> RowProblem:
        """The error with its place."""
        return cls(where, error.reason, error.field, error.detail)

    def as_error(self) -> DataError:
        """For who reads row by row, and stops at the first bad one."""
        return DataError(str(self), CURES[self.reason])

    def __str__(self) -> str:
        place = self.where + (f", field {self.field!r}" if self.field else "")
        return f"{place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class LoadReport:
    """What became of the rows of one source.

    Attributes
    ----------
    source, kind, layout : str
        Where the rows come from, the kind they were made into, the form they had.
    rows_read, rows_kept : int
        Rows in the source, and rows in the result. One row of the source can give several (a
        ranking gives pairs), so the difference is no count of losses.
    skipped : Counter
        Bad rows by reason; they are in the result of no load.
    left_out : Counter
        What is not wrong but gives no row: ties, equal completions of a ranking.
    notes : Counter
        What was changed on the way (``prompt text made a user message``), with the count.
    problems : list of RowProblem
        The first few bad rows.
    mix : dict or None
        Of a mixture what it was made of.
    """

    source: str
    kind: str
    layout: str = ""
    rows_read: int = 0
    rows_kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    problems: list[RowProblem] = field(default_factory=list)
    max_problems: int = SHOWN
    mix: dict[str, Any] | None = None

    @property
    def bad(self) -> int:
        """Number of rows that could not be used."""
        return sum(self.skipped.values())

    def add(self, problem: RowProblem) -> None:
        self.skipped[problem.reason] += 1
        if len(self.problems) < self.max_problems:
            self.problems.append(problem)

    def problem_lines(self) -> list[str]:
        lines = [f"  {problem}" for problem in self.problems]
        if self.bad > len(self.problems):
            lines.append(f"  … and {self.bad - len(self.problems):,} more")
        return lines

    def cures(self) -> list[str]:
        return [f"{reason}: {CURES[reason]}" for reason in self.skipped]

    def error(self) -> DataError:
        """The error of ``on_error='raise'``: the first few rows, the counts and the cures."""
        counts = ", ".join(f"{n:,} {reason}" for reason, n in self.skipped.most_common())
        head = f"{self.source}: {self.bad:,} of {self.rows_read:,} rows cannot be used ({counts})"
        cures = [*self.cures(), "or pass on_error='skip' to leave such rows out and count them"]
        return DataError("\n".join([head, *self.problem_lines()]), "\n    ".join(cures))

    def summary(self) -> str:
        """One paragraph: what was read and kept, and what was not."""
        lines = [
            f"{self.source}: {self.rows_read:,} rows read as {self.layout}, "
            f"{self.rows_kept:,} {self.kind} kept"
        ]
        for title, counter in (("skipped", self.skipped), ("left out", self.left_out)):
            lines += [f"  {title}: {n:,} {reason}" for reason, n in counter.most_common()]
        lines += [f"  note: {text} ({n:,} rows)" for text, n in self.notes.most_common()]
        return "\n".join(lines + self.problem_lines())

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for a JSON file."""
        out = {key: dict(v) if isinstance(v, Counter) else v for key, v in vars(self).items()}
        del out["max_problems"]
        if self.mix is None:
            del out["mix"]
        return out | {"problems": [str(problem) for problem in self.problems]}
