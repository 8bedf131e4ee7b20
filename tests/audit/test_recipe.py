"""The workflow of recipes/audit: its command is one, and its gate reads the report."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from companion.audit import AuditReport, Check, Outcome, Result
from companion.cli import audit as command

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = yaml.safe_load((ROOT / "recipes" / "audit" / "audit.yml").read_text(encoding="utf-8"))
STEPS = WORKFLOW["jobs"]["audit"]["steps"]


def test_the_command_is_accepted() -> None:
    (script,) = [step["run"] for step in STEPS if "companion audit" in step.get("run", "")]
    line = script[script.index("companion audit") :].replace("\\\n", " ").partition("||")[0]
    words = shlex.split(line)[2:]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(words)
    assert args.junit == Path("audit.xml")
    assert subprocess.run(["bash", "-n", "-c", script], check=True).returncode == 0


@pytest.mark.parametrize(
    ("status", "waiver", "code"), [("found", None, 1), ("found", "known", 0), ("sound", None, 0)]
)
def test_the_gate(status: str, waiver: str | None, code: int, tmp_path: Path) -> None:
    check = Check(
        *("pad-is-eos", "read-out", "fault", "?", "why", "cure", ()), frozenset(), lambda _: None
    )
    outcome = Outcome(status, "two\nlines: <a>")  # type: ignore[arg-type]
    report = AuditReport("m", "folder", "full", (), (Result(check, outcome, waiver),))
    report.write_junit(tmp_path / "audit.xml")
    gate = STEPS[-1]
    assert gate["shell"] == "python"
    run = subprocess.run(
        [sys.executable, "-c", gate["run"]], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == code, run.stderr
    assert ("::error title=pad-is-eos::two lines: <a>\n" in run.stdout) == bool(code)
