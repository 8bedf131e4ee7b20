"""``companion train KIND``: every field of the settings is a flag or a line of a YAML file.

Started by ``accelerate launch -m companion train KIND …`` or ``torchrun … -m companion train KIND
…`` the same command trains on many devices.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_type_hints

from companion._exports import no_collection
from companion.cli.shared import leave_process_group
from companion.errors import CompanionError
from companion.training.kind import KINDS, load_kind

#: what is no training of a reward model, and what it trains
GRPO = "grpo", "a policy against a reward model, watched for over-optimisation"
_USAGE = """usage: companion train KIND --model_name_or_path BASE --dataset_name ROWS \\
           --output_dir DIR [--config FILE.yaml] [any other setting]

kinds:
{kinds}

  BASE   a folder or a hub id, e.g. Qwen/Qwen3-0.6B; for grpo the policy
  ROWS   a .jsonl, .jsonl.gz, .parquet or .csv file, a folder, or a hub id
  DIR    becomes a plain Hugging Face checkpoint with reward_manifest.json

Settings of --config are overridden by flags. 'companion train KIND --help' lists them all.
SIGTERM saves a checkpoint first; --resume_from_checkpoint auto goes on from it, or begins.
Exit codes: 0 done, 2 bad input or a full disk, 143 ended by SIGTERM with a checkpoint.
"""


def run_argv(argv: Sequence[str]) -> int:
    """Run ``companion train …`` with what follows ``train``; return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<10}{what}" for name, what in purposes().items()]
        print(_USAGE.format(kinds="\n".join(lines)))
        return 0 if argv else 2
    if argv[0] not in purposes():
        raise CompanionError(
            f"there is no training of the kind {argv[0]!r}", f"there are: {', '.join(purposes())}"
        )
    before_process_group()
    with no_collection():
        training = _load(argv[0])
    gc.freeze()  # accelerate collects before each training: 0.6 s to walk what is imported
    data, model, config = parse(argv[1:], argv[0])
    result = training.run(config, model, data)
    if config.process_index == 0:
        print(result.summary())
    del result  # and with it the trainer and its model under DDP, which hold the group
    leave_process_group()
    return 0


def purposes() -> dict[str, str]:
    """What can be trained, and what each is."""
    return {**{name: what for name, (_, what) in KINDS.items()}, GRPO[0]: GRPO[1]}


class Training(NamedTuple):
    """What is asked for: what --dataset_name holds, the classes of the settings, what runs."""

    rows: str
    data: type
    model: type
    config: type
    run: Callable[..., Any]


def _load(name: str) -> Training:
    if name == GRPO[0]:
        from companion.rl.config import GRPORunConfig, PolicyArguments, PromptArguments
        from companion.rl.run import train_grpo

        return Training("PROMPTS", PromptArguments, PolicyArguments, GRPORunConfig, train_grpo)
    from companion.training.config import ModelArguments
    from companion.training.run import train

    kind = load_kind(name)
    settings = kind.data, ModelArguments, kind.trainer.config_class
    return Training(kind.rows.upper(), *settings, partial(train, kind))


def parse(
    argv: Sequence[str], kind: str = "pairwise", defaults: Mapping[str, Any] | None = None
) -> tuple[Any, Any, Any]:
    """Flags and YAML file to the data arguments, model arguments and settings of the kind.

    `defaults` stand in place of those of the settings; flags and file win over them.

    Raises
    ------
    CompanionError
        For an unknown flag or key, which it names with its nearest neighbours, a value of the wrong
        kind, or settings that contradict each other.
    """
    from trl import TrlParser

    training = _load(kind)
    help_line = f"'companion train {kind} --help' lists every setting"

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise CompanionError(message, help_line)

    settings: Any = (training.data, training.model, training.config)
    parser = Parser(
        settings,
        prog=f"companion train {kind}",
        usage=f"%(prog)s --model_name_or_path BASE --dataset_name {training.rows} --output_dir DIR "
        "[settings]",
        allow_abbrev=False,
    )
    parser.set_defaults_with_config(**(defaults or {}))
    known = {action.dest for action in parser._actions}
    missing = {
        own.name: own.metadata["not_offered"]
        for own in fields(training.config)
        if "not_offered" in own.metadata
    }
    arguments = _split_equals(argv)
    # (of the classes: HfArgumentParser writes other types into their fields)
    hints = [get_type_hints(cls) for cls in settings]
    takes = {name: str(hint) for own in hints for name, hint in own.items()}
    _check_config(arguments, parser, takes, known, missing, help_line)
    flags = {name for action in parser._actions for name in action.option_strings}
    for argument in arguments:
        if argument.startswith("--") and argument not in flags and argument != "--config":
            name = argument.lstrip("-").replace("-", "_")
            raise CompanionError(
                f"there is no setting {argument}",
                missing.get(name) or _near(name, known, help_line, "--"),
            )
    try:
        data, model, config = parser.parse_args_and_config(args=arguments)
    except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        if isinstance(error, CompanionError):
            raise
        raise CompanionError(f"the settings do not fit: {error}", help_line) from error
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


def _check_config(
    arguments: Sequence[str],
    parser: argparse.ArgumentParser,
    takes: Mapping[str, str],
    known: set[str],
    missing: Mapping[str, str],
    help_line: str,
) -> None:
    """Look at the YAML file before TRL does, whose messages name neither file nor cure.

    A value of YAML becomes a default, which argparse looks at only if it is a text: `max_steps:
    1.5` would train for one and a half steps.
    """
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
    except (yaml.YAMLError, ValueError) as error:
        raise CompanionError(f"{path}: is no valid YAML: {error}", "mend the file") from error
    except RecursionError as error:
        raise CompanionError(f"{path}: is nested too deeply", "write 'name: value'") from error
    if not isinstance(settings, dict):
        raise CompanionError(f"{path}: holds no settings", "write lines of the form 'name: value'")
    unknown = [str(key) for key in settings if key not in known | {"env"}]
    if unknown:
        raise CompanionError(
            f"{path}: there is no setting {', '.join(map(repr, unknown))}",
            "; ".join(missing.get(name) or _near(name, known, help_line) for name in unknown),
        )
    for action in parser._actions:
        value = settings.get(action.dest)
        kind = takes.get(action.dest, "")
        one_text = "str" in kind and "list" not in kind
        several = action.nargs is not None and isinstance(value, str) and one_text
        if several or ("dict" in kind and isinstance(value, dict)):
            continue
        if action.dest in settings:
            _check_value(path, action, value)
    _say_environment(path, settings.get("env"))


def _check_value(path: Path, action: argparse.Action, value: Any) -> None:
    """Refuse a value of YAML that the flag would not take."""
    cure = f"write it as the flag --{action.dest} takes it"
    if value is None:
        if action.default is not None or action.dest == "output_dir":
            raise CompanionError(f"{path}: {action.dest} is null", f"{cure}, or leave the line out")
        return
    # (a text is read as that of the flag; what is no number or truth, transformers reads by itself)
    own = {int: (int, float), float: (int, float), str: (int, float)}.get(action.type)  # type: ignore[call-overload]
    if getattr(action.type, "__name__", "") == "string_to_bool":
        own = (bool,)
    several = action.nargs in ("+", "*")
    if several and not isinstance(value, list):
        raise CompanionError(
            f"{path}: {action.dest} is {_shown(value)}", "write a list: [one, two]"
        )
    for item in value if several else [value]:
        if isinstance(item, date):  # 2026-01-01, which YAML reads by itself
            raise CompanionError(f"{path}: {action.dest} is a date, {item}", "put it in quotes")
        if isinstance(item, (list, dict)):
            raise CompanionError(f"{path}: {action.dest} is {_shown(item)}", cure)
        if own is not None and not isinstance(item, str):
            if not isinstance(item, own) or isinstance(item, bool) != (own == (bool,)):
                raise CompanionError(f"{path}: {action.dest} is {_shown(item)}", cure)
            if action.type is int and isinstance(item, float):
                raise CompanionError(
                    f"{path}: {action.dest} is {_shown(item)}", "give a whole number"
                )
        if action.choices is not None and str(item) not in map(str, action.choices):
            raise CompanionError(
                f"{path}: {action.dest} is {_shown(item)}",
                f"take one of: {', '.join(map(str, action.choices))}",
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _say_environment(path: Path, env: Any) -> None:
    """Say which variables a file sets: `env:` changes what libraries do, and shows nowhere else."""
    if env is None:
        return
    good = isinstance(env, dict) and all(
        isinstance(name, str)
        and name
        and "=" not in name
        and "\0" not in f"{name}{value}"
        and isinstance(value, (str, int, float))
        for name, value in env.items()
    )
    if not good:
        raise CompanionError(f"{path}: env is {_shown(env)}", "write lines of 'NAME: value'")
    if int(os.environ.get("RANK", "0")) == 0:
        given = ", ".join(f"{name}={value}" for name, value in env.items())
        print(f"note: {path} sets in the environment: {given}", file=sys.stderr)


def _near(name: str, known: set[str], help_line: str, prefix: str = "") -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), sorted(known), n=3)
    if close:
        return "did you mean " + " or ".join(prefix + c for c in close) + "?"
    return help_line


#: modules with ``group=dist.group.WORLD`` as a default of functions (torch 2.13, DeepSpeed 0.19)
_WITH_GROUP = (
    "torch.distributed.nn.functional",
    "torch.distributed.optim.zero_redundancy_optimizer",
    "torch.distributed.fsdp.sharded_grad_scaler",
    "deepspeed.comm.torch",
)


def before_process_group() -> None:
    """Import what would own the group of ranks for ever, if DDP or accelerate imported it later."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        for name in _WITH_GROUP:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
