"""``companion data``: make the tutor's data; check, describe, split and convert your own."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from companion.cli.shared import add_fields, add_flags, one_or_all, picked
from companion.data.formats import KINDS, MARGINS
from companion.errors import DataError
from companion.layouts import columns_of

if TYPE_CHECKING:
    from datasets import Dataset

    from companion.data.checking import DataReport
    from companion.data.problems import LoadReport


class _ActionParser(argparse.ArgumentParser):
    """A parser that can add its flags when it is first used.

    The tutor's dials are read from a dataclass whose module needs torch; ``data check`` does not.
    """

    fill: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.fill is not None:
            fill, self.fill = self.fill, None
            fill(self)
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Layouts that are known, besides prompt with chosen and rejected, completion and label, or "
        "completions: Alpaca and LLaMA-Factory (instruction, input, system, history; or "
        "conversations with one message each in chosen and rejected), ms-swift (messages or query, "
        "with rejected_response or rejected_messages), ShareGPT (conversations), axolotl (system, "
        "question), transcripts of hh-rlhf, UltraFeedback, RewardBench 2 (several chosen and "
        "rejected), HelpSteer3 (overall_preference), PKU-SafeRLHF (better_response_id, or "
        "safer_response_id), Chatbot Arena (winner), scores (prompt, response, score: the answers "
        "to one prompt make pairs), PRM800K, Math-Shepherd, content blocks of text. A column that "
        "may hold the prompt and is not read is an error; --columns says what it is."
    )
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, parser_class=_ActionParser
    )

    def action(work: Callable[[argparse.Namespace], int], text: str) -> _ActionParser:
        added: _ActionParser = actions.add_parser(
            work.__name__.lstrip("_"),
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        added.set_defaults(work=work)
        return added

    action(_tutor, "make data of the tutor, whose truth is known").fill = _tutor_arguments

    check = action(
        _check, "check every row, and what good rows hide together; exit code 2 if any is bad"
    )
    check.epilog = (
        "example: companion data check pairs.jsonl --against held-out.jsonl "
        "--tokenizer Qwen/Qwen3-0.6B --max_length 2048"
    )
    _source_arguments(check)
    check.add_argument("--max_errors", type=int, default=20, help="how many bad rows to show")
    text = "rows that must share no prompt with these: a held-out set, a benchmark"
    check.add_argument("--against", metavar="FILE", help=text)
    text = "folder or hub id of a model or tokenizer: which rows does it cut, change or refuse?"
    check.add_argument("--tokenizer", metavar="DIR", help=text)
    add_flags(check, "max_length", max_length="in tokens, with --tokenizer; default: its own")
    check.add_argument("--json", action="store_true", help="print JSON")

    describe = action(_describe, "counts, lengths, labels, and how often the longer one wins")
    _source_arguments(describe, on_error=True)
    describe.add_argument("--json", action="store_true", help="print JSON")

    split = action(_split, "write train.jsonl and test.jsonl that share no prompt")
    _source_arguments(split, on_error=True)
    split.add_argument("--test_fraction", type=float, default=0.1, help="share of the prompts")
    split.add_argument("--seed", type=int, default=0, help="another seed, another split")
    split.add_argument("--by", metavar="COLUMN", help="keep rows together by this column instead")
    split.add_argument("--exact", action="store_true", help="meet the share of rows, not prompts")
    split.add_argument("--output_dir", required=True, help="folder for the parts and split.json")
    add_flags(split, "overwrite", overwrite="replace parts that exist")

    convert = action(_convert, "write rows in the companion's form (also hh-rlhf, UltraFeedback)")
    _source_arguments(convert, on_error=True)
    convert.add_argument("--output", required=True, help=_OUTPUT_HELP)


_OUTPUT_HELP: Final = "file to write: .jsonl, .jsonl.gz, .json, .csv or .parquet"


def _source_arguments(parser: argparse.ArgumentParser, on_error: bool = False) -> None:
    add = parser.add_argument
    text = "file, glob, folder, hub id, several of them, or a mixture (.yaml)"
    add("source", metavar="FILE", nargs="+", help=text)
    kinds, text = ("auto", *KINDS), "what the rows are; auto goes by the columns"
    add("--kind", choices=kinds, default="auto", help=text)
    add("--split", default="train", help="split of a folder or hub dataset; train[:100] works too")
    add("--name", help="configuration of a hub dataset")
    add_flags(parser, "limit", "columns", limit="only the first rows")
    text = "margins: as given, from ratings, none"
    add("--margins", choices=MARGINS, default="given", help=text)
    if on_error:
        add_flags(parser, "on_error", on_error="skip leaves bad rows out and counts them")


def _tutor_arguments(parser: argparse.ArgumentParser) -> None:
    from companion import tutor

    parser.add_argument("--kind", choices=tutor.KINDS, default="pairs", help="what rows to make")
    parser.add_argument("--n", type=int, default=5000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="rows of one seed are always the same")
    parser.add_argument("--output", required=True, help=_OUTPUT_HELP)
    texts = _field_comments(tutor.Dials)
    group = parser.add_argument_group("dials")
    add_fields(group, tutor.Dials, lambda name: texts.get(name, name.replace("_", " ")))


def _field_comments(cls: type) -> dict[str, str]:
    """The ``#:`` comments over the fields of a dataclass: one text for the book and for --help."""
    found = re.findall(r"((?:^ *#: .*\n)+) *(\w+):", inspect.getsource(cls), flags=re.MULTILINE)
    return {
        name: " ".join(line.strip()[2:].strip() for line in block.splitlines()).replace("%", "%%")
        for block, name in found
    }


def run(args: argparse.Namespace) -> int:
    return int(args.work(args))


def _tutor(args: argparse.Namespace) -> int:
    from companion import tutor
    from companion.data.writing import write_rows

    dials = picked(args, *(item.name for item in fields(tutor.Dials)))
    rows = tutor.make_rows(args.kind, args.n, args.seed, **dials)
    if not rows:
        raise DataError(f"--n {args.n} makes no rows", "give a positive number")
    written = write_rows(rows, args.output)
    print(f"{written:,} {args.kind} written to {args.output}")
    if args.kind == "pairs":
        limits = tutor.limits(rows)
        print("no model can do better on these pairs than (the limits, computed from the truth):")
        for name, value in asdict(limits).items():
            print(f"  {name:<16} {_number(value)}")
    return 0


def _number(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " to ".join(map(_number, value))
    return f"{value:.4f}" if isinstance(value, float) else f"{value}"


def _load(args: argparse.Namespace, on_error: str, shown: int = 5) -> tuple[Dataset, LoadReport]:
    from companion.data.loading import load_rows_with_report

    return load_rows_with_report(
        one_or_all(args.source),
        columns=columns_of(args.columns),
        on_error=on_error,
        max_problems=shown,
        **picked(args, "kind", "split", "name", "limit", "margins"),
    )


def _check(args: argparse.Namespace) -> int:
    import logging

    from companion.data.checking import check_rows
    from companion.data.loading import load_rows_with_report
    from companion.data.splits import dataset_fingerprint

    if args.max_length is not None and args.tokenizer is None:
        raise DataError("--max_length counts tokens", "give --tokenizer too")
    loading = logging.getLogger("companion.data.loading")
    loading.disabled = True  # it is printed below
    try:
        dataset, report = _load(args, "skip", args.max_errors)
    finally:
        loading.disabled = False
    against, other = None, None
    if args.against is not None:
        against, other = load_rows_with_report(args.against, kind="auto", on_error="skip")
    found = check_rows(dataset, against=against)
    if args.tokenizer is not None:
        _check_tokens(args, dataset, found)
    sha256 = dataset_fingerprint(dataset)
    if args.json:
        parts = {
            "load": report.as_dict(),
            "against": other and other.as_dict(),
            **found.as_dict(),
            "sha256": sha256,
        }
        print(json.dumps(parts, ensure_ascii=False, indent=2))
    else:
        for load in filter(None, (report, other)):
            print(load.summary())
        print(found)
    unusable = [finding for finding in found.findings if finding.unusable]
    if report.bad or unusable:
        bad = report.bad + sum(finding.rows for finding in unusable)
        cures = "\n    ".join([*report.cures(), *(finding.cure for finding in unusable)])
        print(f"error: {bad:,} bad rows\n  Cure: {cures}", file=sys.stderr)
        return 2
    if not args.json:
        print(f"all rows are good; sha256 {sha256}")
    return 0


_OF_MODELS: Final = ("config.json", "adapter_config.json")


def _check_tokens(args: argparse.Namespace, dataset: Dataset, found: DataReport) -> None:
    from companion.cli.shared import progress_bar
    from companion.data.checking import check_tokens
    from companion.formatting import RewardFormatter
    from companion.models import load_formatter
    from companion.models.checkpoint import load_tokenizer

    folder = Path(args.tokenizer)
    if folder.is_dir() and not any((folder / name).is_file() for name in _OF_MODELS):
        formatter = RewardFormatter(load_tokenizer(args.tokenizer))  # a tokenizer alone
    else:
        formatter, *_ = load_formatter(args.tokenizer)
    with progress_bar("Tokenising", "rows", len(dataset)) as bar:
        moved = bar["progress"]
        check_tokens(dataset, formatter, found, max_length=args.max_length, progress=moved)


def _describe(args: argparse.Namespace) -> int:
    from companion.data.describe import describe_lines, describe_rows

    dataset, report = _load(args, args.on_error)
    description = describe_rows(dataset, report.kind)
    if args.json:
        print(json.dumps(description | {"load": report.as_dict()}, ensure_ascii=False, indent=2))
    else:
        print("\n".join(describe_lines(description)))
    return 0


def _split(args: argparse.Namespace) -> int:
    from companion.data.splits import (
        dataset_fingerprint,
        overlap_report,
        prompt_key,
        split_by_prompt,
    )
    from companion.data.writing import check_output, write_rows, write_text

    folder = Path(args.output_dir)
    paths = {name: folder / f"{name}.jsonl" for name in ("train", "test")}
    there = [str(path) for path in paths.values() if path.exists()]
    if there and not args.overwrite:
        raise DataError(f"{', '.join(there)} exists", "give another --output_dir, or --overwrite")
    dataset, report = _load(args, args.on_error)
    for path in paths.values():
        check_output(path, args.source, regular=True)
    train, test = split_by_prompt(
        dataset, args.test_fraction, seed=args.seed, key=args.by or prompt_key, exact=args.exact
    )
    for name, part in (("train", train), ("test", test)):
        write_rows(part, paths[name])
    overlap = overlap_report(train, test)
    record = {
        "load": report.as_dict(),
        **picked(args, "test_fraction", "seed"),
        "by": args.by or "prompt",
        "exact": args.exact,
        "overlap": overlap.as_dict(),
        "sha256": {"train": dataset_fingerprint(train), "test": dataset_fingerprint(test)},
    }
    text = json.dumps(record, ensure_ascii=False, indent=2)
    write_text(folder / "split.json", text + "\n")
    print(f"{overlap}\nwritten to {folder}: train.jsonl, test.jsonl, split.json")
    if not overlap.clean:
        print(f"warning: split by {args.by!r}, prompts stand in both parts", file=sys.stderr)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from companion.data.writing import check_output, write_rows

    check_output(args.output, args.source)
    dataset, report = _load(args, args.on_error)
    written = write_rows(dataset, args.output)
    print(f"{written:,} {report.kind} written to {args.output}")
    return 0
