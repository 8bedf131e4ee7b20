"""Run the checks on a subject. Chapter 9."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from companion.audit.outcome import Check, Level, Outcome, not_asked
from companion.audit.subject import BudgetSpent, Subject

#: Most tokens through the model.
BUDGET: Final[dict[Level, int]] = {"quick": 30_000, "full": 300_000}


def run_checks(
    subject: Subject, checks: Iterable[Check], level: Level = "quick"
) -> list[tuple[Check, Outcome]]:
    """Each check with what it saw, in order; those that have nothing to say of it are left out."""
    results: list[tuple[Check, Outcome]] = []
    for check in checks:
        if check.level == "full" and level == "quick":
            continue
        lacks = check.lacks(subject.can_be_asked)
        outcome: Outcome | None
        if lacks:
            outcome = not_asked(f"the target has no {', '.join(lacks)}")
        else:
            try:
                outcome = check.run(subject)
            except BudgetSpent as spent:
                outcome = not_asked(spent.what)
        if outcome is not None:
            results.append((check, outcome))
    return results
