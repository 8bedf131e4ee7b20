"""The door: what the package exports has its real type, and pages use nothing else."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from mypy import api

import companion

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted(path.parent.name for path in (ROOT / "companion").glob("*/__init__.py"))
FACES = [f"companion.{name}" for name in (*ROOMS, "errors", "quickstart") if name != "cli"]


def exported(face: str) -> list[str]:
    module = importlib.import_module(face)
    return list(getattr(module, "__all__", []))


def test_each_room_has_a_face():
    """And what it exports is defined in that very room: nothing has two homes."""
    for face in FACES:
        for name in exported(face):
            thing = getattr(importlib.import_module(face), name)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                assert thing.__module__.startswith(face), f"{face}.{name}: {thing.__module__}"
    assert sum(len(exported(face)) for face in FACES) > 150


def test_what_most_users_need_stands_in_a_room_too():
    homes = {name for face in FACES for name in exported(face)} | set(vars(companion.errors))
    assert [name for name in companion.__all__ if name not in homes] == []
    assert 60 <= len(companion.__all__) <= 80


def test_an_unknown_name_is_an_attribute_error():
    for face in ("companion", *FACES):
        with pytest.raises(AttributeError, match="no attribute 'nothing_of_that_name'"):
            _ = importlib.import_module(face).nothing_of_that_name


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[str]:
    """What mypy says of every export, of a misspelt one and of a misspelt method, line by line."""
    lines = ["import companion"]
    lines += [f"import {face}" for face in FACES]
    lines += [f"reveal_type({face}.{n})" for face in ("companion", *FACES) for n in exported(face)]
    lines += ["companion.RewardScorrer", "companion.functional.bradley_tery_loss"]
    lines += ['companion.RewardScorer.from_pretrained("x").no_such_method()']
    lines += ['companion.load_reward_model("x").formatter.encode_rows({})']
    file = tmp_path_factory.mktemp("door") / "uses.py"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = ["--config-file", str(ROOT / "pyproject.toml")]
    out, errors, _ = api.run([*config, "--no-error-summary", "--hide-error-context", str(file)])
    assert not errors, errors
    # by the file's name alone: what mypy has in its cache it says with the path of the last run
    found = [line for line in out.splitlines() if re.match(rf"\S*{file.name}:\d+", line)]
    return [*lines, "--", *found]


def test_no_export_is_any(told):
    lines, found = told[: told.index("--")], told[told.index("--") + 1 :]
    revealed = [line for line in found if "Revealed type is" in line]
    assert len(revealed) == sum(line.startswith("reveal_type") for line in lines)
    unknown = [
        lines[int(re.search(r"uses\.py:(\d+)", line)[1]) - 1]
        for line in revealed
        if re.search(r'Revealed type is "(Any|def \(\*args: Any, \*\*kwargs: Any\) -> Any)"', line)
    ]
    assert unknown == []


def test_a_misspelt_name_or_method_is_an_error(told):
    errors = "\n".join(line for line in told[told.index("--") + 1 :] if " error: " in line)
    for name in ("RewardScorrer", "bradley_tery_loss", "no_such_method", "encode_rows"):
        assert errors.count(f'"{name}"') == 1, errors
    assert errors.count(" error: ") == 4, errors


def _code(path: Path) -> str:
    """The Python of a page or a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    cells = re.findall(r"^```(?:\{code-cell\}[^\n]*|python)\n(.*?)^```", text, re.M | re.S)
    cells = [re.sub(r"\A---\n.*?^---\n", "", cell, flags=re.M | re.S) for cell in cells]
    plain = [re.sub(r"^(:\w|%|!).*$", "", cell, flags=re.M) for cell in cells]
    return "\n".join(plain)


def test_pages_and_programs_use_faces_only():
    """What moves within a room breaks no page, exercise, recipe or benchmark."""
    folders = ("book", "exercises", "solutions", "recipes", "benchmarks")
    files = [ROOT / "README.md"]
    files += [p for f in folders for s in ("*.md", "*.py") for p in (ROOT / f).rglob(s)]
    found = []
    for path in files:
        if path.parent.name in ("_ext", "_tools"):
            continue
        for node in ast.walk(ast.parse(_code(path))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("companion"):
                names = {alias.name for alias in node.names}
                if node.module in ALLOWED and names <= ALLOWED[node.module]:
                    continue
                if node.module not in ("companion", *FACES):
                    found.append(f"{path.relative_to(ROOT)}: from {node.module} import …")
    assert found == []


#: the command's own entry, which pages start not a shell; what exercises draw data by;
#: what a new protocol is made of, as a benchmark's echo is
ALLOWED = {
    "companion.serving.protocols.native": {"Rewards", "head", "error_body"},
    "companion.serving.protocols.routes": {"post"},
    "companion.cli.main": {"main", "COMMANDS"},
    "companion.course.exercises.ch03._pairs_or_outcomes": {"draw", "figures", "fit"},
    "companion.course.exercises.ch04._one_epoch_or_many": {"train"},
    "companion.course.exercises.ch05._group_scaling": {
        *("CHANGES", "EQUAL", "NEARLY", "advantages", "draw"),
    },
    "companion.course.exercises.ch06._forms_that_stay": {"CHANGES", "draw", "forms"},
    "companion.course.exercises.ch07._what_it_shows": {"draw", "evidence", "plain_error"},
    "companion.course.exercises.ch08._what_ranks_see": {"by_accelerate", "by_ddp", "step_weights"},
    "companion.course.exercises.ch09._sick_models": {"run", "ward"},
    "companion.course.exercises.ch09._sick_rows": {"pairs"},
    "companion.course.exercises.ch09._sick_server": {"address"},
}
