"""Figures as text, for a terminal and for reports. Chapter 4."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def percent(value: float | None, ends: Sequence[float] | None = None) -> str:
    """A share in percent, with its interval if there is one; a dash for None."""
    shown = "–" if value is None else f"{100 * value:.1f}%"
    return shown if ends is None else shown + interval([100 * end for end in ends], 1)


def number(value: float | None, ends: Sequence[float] | None = None, digits: int = 3) -> str:
    """A figure with so many digits, and its interval if there is one; a dash for None and NaN."""
    shown = "–" if value is None or value != value else f"{value:.{digits}f}"
    return shown + interval(ends, digits)


def interval(ends: Sequence[float] | None, digits: int = 3) -> str:
    """`` [low, high]``, with the space before it; nothing for None."""
    return "" if ends is None else f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned text table: first column left, the others right."""
    table = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([line(table[0]), rule, *(line(row) for row in table[1:])])
