"""Progress: a round trip, odd files, the command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch.nn.functional as F

from companion.cli.main import main
from companion.course import check, progress
from companion.course.catalogue import CATALOGUE
from companion.course.progress import VARIABLE, Record

LOSS = "ch01.pair_loss"


def right(chosen, rejected):
    return -F.logsigmoid(chosen - rejected)


def wrong(chosen, rejected):
    return -F.logsigmoid(rejected - chosen)


def test_round_trip(progress_file):
    check(LOSS, wrong)
    check(LOSS, hint=2)
    check(LOSS, hint=1)
    assert progress.load() == {LOSS: Record(attempts=1, hints=2)}
    check(LOSS, right)
    solved = progress.load()[LOSS]
    assert (solved.attempts, solved.hints) == (2, 2)
    assert solved.solved is not None
    assert solved.solved.endswith("+00:00")
    check(LOSS, wrong)  # what was solved stays solved
    check(LOSS, right)
    assert progress.load()[LOSS] == solved
    assert json.loads(progress_file.read_text())["version"] == 1
    assert os.listdir(progress_file.parent) == [progress_file.name]


@pytest.mark.parametrize("value", ["", os.devnull])
def test_it_can_be_switched_off(value, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, value)
    result = check(LOSS, right)
    assert result
    assert result.notes == []
    assert progress.progress_path() is None
    assert progress.load() == {}
    assert progress.reset() == 0
    assert main(["progress"]) == 0
    assert "Nothing is kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"XDG_STATE_HOME": "/state"}, "/state"),
        ("linux", {"XDG_STATE_HOME": "relative"}, "~/.local/state"),
        ("linux", {}, "~/.local/state"),
        ("darwin", {}, "~/Library/Application Support"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local"),
        ("win32", {}, "~/AppData/Local"),
    ],
)
def test_it_lies_where_the_platform_has_it(platform, environment, expected, monkeypatch):
    for name in (VARIABLE, "XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    path = progress.progress_path()
    assert path == Path(expected).expanduser() / "reward-model-companion" / "progress.json"


@pytest.mark.parametrize("content", ["{", "[]", '{"exercises": 3}', '{"exercises": {"a": 1}}', ""])
def test_an_unreadable_file_is_put_aside(content, progress_file):
    progress_file.parent.mkdir(parents=True)
    progress_file.write_text(content)
    assert progress.load() == {}
    result = check(LOSS, right)
    assert result
    assert "put aside" in result.notes[-1]
    assert progress.load()[LOSS].solved
    assert progress_file.with_suffix(".unreadable.json").read_text() == content


def test_a_file_that_cannot_be_written_is_a_note(progress_file, monkeypatch, tmp_path):
    blocker = tmp_path / "blocker"
    blocker.write_text("a file where a folder should be")
    monkeypatch.setenv(VARIABLE, str(blocker / "progress.json"))
    result = check(LOSS, right)
    assert result
    assert "could not be kept" in result.notes[-1]
    assert "could not be kept" in str(result)


def test_an_unknown_exercise_in_the_file_is_kept(progress_file):
    progress.record("ch99.of_a_later_version", attempted=True, solved=True)
    check(LOSS, right)
    assert "ch99.of_a_later_version" in progress.load()
    assert "1/6" in progress.table(progress.load())


def test_the_command(capsys, progress_file):
    assert main(["progress"]) == 0
    shown = capsys.readouterr().out
    assert f"Next: {CATALOGUE[0].title}" in shown
    assert "0/6  Bradley–Terry" in shown
    assert "exercises/ch01_bradley_terry.md" in shown

    for entry in CATALOGUE[:6]:
        progress.record(entry.id, attempted=True, solved=True)
    progress.record(CATALOGUE[6].id, hint=1)
    assert main(["progress", "--all"]) == 0
    shown = capsys.readouterr().out
    assert "████████████████████  6/6  Bradley–Terry (done)" in shown
    assert "0 attempts, hint 1" in shown
    assert f"Next: {CATALOGUE[6].title}" in shown

    assert main(["progress", "--path"]) == 0
    assert capsys.readouterr().out.strip() == str(progress_file)
    assert main(["progress", "--chapter", "1"]) == 2
    capsys.readouterr()

    assert main(["progress", "--reset", "--chapter", "1"]) == 0
    assert "6 exercises forgotten" in capsys.readouterr().out
    assert set(progress.load()) == {CATALOGUE[6].id}
    assert main(["progress", "--reset"]) == 0
    assert "1 exercise forgotten" in capsys.readouterr().out
    assert not progress_file.exists()
    assert main(["progress", "--reset"]) == 0


def test_when_all_is_solved():
    records = {entry.id: Record(1, 0, "2026-01-01T00:00:00+00:00") for entry in CATALOGUE}
    assert progress.next_exercise(records) is None
    assert progress.table(records).endswith("All exercises are solved.")
