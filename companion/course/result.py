"""What a check says, as text for a terminal and as HTML for a notebook."""

from __future__ import annotations

import html
import re
import textwrap
from dataclasses import dataclass, field
from typing import Literal

from companion.course.catalogue import BY_ID
from companion.course.exercise import THREADS

Outcome = Literal["not attempted", "wrong", "right", "hint"]

_SIGN = {"not attempted": "○", "wrong": "✗", "right": "✓", "hint": "?"}
# Okabe and Ito's colours: told apart without red and green, and the sign says the same
_COLOUR = {"not attempted": "#808080", "wrong": "#D55E00", "right": "#009E73", "hint": "#0072B2"}


@dataclass
class CheckResult:
    """Outcome of a check. True if the answer is right.

    Attributes
    ----------
    exercise : str
        Its id.
    outcome : {"not attempted", "wrong", "right", "hint"}
    message : str
        The misconception, or the word of praise, or what there is to do.
    evidence : str
        What was seen: input, result, what it should be.
    thread : str or None
        The upstream bug that the attempt rebuilds, a key of ``THREADS``.
    properties : list of (str, bool or None)
        What was checked, and whether it holds; None if it was not reached.
    hint : str
        The hint that was asked for.
    notes : list of str
        Anything else, such as progress that could not be kept.
    """

    exercise: str
    outcome: Outcome
    message: str
    evidence: str = ""
    thread: str | None = None
    properties: list[tuple[str, bool | None]] = field(default_factory=list)
    hint: str = ""
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.outcome == "right"

    @property
    def _head(self) -> str:
        words = {"wrong": "not right yet", "hint": "hint"}.get(self.outcome, self.outcome)
        return f"{_SIGN[self.outcome]} {BY_ID[self.exercise].title}: {words}"

    def __str__(self) -> str:
        lines = [self._head]

        wrap = textwrap.TextWrapper(
            88, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )

        def add(text: str, first: str = "  ") -> None:
            for number, part in enumerate(text.splitlines()):
                wrap.initial_indent = first if number == 0 else "  "
                lines.append(wrap.fill(part))

        if self.message:
            add(self.message)
        if self.evidence:
            add(self.evidence, "  Seen: ")
        if self.thread:
            thread = THREADS[self.thread]
            add(f"{self.thread} ({thread.about}): {thread.address}", "  Upstream: ")
        lines += [f"    {_mark(name, good)}" for name, good in self.properties]
        if self.hint:
            add(self.hint, "  Hint: ")
        for note in self.notes:
            add(note)
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def paragraph(text: str, lead: str = "") -> str:
            body = "<br>".join(_marked(line) for line in text.splitlines())
            return f"<p style='margin:.3em 0'>{lead}{body}</p>" if text else ""

        parts = [
            paragraph(self.message),
            paragraph(self.evidence, "<em>Seen:</em> "),
        ]
        if self.thread:
            thread = THREADS[self.thread]
            # its colour is that of the text: a page's own link colour may not suit a dark theme
            link = (
                f"<a style='color:inherit;text-decoration:underline' "
                f"href='{html.escape(thread.address)}'>{html.escape(self.thread)}</a>"
            )
            told = f"<em>Upstream:</em> {link} ({html.escape(thread.about)})"
            parts.append(f"<p style='margin:.3em 0'>{told}</p>")
        if self.properties:
            items = "".join(
                f"<li>{_marked(_mark(name, good))}</li>" for name, good in self.properties
            )
            parts.append(f"<ul style='list-style:none;padding-left:1em;margin:.3em 0'>{items}</ul>")
        parts.append(paragraph(self.hint, "<em>Hint:</em> "))
        parts += [paragraph(note) for note in self.notes]
        colour = _COLOUR[self.outcome]
        return (
            f"<div style='border-left:4px solid {colour};padding:.2em 0 .2em .8em'>"
            f"<strong>{_marked(self._head)}</strong>{''.join(parts)}</div>"
        )


def _mark(name: str, good: bool | None) -> str:
    if good is None:
        return f"· {name} (not reached)"
    return f"{'✓' if good else '✗'} {name}"


def _marked(text: str) -> str:
    """Escape, and show what stands in backticks as code and between asterisks as emphasis."""
    pieces = html.escape(text).split("`")
    for place, piece in enumerate(pieces):
        if place % 2 and place + 1 < len(pieces):
            pieces[place] = f"<code>{piece}</code>"
        else:
            pieces[place] = re.sub(r"\*(\w[^*]*)\*", r"<em>\1</em>", piece)
    return "".join(pieces)
