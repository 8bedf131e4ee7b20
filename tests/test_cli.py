"""The front door: what it lists, what it refuses, and that it opens fast."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import companion
from companion.cli import main as cli
from companion.errors import CompanionError, DataError


def test_help_and_version_import_nothing_heavy():
    program = (
        "import sys; from companion.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "main(['--version'])\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert companion.__version__ in done.stdout
    assert all(command in done.stdout for command in cli.COMMANDS)


def test_no_command_and_an_unknown_one(capsys):
    assert cli.main([]) == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    assert "no command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_explains_itself(command, capsys):
    try:
        code = cli.main([command, "--help"])
    except SystemExit as stop:  # argparse leaves this way
        code = stop.code
    assert code == 0
    assert "usage: companion" in capsys.readouterr().out


def test_a_companion_error_is_a_message_and_exit_code_2(monkeypatch, capsys):
    class Command:
        @staticmethod
        def add_arguments(parser):
            pass

        @staticmethod
        def run(args):
            raise DataError("file.jsonl, line 3: no 'chosen'", "add it")

    monkeypatch.setattr(importlib, "import_module", lambda name: Command)
    assert cli.main(["score"]) == 2
    message = capsys.readouterr().err
    assert "error: file.jsonl, line 3: no 'chosen'" in message
    assert "Cure: add it" in message
    assert "Traceback" not in message


def test_other_errors_keep_their_traceback(monkeypatch):
    class Command:
        @staticmethod
        def add_arguments(parser):
            pass

        @staticmethod
        def run(args):
            raise KeyError("a bug")

    monkeypatch.setattr(importlib, "import_module", lambda name: Command)
    with pytest.raises(KeyError):
        cli.main(["score"])


def test_public_names_resolve_and_are_listed():
    for name in companion.__all__:
        assert getattr(companion, name) is not None
    assert set(companion.__all__) <= set(dir(companion))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = companion.nothing


def test_errors_say_the_cure_on_a_line_of_its_own():
    assert str(CompanionError("it broke")) == "it broke"
    assert str(CompanionError("it broke", "mend it")).splitlines() == [
        "it broke",
        "  Cure: mend it",
    ]
    assert issubclass(DataError, ValueError)
