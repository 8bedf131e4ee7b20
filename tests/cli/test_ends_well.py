"""What ends a command from outside: one line, a cure, an exit code; the input is still there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import sqlite3
import sys

import pytest

from companion.cli import main as cli
from companion.data.writing import check_output, whole_file, write_text
from companion.errors import CompanionError, DataError, system_fault

TEXTS = [{"prompt": f"Ana has {i} boxes", "completion": f"right answer is {i}"} for i in range(20)]
PAIRS = [
    {"prompt": f"Ana has {i} boxes", "chosen": "right answer is 3", "rejected": "no idea"}
    for i in range(20)
]
COMPLETIONS = [
    {"prompt": f"Ana has {i} boxes", "completions": ["yes good", "no", f"{i} pens"]}
    for i in range(20)
]


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextlib.contextmanager
def full_disk(size: int = 200):
    """No file grows beyond `size` bytes: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def commands(tmp_path, tiny_reward):
    """Command by name: its arguments for an output, and its input."""
    texts, pairs = _write(tmp_path / "texts.jsonl", TEXTS), _write(tmp_path / "pairs.jsonl", PAIRS)
    several = _write(tmp_path / "several.jsonl", COMPLETIONS)
    small = ["--n", 3, "--seed", 1]
    found = {
        "score": (["score", "--model", tiny_reward, "--input", texts, "--output"], texts),
        "rank": (["rank", "--model", tiny_reward, "--input", several, "--output"], several),
        "tutor": (["data", "tutor", *small, "--output"], None),
        "convert": (["data", "convert", pairs, "--output"], pairs),
        "sample": (["sample", several, *small, "--output"], several),
        "evaluate": (
            ["evaluate", "--model", tiny_reward, "--dataset_name", pairs, "--json"],
            pairs,
        ),
        "compare": (["compare", tiny_reward, tiny_reward, "--data", pairs, "--json"], pairs),
    }
    return {name: ([str(word) for word in words], own) for name, (words, own) in found.items()}


NAMES = ("score", "rank", "tutor", "convert", "sample", "evaluate", "compare")


def _refused(capsys, argv) -> str:
    assert cli.main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "Traceback" not in said
    assert "Cure: " in said
    return line


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_ends_in_a_line_and_the_same_command_goes_on(name, commands, tmp_path, capsys):
    argv, _ = commands[name]
    target = tmp_path / "out.jsonl"
    with full_disk():
        line = _refused(capsys, [*argv, target])
    assert "too large" in line
    assert "out.jsonl" in line  # (of rank the ranks, whose name begins with it)
    assert name in ("score", "rank") or not target.exists()  # no half of a file
    assert cli.main([*argv, str(target)]) == 0
    whole = target.read_text()
    assert cli.main([*argv, str(tmp_path / "other.jsonl")]) == 0
    assert name in ("evaluate", "compare") or whole == (tmp_path / "other.jsonl").read_text()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("link", ["itself", "hard", "symbolic"])
def test_an_output_is_never_the_input(name, link, commands, tmp_path, capsys):
    argv, source = commands[name]
    if source is None:
        return
    before, target = source.read_bytes(), source
    if link != "itself":
        target = tmp_path / "link.jsonl"
        target.hardlink_to(source) if link == "hard" else target.symlink_to(source)
    overwrite = ["--overwrite"] if name in ("score", "rank", "sample") else []
    assert "same file" in _refused(capsys, [*argv, target, *overwrite])
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_is_a_folder_or_lies_in_a_file(name, commands, tmp_path, capsys):
    argv, _ = commands[name]
    (tmp_path / "folder.jsonl").mkdir()
    assert "folder" in _refused(capsys, [*argv, tmp_path / "folder.jsonl"])
    (tmp_path / "file").write_text("x")
    assert "file" in _refused(capsys, [*argv, tmp_path / "file" / "out.jsonl"])
    assert (tmp_path / "file").read_text() == "x"


def test_a_device_is_never_replaced(tmp_path, tiny_reward, capsys):
    source = _write(tmp_path / "texts.jsonl", TEXTS)
    argv = ["score", "--model", tiny_reward, "--input", source, "--output", "/dev/null"]
    assert "device" in _refused(capsys, argv)
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    assert "pipe" in _refused(capsys, [*argv[:-1], pipe])  # and does not wait for a reader
    pairs = _write(tmp_path / "pairs.jsonl", PAIRS)
    argv = ["evaluate", "--model", str(tiny_reward), "--dataset_name", str(pairs)]
    assert cli.main([*argv, "--json", "/dev/null"]) == 0
    assert not os.path.isfile("/dev/null")
    with whole_file(type(tmp_path)("/dev/null")) as part:
        assert str(part) == "/dev/null"


def test_a_text_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "text"
    write_text(target, "one \ud800")
    assert target.read_bytes() == b"one \\ud800"
    with full_disk(), pytest.raises(DataError, match="too large"):
        write_text(target, "x" * 1000)
    assert target.read_bytes() == b"one \\ud800"
    assert [path.name for path in target.parent.iterdir()] == ["text"]


def test_an_output_beside_its_inputs_passes(tmp_path):
    source = _write(tmp_path / "in.jsonl", TEXTS)
    check_output(tmp_path / "new" / "out.jsonl", source, None, "org/dataset", tmp_path / "gone")
    check_output("/dev/null", "/dev/null")
    assert (tmp_path / "new").is_dir()


# ---------------------------------------------------------------------- the door


class _Command:
    def __init__(self, raises: BaseException) -> None:
        self.raises = raises

    def add_arguments(self, parser) -> None:
        pass

    def run(self, args) -> int:
        raise self.raises


def _raised(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


FAULTS = {
    "full": (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "/data/x: No space"),
    "read-only": (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission"),
    "rename": (OSError(errno.EROFS, "Read-only", "/a", None, "/b"), "/b: Read-only"),
    "deep": (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    "memory": (MemoryError(), "memory has ended"),
    "sqlite": (sqlite3.OperationalError("database or disk is full"), "disk is full"),
    "torch": (RuntimeError("[enforce fail at inline_container.cc:784] . PytorchStream"), "written"),
    "rust": (Exception("No space left on device (os error 28)"), "No space"),
    "wrapped": (
        _raised(ValueError("while generating"), OSError(errno.ENOSPC, "No space", "/c")),
        "/c: No space",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_machine_lacks_is_one_line(name, monkeypatch, capsys):
    error, words = FAULTS[name]
    monkeypatch.setattr(cli.importlib, "import_module", lambda module: _Command(error))
    assert words in _refused(capsys, ["score"])
    assert isinstance(system_fault(error), CompanionError)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shape"), ValueError("a bug")])
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr(cli.importlib, "import_module", lambda module: _Command(error))
    with pytest.raises(type(error)):
        cli.main(["score"])
    assert system_fault(error) is None


def test_ctrl_c_is_a_line_and_130(monkeypatch, capsys):
    monkeypatch.setattr(
        cli.importlib, "import_module", lambda module: _Command(KeyboardInterrupt())
    )
    assert cli.main(["score"]) == 130
    assert capsys.readouterr().err == "stopped: companion score did not come to its end\n"


@pytest.mark.parametrize("reader", ["gone", "full"])
def test_standard_output_that_cannot_be_written(reader, monkeypatch, capsys):
    if reader == "gone":  # companion … | head
        end, begin = os.pipe()
        os.close(end)
        out = os.fdopen(begin, "w")
    else:
        out = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["--version"]) == 0
    assert cli.main(["progress"]) == (0 if reader == "gone" else 2)
    monkeypatch.undo()
    out.close()  # writes what is left: nothing complains
    said = capsys.readouterr().err
    assert ("No space left" in said) == (reader == "full")
