"""Every command that a page shows is one that the real command line takes."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest
from book_pages import ROOT, all_commands, commands_of, companion_arguments

from companion.cli.main import _VERBATIM, COMMANDS
from companion.errors import CompanionError

COMMANDS_ON_PAGES = all_commands()
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_companion(arguments: list[str], output_dir: Path) -> None:
    """Parse as ``companion`` does, without running anything; raises if it would be refused."""
    name, rest = arguments[0], arguments[1:]
    module = importlib.import_module(COMMANDS[name][0])
    if name in _VERBATIM:
        assert rest[0] in module.KINDS
        words = rest[1:]
        if "--output_dir" in words:  # the settings make the folder
            words[words.index("--output_dir") + 1] = str(output_dir)
        module.parse(words)
        return
    parser = argparse.ArgumentParser(exit_on_error=True)
    module.add_arguments(parser)
    parser.parse_args(rest)


@pytest.mark.parametrize("command", sorted(set(COMMANDS_ON_PAGES)), ids=str)
def test_command_of_a_page_is_accepted(command, tmp_path):
    words = [word for word in command.words if not re.fullmatch(r"[A-Z_]+=.*", word)]
    arguments = companion_arguments(tuple(words))
    if arguments is not None:
        check_companion(arguments, tmp_path)
    elif words[0] == "make":
        for target in words[1:]:
            assert "=" in target or target in TARGETS, target
    else:
        pytest.fail(f"nothing here knows how to check {words[0]!r}")


def test_pages_show_commands():
    shown = {companion_arguments(command.words)[0] for command in COMMANDS_ON_PAGES
             if companion_arguments(command.words)}  # fmt: skip
    assert {"train", "evaluate", "score", "data"} <= shown
    assert {"quickstart", "test"} <= {
        command.words[1] for command in COMMANDS_ON_PAGES if command.words[0] == "make"
    }


@pytest.mark.parametrize(
    "line",
    [
        "companion train pairwise --dataset_nam x --output_dir y",
        "companion evaluate --model x",  # no data
        "companion score --model x --input a --output b --no_such_flag",
        "companion data tutor --kind no-such-kind --n 1 --output x",
    ],
)
def test_a_wrong_command_is_refused(line, tmp_path):
    (command,) = commands_of(f"```bash\n{line}\n```\n")
    with pytest.raises((CompanionError, SystemExit)):
        check_companion(companion_arguments(command.words), tmp_path)


def test_commands_are_found_in_blocks():
    text = (
        "```bash\n# a comment\n$ companion score \\\n  --model x\n```\n```python\ncompanion\n```\n"
    )
    assert [command.words for command in commands_of(text)] == [
        ("companion", "score", "--model", "x")
    ]
    launched = ("accelerate", "launch", "-m", "companion", "train", "pairwise")
    assert companion_arguments(launched) == ["train", "pairwise"]
    assert companion_arguments(("make", "test")) is None
