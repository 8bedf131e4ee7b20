"""All specimens, and what the audit says of one. Chapter 9."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Final

from companion.audit.auditing import all_checks, audit
from companion.audit.museum.specimen import Specimen
from companion.audit.report import AuditReport

_ROOMS: Final = ("models", "texts", "servers", "data")


def all_specimens() -> tuple[Specimen, ...]:
    """Each bug of the museum: models, texts, servers, sets of rows. Chapter 9."""
    found: list[Specimen] = []
    for room in _ROOMS:
        name = f"companion.audit.museum.{room}"
        if importlib.util.find_spec(name):
            found.extend(importlib.import_module(name).SPECIMENS)
    return tuple(found)


def audit_specimen(specimen: Specimen, folder: Path, *, whole: bool = False) -> AuditReport:
    """Plant it in an empty folder, and audit it. Chapter 9.

    Parameters
    ----------
    specimen : Specimen
    folder : Path
        Empty; what is planted lies there afterwards. A server has stopped.
    whole : bool
        Ask all checks that can find a fault or a hazard. Default: those that are to find it.
    """
    named = {specimen.caught_by, *specimen.also}
    with specimen.plant(folder) as planted:
        given: dict[str, Any] = {
            "data": planted.data,
            "against": planted.against,
            "protocol": planted.protocol,
            "model": planted.model,
            "trust_remote_code": planted.trust_remote_code or None,
        }
        checks = all_checks(planted.data, planted.against)
        return audit(
            planted.target,
            checks=[c for c in checks if c.name in named or (whole and c.kind != "bias")],
            **{name: value for name, value in given.items() if value is not None},
        )
