"""The smallest input that still shows a fault. Chapter 9."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from companion.audit.subject import BudgetSpent

Item = TypeVar("Item")


def shrink(
    items: Sequence[Item], wrong: Callable[[list[Item]], bool], *, most: int = 40
) -> list[Item]:
    """Leave out what is not needed, halves first, as long as the fault stays.

    Delta debugging without its complements (Zeller and Hildebrandt 2002,
    doi:10.1109/32.988498). Hypothesis shrinks only what it has generated itself.

    Parameters
    ----------
    items : sequence
        Token ids of a text, or texts of a batch; they show the fault.
    wrong : callable
        Whether fewer of them still show it; never asked about none.
    most : int
        Most questions. With the budget of the subject at its end none is asked any more.

    Returns
    -------
    list
        At least one item; all of them if nothing could be left out.
    """
    left, size = list(items), max(len(items) // 2, 1)
    while True:
        start, before = 0, len(left)
        while start < len(left):
            fewer = left[:start] + left[start + size :]
            if not fewer:
                break
            most -= 1
            try:
                if most < 0:
                    return left
                if wrong(fewer):
                    left = fewer
                    continue
            except BudgetSpent:
                return left
            start += size
        if size == 1 and len(left) == before:
            return left
        size = max(size // 2, 1)
