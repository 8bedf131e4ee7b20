"""Figures as text, for a terminal and for reports. Chapter 4."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def percent(value: float | None) -> str:
    """A share in percent; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}%"


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many digits; a dash for None and NaN."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def interval(pair: Sequence[float] | None, as_percent: bool = False) -> str:
    """`` [low, high]``, with the space before it; nothing for None."""
    if pair is None:
        return ""
    low, high = (100 * v if as_percent else v for v in pair)
    return f" [{low:.1f}, {high:.1f}]" if as_percent else f" [{low:.3f}, {high:.3f}]"


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
