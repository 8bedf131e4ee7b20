"""Patients for the exercises of chapter 9: specimens of the audit's museum, under other names."""

from __future__ import annotations

import atexit
import contextlib
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path

from companion.audit import Planted, all_checks, all_specimens, audit
from companion.course.exercise import Question

#: planted until the interpreter ends
_PLANTED = contextlib.ExitStack()
atexit.register(_PLANTED.close)


@functools.cache
def admit(specimen: str) -> Planted:
    """A specimen, planted once."""
    (found,) = [one for one in all_specimens() if one.name == specimen]
    folder = _PLANTED.enter_context(tempfile.TemporaryDirectory())
    return _PLANTED.enter_context(found.plant(Path(folder)))


@functools.cache
def diagnose(specimen: str, checks: tuple[str, ...]) -> str:
    """Which of these checks of the audit finds something, and it alone."""
    planted = admit(specimen)
    asked = [c for c in all_checks(planted.data, planted.against) if c.name in checks]
    given = {"data": planted.data, "protocol": planted.protocol, "model": planted.model}
    report = audit(
        planted.target,
        checks=asked,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    (name,) = [r.check.name for r in report.results if r.outcome.status == "found"]
    return name


def question(key: str, truth: str, signs: Mapping[str, str], thread: str | None = None) -> Question:
    """What ails one patient, among diagnoses; each has a sign, which this one does not show."""
    return Question(
        key,
        tuple(signs),
        {
            name: f"'{name}' is taken for what ails {key}. {sign} Here that is not so."
            for name, sign in signs.items()
            if name != truth
        },
        thread,
    )
