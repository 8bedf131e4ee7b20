"""Run the checks on a subject. Chapter 9."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from companion.audit.outcome import Check, Level, Outcome, not_asked
from companion.audit.subject import BudgetSpent, Subject
from companion.scoring.servers import Refused

#: Most tokens through the model.
BUDGET: Final[dict[Level, int]] = {"quick": 30_000, "full": 300_000}


def run_checks(
    subject: Subject,
    checks: Iterable[Check],
    level: Level = "quick",
    progress: Callable[[str], None] | None = None,
) -> list[tuple[Check, Outcome]]:
    """Each check with what it saw, in order; those that have nothing to say of it are left out.

    Of two checks of one name, for targets of two kinds, the one that could be asked is kept.
    `progress` is told the name of each check before it is asked.
    """
    results: dict[str, tuple[Check, Outcome]] = {}
    for check in checks:
        if check.level == "full" and level == "quick":
            continue
        if progress is not None:
            progress(check.name)
        lacks = check.lacks(subject.can_be_asked)
        outcome: Outcome | None
        if lacks:
            outcome = not_asked(f"the target has no {', '.join(lacks)}")
        else:
            try:
                outcome = check.run(subject)
            except BudgetSpent as spent:
                outcome = not_asked(spent.what)
            except Refused as refused:
                outcome = not_asked(f"the target refused it: {refused.what}")
        if outcome is None:
            continue
        before = results.get(check.name)
        if before is None or before[1].status == "not asked":
            results[check.name] = check, outcome
    return list(results.values())
