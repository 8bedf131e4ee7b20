"""What several commands share: flags, loading, the progress bar, files to write."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, get_type_hints

from companion.errors import DataError

#: flag -> its declaration; a command may give it a text of its own
_FLAGS: Final[dict[str, dict[str, Any]]] = {
    "columns": {
        "nargs": "+",
        "default": [],
        "metavar": "OLD=NEW",
        "help": "rename columns (question=prompt), or leave one out (context=); a known layout "
        "needs none",
    },
    "limit": {"type": int, "help": "take the first rows only"},
    "on_error": {"choices": ("raise", "skip"), "default": "raise"},
    "overwrite": {"action": "store_true", "help": "begin anew"},
    "max_length": {"type": int, "help": "in tokens, in place of the model's own"},
    "overlong": {
        "choices": ("drop", "error", "truncate_prompt"),
        "help": "what to do with longer rows",
    },
    "text": {
        "choices": ("chat", "plain"),
        "help": "how a prompt and completion of text are read, in place of what the model says. "
        "chat: as a question and its answer, in the chat template; plain: as they are",
    },
    "max_tokens_per_batch": {"type": int, "help": "tokens of a batch"},
    "packing": {
        "choices": ("auto", "off"),
        "default": "auto",
        "help": "auto: no padding, and a shared prompt computed once, where that is exact for the "
        "model (if not, the log says why); off: padded batches",
    },
    "device": {"help": "default: the GPU if there is one"},
    "device_map": {
        "metavar": "MAP",
        "help": "for transformers, in place of --device: auto spreads a large model over all GPUs",
    },
    "load_in_4bit": {
        "action": "store_true",
        "help": "weights in 4 bits (bitsandbytes), the head in float32: other scores",
    },
    "dtype": {
        "choices": ("auto", "float32", "bfloat16", "float16"),
        "default": "auto",
        "help": "of the weights; auto: bfloat16 on a GPU that has it, else float32",
    },
    "url": {
        "action": "append",
        "metavar": "URL",
        "help": "score on a server, http://host:port, that runs the model of --model, of which "
        "only the tokenizer and the manifest are read here; several times for several servers",
    },
    "protocol": {
        "choices": ("classify", "companion"),
        "help": "what the server of --url speaks: classify, vLLM's route, which the companion's "
        "server knows too (default); or companion, its own, which also says which version of the "
        "model answers, and carries outcome and process models",
    },
    "api_key_env": {
        "metavar": "NAME",
        "help": "environment variable with the server's key; default: COMPANION_REWARD_API_KEY, "
        "if it is set",
    },
    "readout": {
        "choices": ("mask", "transformers"),
        "help": "of a published model whose pad token is its EOS: mask reads its score at the last "
        "token, the EOS if there is one; transformers at the last that is not the pad, as "
        "transformers and TRL do",
    },
    "attribute": {
        "metavar": "NAME",
        "help": "of a published model with several scores: which one, by name or number",
    },
    "attribute_weights": {
        "nargs": "+",
        "type": float,
        "metavar": "W",
        "help": "or what each of them counts",
    },
    "reward_token": {
        "nargs": "+",
        "metavar": "TOKEN",
        "help": "of a causal LM: the token whose logit as the next one is the score (Yes, + or "
        "id:123); with a second, the first against that one",
    },
    "reward_value": {
        "choices": ("logit", "probability"),
        "default": "logit",
        "help": "what of --reward_token is the score",
    },
    "step_separator": {
        "metavar": "TEXT",
        "help": "of a published process model: what ends each step",
    },
    "revision": {"help": "of a hub id"},
    "trust_remote_code": {
        "action": "store_true",
        "help": "run the model's code (read it first)",
    },
}
#: those that say how a checkpoint that others published is read (:class:`ReadAs`)
READING: Final = (
    *("readout", "attribute", "attribute_weights", "reward_token", "reward_value"),
    "step_separator",
)
#: those that loading a model takes
_LOADING: Final = (
    *("max_length", "overlong", "text", "max_tokens_per_batch", "packing"),
    *("device", "dtype", "device_map", "load_in_4bit", "revision", "trust_remote_code"),
)
#: those that mean something only where the model is
_LOCAL: Final = (
    *("device", "dtype", "device_map", "load_in_4bit", "packing", "compile"),
    "max_tokens_per_batch",
)
#: those that name a server
REMOTE: Final = ("url", "protocol", "api_key_env")


class HelpWithExamples(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Help with the defaults, and with an epilog whose lines stay as they are."""


def add_flags(parser: Any, *names: str, **texts: str | None) -> None:
    """Declare shared flags; `texts` replaces the help of some."""
    for name in names:
        text = {"help": texts[name]} if name in texts else {}
        parser.add_argument(f"--{name}", **(_FLAGS[name] | text))


def add_fields(parser: Any, cls: Any, text_of: Callable[[str], str]) -> None:
    """A flag for each field of a dataclass, with its default."""
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind: dict[str, Any] = {"type": hints[item.name]}
        if kind["type"] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{item.name}", default=item.default, help=text_of(item.name), **kind)


def one_or_all(names: list[str]) -> str | list[str]:
    """What a flag with several values holds: the value, if there is one alone."""
    return names[0] if len(names) == 1 else names


def picked(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some of the flags, as keyword arguments."""
    return {name: getattr(args, name) for name in names}


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of this command that loading a model takes."""
    given = picked(args, *(name for name in _LOADING if hasattr(args, name)))
    if hasattr(args, READING[0]):
        given["read_as"] = read_as(args)
    return given


def read_as(args: argparse.Namespace) -> Any:
    """What the flags say of how a published checkpoint is read; None for nothing."""
    from companion.models.readout import ReadAs

    said = ReadAs(**picked(args, *READING))
    return None if said == ReadAs() else said


def open_scorer(args: argparse.Namespace, *, also_local: bool = False) -> Any:
    """The scorer of ``--model``, here or at ``--url``; says what was repaired or assumed.

    With `also_local`, the command runs another model here too, which the flags of one are for.
    """
    if not args.url:
        for name in REMOTE:
            if getattr(args, name) is not None:
                raise DataError(f"--{name} says something of a server", "give its --url too")
        from companion.scoring import load_scorer

        scorer: Any = load_scorer(args.model, **loading(args))
    else:
        scorer = _open_remote(args, also_local)
    say_notes(scorer)
    return scorer


def _open_remote(args: argparse.Namespace, also_local: bool) -> Any:
    from companion.scoring import RemoteScorer

    for name in () if also_local else _LOCAL:
        default = _FLAGS.get(name, {}).get("default")
        if getattr(args, name, default) not in (default, False):
            raise DataError(
                f"--{name} is for a model that is loaded here, and --url names a server",
                f"leave out --{name}, and set it where the server is started",
            )
    key = None
    if args.api_key_env is not None and not (key := os.environ.get(args.api_key_env)):
        raise DataError(
            f"--api_key_env: the environment has no {args.api_key_env}", "set it to the key"
        )
    reading = ("max_length", "overlong", "text", "revision", "trust_remote_code")
    return RemoteScorer.from_pretrained(
        args.url,
        args.model,
        protocol=args.protocol or "classify",
        api_key=key,
        **picked(args, *(name for name in reading if hasattr(args, name))),
        **({"read_as": read_as(args)} if hasattr(args, READING[0]) else {}),
    )


def raw_rows(
    records: Any, source: str, columns: dict[str, str], *, on_error: str = "raise"
) -> Iterator[tuple[str, Any]]:
    """Place and row of the records of a source, as they are but for renamed columns.

    With ``skip`` a record that cannot be read is said and left out.
    """
    from companion.data.problems import RowError, RowProblem
    from companion.layouts import rename_columns

    for where, row in records:
        if not isinstance(row, RowError):
            yield where, rename_columns(row, columns, where) if columns else dict(row)
            continue
        problem = RowProblem.of(row, where)
        if on_error == "raise":
            raise problem.as_error() from row
        print(f"left out: {source}: {problem}", file=sys.stderr)


def say_notes(loaded: Any) -> None:
    """Say what a scorer, a policy or a judge noted when it was loaded."""
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)


def say_noticed(scorer: Any, said: int = 0) -> None:
    """Say what came up on the way: the notes after the first `said`, and what was counted."""
    lines = [f"note: {note}" for note in scorer.notes[said:]]
    for line in [*lines, *scorer.formatter.counts.remarks()]:
        print(line, file=sys.stderr)


def load_texts(
    data: str, split: str, limit: int | None, columns: list[str], *, as_they_are: bool = False
) -> tuple[Any, list[str] | None, str]:
    """Rows to score, how they are called in errors, and what they are, in words.

    Pairs as pairs, rankings too; anything else as it is, and all rows if `as_they_are` (whose
    ``completions`` are steps).
    """
    from companion.data.formats import detect_kind
    from companion.data.loading import load_rows_with_report
    from companion.data.sources import open_source
    from companion.layouts import columns_of

    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} keeps no rows", "give a positive number")
    label = Path(data).name
    if Path(data).is_dir() or not Path(data).exists():
        label += f" ({split})"
    if limit:
        label = f"the first {limit:,} rows of {label}"
    renamed = columns_of(columns)
    source, records = open_source(data, split=split, name=None, revision=None, rename=renamed)
    found = raw_rows(records, source, renamed)
    first = list(islice(found, 1))
    if not first:
        raise DataError(f"{data}: empty, no rows", "check the file and the split")
    try:
        kind = detect_kind(first[0][1])
    except DataError:  # messages, or a text
        kind = "texts"
    if kind in ("pairs", "rankings") and not as_they_are:
        pairs, _ = load_rows_with_report(
            data, kind="pairs", split=split, limit=limit, columns=renamed
        )
        return list(pairs), None, label
    texts = [*first, *islice(found, None if limit is None else limit - 1)]
    return [row for _, row in texts], [where for where, _ in texts], label


def leave_process_group() -> None:
    """End the group of ranks, and with its last owner the threads of gloo.

    Such a thread frees the tensors of a collective after it has returned, for which it needs the
    GIL. One that asks for it when the interpreter is already ending aborts the process ("terminate
    called without an active exception", pytorch #190489). ``destroy_process_group`` waits for the
    threads only if nothing else owns the group.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """The processes that a launcher started, of which the first alone speaks."""
    from companion.scoring import launched_processes

    processes = launched_processes()
    assert processes is not None
    with contextlib.ExitStack() as stack:
        if not processes.is_main_process:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        yield processes
    leave_process_group()


@contextlib.contextmanager
def progress_bar(what: str, unit: str, total: int | None = None) -> Iterator[dict[str, Any]]:
    """A bar on stderr, as the arguments ``progress`` and ``on_total`` that move it."""
    from tqdm.auto import tqdm

    with tqdm(desc=what, total=total, unit=f" {unit}", file=sys.stderr) as bar:
        yield {"progress": bar.update, "on_total": lambda n: bar.reset(total=n)}


def check_target(path: Path | str | None, *inputs: Any, regular: bool = False) -> None:
    """:func:`companion.data.writing.check_output`; nothing for no path."""
    if path is not None:
        from companion.data.writing import check_output

        check_output(path, *inputs, regular=regular)
