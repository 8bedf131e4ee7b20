"""A cure that names a flag names one that there is."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import companion
from companion.cli.main import COMMANDS
from companion.cli.train import _load, purposes

PACKAGE = Path(companion.__file__).parent
#: of programs that cures tell to start
FOREIGN = {"--nproc_per_node", "--index-url", "--num_processes", "--config_file", "--exclude"}
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")


def _told() -> dict[str, str]:
    """Flags in the texts of errors, and where."""
    found: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if "course" in path.parts or "museum" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    for flag in _FLAG.findall(part.value):
                        found.setdefault(flag, f"{path.relative_to(PACKAGE)}:{part.lineno}")
    return found


def _flags() -> set[str]:
    """Every flag of every command."""
    from fuzzed_commands import parsers

    known = {flag for parser in parsers() for a in parser._actions for flag in a.option_strings}
    for name in purposes():
        training = _load(name)
        known |= {
            f"--{own.name}"
            for cls in (training.data, training.model, training.config)
            for own in fields(cls)
        }
    return known | {"--config", "--version"}


def test_cures_name_flags_that_there_are():
    told, known = _told(), _flags()
    assert len(told) > 40
    assert len(known) > 200
    wrong = {flag: place for flag, place in told.items() if flag not in known | FOREIGN}
    assert not wrong
    assert set(COMMANDS) >= {"train", "score"}
