"""No test touches the progress of whoever runs it."""

from __future__ import annotations

import pytest

from companion.course.progress import VARIABLE


@pytest.fixture(autouse=True)
def progress_file(tmp_path, monkeypatch):
    path = tmp_path / "state" / "progress.json"
    monkeypatch.setenv(VARIABLE, str(path))
    return path
