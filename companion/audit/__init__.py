"""Find the silent bugs in a reward model or an endpoint. Chapter 9."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.audit.asserting import assert_sound as assert_sound
    from companion.audit.auditing import (
        all_checks as all_checks,
        audit as audit,
        open_subject as open_subject,
    )
    from companion.audit.endpoint import EndpointSubject as EndpointSubject
    from companion.audit.local import LocalSubject as LocalSubject
    from companion.audit.museum.collection import (
        all_specimens as all_specimens,
        audit_specimen as audit_specimen,
    )
    from companion.audit.museum.healthy import tutor_reward as tutor_reward
    from companion.audit.museum.specimen import Planted as Planted, Specimen as Specimen
    from companion.audit.outcome import Check as Check, Outcome as Outcome
    from companion.audit.probes import PROBES as PROBES, Probe as Probe
    from companion.audit.report import (
        AuditDifference as AuditDifference,
        AuditReport as AuditReport,
        Result as Result,
        compare_audits as compare_audits,
        read_audit as read_audit,
    )
    from companion.audit.run import run_checks as run_checks
    from companion.audit.subject import Batch as Batch, Subject as Subject
    from companion.audit.transformations import (
        TRANSFORMATIONS as TRANSFORMATIONS,
        changed_rows as changed_rows,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
