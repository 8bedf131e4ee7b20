"""The museum as one: what pages, exercises and the benchmark take from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from companion.audit import all_checks, all_specimens, audit_specimen
from companion.tutor import make_rows

SPECIMENS = {specimen.name: specimen for specimen in all_specimens()}


def test_names_are_of_one_specimen_each_and_checks_exist():
    assert len(SPECIMENS) == len(all_specimens()) > 50
    known = {check.name for check in all_checks(make_rows("pairs", 4), make_rows("pairs", 4))}
    for specimen in SPECIMENS.values():
        assert {specimen.caught_by, *specimen.also} <= known, specimen.name


@pytest.mark.parametrize("name", ["without-head", "preferences-in-a-circle", "empty-text-scored"])
def test_a_model_a_set_and_a_server_are_audited_as_they_were_planted(name: str, tmp_path: Path):
    specimen = SPECIMENS[name]
    report = audit_specimen(specimen, tmp_path)
    found = [r.check.name for r in report.results if r.outcome.status == "found"]
    assert specimen.caught_by in found
    asked = {result.check.name for result in report.results}
    assert asked <= {specimen.caught_by, *specimen.also}
