"""Run the checks on a subject. Chapter 9."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from companion.audit.outcome import Check, Level, Outcome, Status, not_asked
from companion.audit.subject import BudgetSpent, Subject
from companion.errors import DataError
from companion.scoring.servers import Refused

#: Most tokens through the model.
BUDGET: Final[dict[Level, int]] = {"quick": 30_000, "full": 300_000}
_WEIGHT: Final[dict[Status, int]] = {"not asked": 0, "sound": 1, "measured": 2, "found": 3}


def run_checks(
    subject: Subject,
    checks: Iterable[Check],
    level: Level = "quick",
    progress: Callable[[str], None] | None = None,
) -> list[tuple[Check, Outcome]]:
    """Each check with what it saw, in order; those that have nothing to say of it are left out.

    Of two checks of one name, one of the files and one of the endpoint say, the one that found more
    is kept.
    `progress` is told the name of each check before it is asked.
    """
    results: dict[str, tuple[Check, Outcome]] = {}
    lacking: set[str] = set()
    for check in checks:
        if check.level == "full" and level == "quick":
            continue
        if progress is not None:
            progress(check.name)
        lacks = check.lacks(subject.abilities)
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
            except DataError as refused:  # an ordinary row is none for its formatter or template
                outcome = not_asked(refused.what)
        if outcome is None:
            continue
        before = results.get(check.name)
        better = before is None or _WEIGHT[outcome.status] > _WEIGHT[before[1].status]
        if better or (check.name in lacking and not lacks):  # the reason of the one for this target
            results[check.name] = check, outcome
            lacking = lacking | {check.name} if lacks else lacking - {check.name}
    return list(results.values())
