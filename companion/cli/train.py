"""``companion train pairwise``: every field of the settings is a flag or a line of a YAML file.

Started by ``accelerate launch -m companion train pairwise …`` or ``torchrun … -m companion train
pairwise …`` the same command trains on many devices.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from companion.errors import CompanionError

KINDS = ("pairwise",)
_USAGE = """usage: companion train pairwise --model_name_or_path BASE --dataset_name PAIRS \\
           --output_dir DIR [--config FILE.yaml] [any other setting]

  BASE   a folder or a hub id, e.g. Qwen/Qwen3-0.6B
  PAIRS  a .jsonl, .jsonl.gz, .parquet or .csv file, a folder, or a hub id
  DIR    becomes a plain Hugging Face checkpoint with reward_manifest.json

Settings of --config are overridden by flags. 'companion train pairwise --help' lists them all.
"""


def run_argv(argv: Sequence[str]) -> int:
    """Run ``companion train …`` with what follows ``train``; return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if argv[0] not in KINDS:
        raise CompanionError(
            f"there is no training of the kind {argv[0]!r}", f"there are: {', '.join(KINDS)}"
        )
    data, model, config = parse(argv[1:])
    from companion.training.run import summary, train_pairwise

    result = train_pairwise(config, model, data)
    if config.process_index == 0:
        print(summary(result))
    _leave_process_group()
    return 0


def parse(argv: Sequence[str]) -> tuple[Any, Any, Any]:
    """Flags and YAML file to (DataArguments, ModelArguments, PairwiseRewardConfig).

    Raises
    ------
    CompanionError
        For an unknown flag or key, which it names with its nearest neighbours, a value of the wrong
        kind, or settings that contradict each other.
    """
    from trl import TrlParser

    from companion.training.config import DataArguments, ModelArguments, PairwiseRewardConfig

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise CompanionError(message, "'companion train pairwise --help' lists every setting")

    settings: Any = (DataArguments, ModelArguments, PairwiseRewardConfig)
    parser = Parser(
        settings,
        prog="companion train pairwise",
        usage="%(prog)s --model_name_or_path BASE --dataset_name PAIRS --output_dir DIR [settings]",
        allow_abbrev=False,
    )
    known = {action.dest for action in parser._actions}
    arguments = _split_equals(argv)
    _check_config(arguments, known)
    flags = {name for action in parser._actions for name in action.option_strings}
    for argument in arguments:
        if argument.startswith("--") and argument not in flags and argument != "--config":
            raise CompanionError(
                f"there is no setting {argument}", _near(argument.lstrip("-"), known, "--")
            )
    try:
        data, model, config = parser.parse_args_and_config(args=arguments)
    except (ValueError, TypeError) as error:
        if isinstance(error, CompanionError):
            raise
        raise CompanionError(
            f"the settings do not fit: {error}",
            "'companion train pairwise --help' lists every setting",
        ) from error
    return data, model, config


def _split_equals(argv: Sequence[str]) -> list[str]:
    """``--name=value`` to ``--name value``, as TRL's parser wants it for --config."""
    out: list[str] = []
    for argument in argv:
        if argument.startswith("--") and "=" in argument:
            out += argument.split("=", 1)
        else:
            out.append(argument)
    return out


def _check_config(arguments: Sequence[str], known: set[str]) -> None:
    """Look at the YAML file before TRL does, whose messages name neither file nor cure."""
    import yaml

    if "--config" not in arguments:
        return
    if arguments.count("--config") > 1:
        raise CompanionError("--config is given twice", "put all settings into one file")
    place = arguments.index("--config") + 1
    if place >= len(arguments) or arguments[place].startswith("--"):
        raise CompanionError("--config needs a file", "--config FILE.yaml")
    path = Path(arguments[place])
    if not path.is_file():
        raise CompanionError(f"{path}: no such file", "give a YAML file")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CompanionError(f"{path}: is no valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise CompanionError(f"{path}: holds no settings", "write lines of the form 'name: value'")
    unknown = [str(key) for key in settings if key not in known | {"env"}]
    if unknown:
        raise CompanionError(
            f"{path}: there is no setting {', '.join(map(repr, unknown))}",
            "; ".join(_near(name, known) for name in unknown),
        )


def _near(name: str, known: set[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), sorted(known), n=3)
    if close:
        return "did you mean " + " or ".join(prefix + c for c in close) + "?"
    return "'companion train pairwise --help' lists every setting"


def _leave_process_group() -> None:
    """End the group of ranks, else torch complains at exit."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
