"""Whole runs of every kind, made once for all tests that look at them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import disable_progress_bars
from example_kinds import RUNS

from companion import TrainingResult

disable_progress_bars()


@pytest.fixture(scope="session")
def whole_runs(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TrainingResult[Any]]:
    """``whole_runs("kwise")``: the result of one of :data:`example_kinds.RUNS`."""
    made: dict[str, TrainingResult[Any]] = {}

    def get(name: str) -> TrainingResult[Any]:
        if name not in made:
            made[name] = RUNS[name].run(tiny_base, tmp_path_factory.mktemp("run"))
        return made[name]

    return get
