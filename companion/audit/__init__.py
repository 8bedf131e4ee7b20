"""Find the silent bugs in a reward model or an endpoint. Chapter 9."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.audit.local import LocalSubject as LocalSubject
    from companion.audit.outcome import Check as Check, Outcome as Outcome
    from companion.audit.run import run_checks as run_checks
    from companion.audit.subject import Batch as Batch, Subject as Subject
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
