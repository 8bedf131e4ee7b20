"""The audit: open the target, ask the checks, hold what they saw against what the user said.

Chapter 9.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from companion.audit.checks import endpoint, head, meaning, readout, text
from companion.audit.checks.data import data_checks
from companion.audit.endpoint import EndpointSubject, Protocol, open_endpoint
from companion.audit.local import LocalSubject
from companion.audit.outcome import Check, Level, Outcome
from companion.audit.report import AuditReport, Result
from companion.audit.run import BUDGET, run_checks
from companion.audit.subject import Subject
from companion.audit.waivers import check_names
from companion.data import load_rows
from companion.errors import DataError
from companion.scoring.servers import is_url

#: Most requests to an endpoint, where nothing else is said.
REQUESTS: Final[dict[Level, int]] = {"quick": 1_000, "full": 10_000}


def all_checks(
    data: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None = None,
    against: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Check, ...]:
    """Each check, in the order in which they are asked.

    Parameters
    ----------
    data : path or rows, optional
        Labelled pairs: adds the checks of the model on them, and of the pairs themselves.
    against : path or rows, optional
        Rows that are to share no prompt with them, such as those of the training.

    Raises
    ------
    DataError
        For rows that are no pairs.
    """
    # (a server's own first: requests may be few)
    found = [
        *(*endpoint.CHECKS, *readout.CHECKS),
        *(*text.CHECKS, *head.CHECKS, *meaning.CHECKS),
    ]
    if data is not None:
        others = None if against is None else load_rows(against)
        found.extend(data_checks(load_rows(data), against=others))
    elif against is not None:
        raise DataError("against was given without data", "give the pairs that are audited too")
    return tuple(found)


def open_subject(
    target: str | os.PathLike[str] | torch.nn.Module,
    tokenizer: Any = None,
    *,
    level: Level = "quick",
    protocol: Protocol | None = None,
    model: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    api_key: str | None = None,
    timeout: float = 120.0,
    max_requests: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """The target as a subject; see :func:`audit`. Nothing is posted to an endpoint yet.

    Parameters
    ----------
    target, tokenizer, level
        See :func:`audit`.
    protocol, model, api_key, timeout, max_requests
        Of an endpoint; see :func:`companion.audit.endpoint.open_endpoint`. Default: at most 1,000
        requests, at ``full`` 10,000.
    dtype : str, optional
        In which a model here is to run (default: as it was saved), or an endpoint runs.
    device : str, optional
        Of a model that is loaded here; default: the GPU if there is one.
    revision, trust_remote_code
        For transformers.

    Raises
    ------
    DataError
        For settings that do not fit the target, or an endpoint that does not say what it speaks.
    ModelError
        If the model cannot be loaded.
    ServiceError
        If nobody answers.
    """
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if isinstance(target, str) and is_url(target):
        if device is not None:
            raise DataError("device is for a model that is loaded here", "leave it out")
        return open_endpoint(
            target,
            protocol=protocol,
            model=model,
            dtype=dtype,
            api_key=api_key,
            timeout=timeout,
            max_tokens=BUDGET[level],
            max_requests=REQUESTS[level] if max_requests is None else max_requests,
            **hub,
        )
    of_endpoints = {"protocol": protocol, "model": model, "max_requests": max_requests}
    for name, value in of_endpoints.items():
        if value is not None:
            raise DataError(
                f"{name} says something of an endpoint", "give its URL, or leave it out"
            )
    if device is None and isinstance(target, (str, os.PathLike)) and torch.cuda.is_available():
        device = "cuda"
    return LocalSubject(
        target, tokenizer, dtype=dtype, device=device, max_tokens=BUDGET[level], **hub
    )


def audit(
    target: str | os.PathLike[str] | torch.nn.Module | Subject,
    tokenizer: Any = None,
    *,
    data: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None = None,
    against: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None = None,
    level: Level = "quick",
    checks: Sequence[Check] | None = None,
    waivers: Mapping[str, str] | None = None,
    at_most: Mapping[str, float] | None = None,
    at_least: Mapping[str, float] | None = None,
    progress: Callable[[str], None] | None = None,
    **opening: Any,
) -> AuditReport:
    """Look for silent bugs in a reward model or an endpoint. Chapter 9.

    Parameters
    ----------
    target : str, path, PreTrainedModel or Subject
        A folder, a hub id, a model in memory, the URL of an endpoint, or what :func:`open_subject`
        gave.
    tokenizer : PreTrainedTokenizerBase, optional
        Of a model in memory.
    data, against : path or rows, optional
        See :func:`all_checks`.
    level : {"quick", "full"}
        At most 30,000 tokens through the model, or 300,000.
    checks : sequence of Check, optional
        Default: :func:`all_checks`.
    waivers : mapping, optional
        For the name of a check the reason why its fault is lived with.
    at_most, at_least : mapping, optional
        For the name of a check of a bias the most, in either direction, or the least that its size
        may be. It fails if its whole 95% interval is beyond.
    progress : callable, optional
        Is told the name of each check before it is asked.
    **opening
        Those of :func:`open_subject`: ``protocol``, ``model``, ``dtype``, ``device``, ``api_key``,
        ``timeout``, ``max_requests``, ``revision``, ``trust_remote_code``.

    Returns
    -------
    AuditReport

    Raises
    ------
    DataError
        For a name that no check has, or settings that do not fit the target.
    ModelError
        If the model cannot be loaded.
    ServiceError
        If an endpoint cannot be asked, or answers an ordinary text with anything but a score.
    """
    asked = all_checks(data, against) if checks is None else tuple(checks)
    waivers, at_most, at_least = waivers or {}, at_most or {}, at_least or {}
    names = {check.name for check in asked}
    for what, given in (("waivers", waivers), ("at_most", at_most), ("at_least", at_least)):
        check_names(given, names, what)
    _check_limits(asked, {**at_most, **at_least})
    began = time.monotonic()
    subject = target if isinstance(target, Subject) else None
    if subject is None:
        subject = open_subject(target, tokenizer, level=level, **opening)  # type: ignore[arg-type]
    try:
        if isinstance(subject, EndpointSubject):
            subject.check_answers()
        found = run_checks(subject, asked, level, progress)
    finally:
        subject.close()
    return _report(subject, level, found, waivers, at_most, at_least, time.monotonic() - began)


def _check_limits(checks: Sequence[Check], limits: Mapping[str, float]) -> None:
    for name in limits:
        if not any(check.kind == "bias" for check in checks if check.name == name):
            raise DataError(
                f"{name} is no bias, so it has no limit",
                "a fault fails as it is; leave a fault out by a waiver",
            )


def _report(
    subject: Subject,
    level: Level,
    found: Sequence[tuple[Check, Outcome]],
    waivers: Mapping[str, str],
    at_most: Mapping[str, float],
    at_least: Mapping[str, float],
    seconds: float,
) -> AuditReport:
    results = tuple(
        Result(
            check,
            outcome,
            waivers.get(check.name),
            at_most.get(check.name),
            at_least.get(check.name),
        )
        for check, outcome in found
    )
    used = {result.check.name for result in results if result.verdict == "waived"}
    notes = [*getattr(subject, "notes", ())]
    notes += [
        f"the waiver of {name} was not needed ({reason})"
        for name, reason in waivers.items()
        if name not in used
    ]
    unlimited = {**at_most, **at_least}.keys() - {
        result.check.name for result in results if result.outcome.status == "measured"
    }
    notes += [f"the limit of {name} was held against nothing" for name in sorted(unlimited)]
    return AuditReport(
        target=str(subject.name),
        what=subject.what,
        level=level,
        abilities=tuple(sorted(subject.abilities)),
        results=results,
        tokens=subject.tokens,
        requests=subject.requests,
        seconds=seconds,
        notes=tuple(notes),
        protocol=subject.protocol if isinstance(subject, EndpointSubject) else None,
    )
