"""The monitor looks at labels without loading torch; only what scores texts does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "trl", "accelerate", "datasets", "fastapi")

PROGRAM = """
import importlib, json, pkgutil, sys
for name in {names}:
    module = importlib.import_module(name)
import companion.monitoring as room
if {rooms}:
    for one in pkgutil.iter_modules(room.__path__):
        importlib.import_module("companion.monitoring." + one.name)
    for name in room.__all__:
        getattr(room, name)
print(json.dumps([name for name in {heavy} if name in sys.modules]))
"""


def loaded(names: list[str], rooms: bool = False, heavy: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of the heavy packages a new process has loaded after these imports."""
    program = PROGRAM.format(names=names, rooms=rooms, heavy=heavy)
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return list(json.loads(ran.stdout))


@pytest.mark.parametrize(
    "names",
    [
        ["companion.monitoring", "companion.errors"],
        ["companion.models.manifest"],  # a model's reference, temperature and golden texts
        [
            "companion.functional.calibration",
            "companion.functional.resampling",
            "companion.functional.sequential",
        ],
    ],
)
def test_no_torch_at_import(names: list[str]) -> None:
    assert loaded(names) == []


def test_no_file_of_the_monitor_imports_torch_and_no_name_of_its_face_does() -> None:
    assert loaded(["companion.monitoring"], rooms=True) == []


def test_the_check_sees_what_is_loaded() -> None:
    assert loaded(["companion.functional.resampling"], heavy=("scipy", "torch")) == ["scipy"]
