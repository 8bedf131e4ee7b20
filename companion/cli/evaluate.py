"""``companion evaluate``: measure a reward model of any kind on held-out rows."""

from __future__ import annotations

import argparse
import contextlib
import sys
from itertools import islice
from pathlib import Path
from typing import Any, Final

from companion.cli.judge import add_asking, open_judge
from companion.cli.shared import (
    READING,
    REMOTE,
    add_flags,
    check_target,
    one_or_all,
    open_scorer,
    picked,
    progress_bar,
    raw_rows,
    read_as,
    say_noticed,
)
from companion.errors import DataError

#: those of companion.evaluation.BENCHMARKS, for a help that imports nothing heavy
_BENCHMARKS: Final = (
    *("rewardbench", "rewardbench2", "rmbench", "judgebench", "ppe"),
    *("processbench", "prmbench"),
)
#: what a launcher starts of it work together, as `args.processes`
SHARES_WORK: Final = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a reward model: folder or hub id")
    add(
        "--dataset_name",
        required=True,
        nargs="+",
        metavar="DATA",
        help="pairs or rankings, outcomes for an outcome model, steps for a process model: a file "
        "(.jsonl, .jsonl.gz, .parquet, .csv), a glob, a folder, a hub id, several of them, or a "
        "mixture (.yaml)",
    )
    add(
        "--dataset_split",
        help="split; default: test, or those of the benchmark; a single file has but one",
    )
    add("--dataset_config", help="configuration of a hub dataset")
    add_flags(
        parser,
        *("columns", "limit", "on_error", "device", "max_tokens_per_batch", "packing"),
        *("max_length", "dtype", "text", "revision", "trust_remote_code", "device_map"),
        "load_in_4bit",
        *READING,
        *REMOTE,
        on_error="a row that cannot be read, formatted or scored stops the run, or is left out, "
        "counted and named",
        device="cpu, cuda, …; a GPU is taken if there is one",
        max_tokens_per_batch="tokens computed in a batch; the scorer's own choice if not given",
        packing="auto: no padding, and a pair's prompt computed once, where that is exact for the "
        "model (if not, the log says why); off: padded batches",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    add(
        "--benchmark",
        metavar="NAME",
        help="the rows are of a published benchmark, in its own schema, and its figure is formed "
        f"as published: {', '.join(_BENCHMARKS)}",
    )
    add(
        "--judge",
        metavar="TEMPLATE",
        help="with --benchmark: MODEL is a language model, asked as a judge with this template "
        "(pairwise, pointwise, a file, or the prompt itself)",
    )
    add(
        "--cache",
        metavar="FILE",
        help="of the judge's answers, with which a run that was stopped goes on; default: the name "
        "of --json and .cache",
    )
    add_asking(parser, "a judge behind a server")
    text = "write an HTML report here (not for token-level models)"
    add("--report", type=Path, metavar="FILE", help=text)
    parser.epilog = (
        "Example: companion evaluate --model reward-model --dataset_name pairs.jsonl --json "
        "figures.json; companion evaluate --model reward-model --benchmark rewardbench "
        "--dataset_name allenai/reward-bench"
    )


def run(args: argparse.Namespace) -> int:
    """Load, score, compute, print; return 0."""
    for target in (args.json, args.report):
        check_target(target, args.dataset_name)
    from companion.data.sources import source_name
    from companion.scoring import model_kind

    args.dataset_name = one_or_all(args.dataset_name)
    named = source_name(args.dataset_name)
    if args.benchmark is not None:
        return _benchmark(args, named)
    for name in ("judge", "base_url", "cache"):
        if getattr(args, name) is not None:
            raise DataError(f"--{name} goes with --benchmark", "companion judge judges other rows")
    kind = model_kind(args.model, revision=args.revision, read_as=read_as(args))
    if args.report is not None and kind != "scalar":
        raise DataError(
            f"{args.model}: there is no HTML report for a model of the kind {kind}", "take --json"
        )
    # The data first: a wrong path is found in a moment, a model may take minutes.
    rows, row_kind, skipped = _load(args, kind)
    scorer = open_scorer(args)
    scorer.processes = args.processes
    said = len(scorer.notes)
    from companion import __version__

    info = {
        "model": args.model,
        "dataset": named,
        "split": args.dataset_split or "test",
        "config": args.dataset_config,
        "row_limit": args.limit,
        "rows": row_kind,
        "companion": __version__,
    }
    if args.url:
        info["url"] = args.url
    if skipped:
        info["skipped"] = skipped
    result = _evaluate(scorer, rows, row_kind, info, args.on_error)
    if args.processes is not None and not args.processes.is_main_process:
        return 0
    print(f"{args.model} on {named}\n\n{result.table()}")
    say_noticed(scorer, said)
    dropped = result.metrics["dropped"]
    noun = "pairs" if row_kind == "rankings" else row_kind
    for reason, count in dropped["reasons"].items():
        print(
            f"dropped {count:,} of {result.metrics['n_rows']:,} {noun}: {reason}", file=sys.stderr
        )
    if args.json is not None:
        print(f"\nfigures: {result.save(args.json)}")
    if args.report is not None:
        from companion.evaluation.report import write_report

        title = f"{Path(args.model).name or args.model} on {Path(named).name}"
        print(f"report: {write_report(args.report, title=title, evaluation=result, run_info=info)}")
    return 0


def _benchmark(args: argparse.Namespace, named: str) -> int:
    """A published benchmark: load, ask, compute, print; return 0."""
    from companion import __version__
    from companion.evaluation import evaluate_benchmark

    if args.report is not None:
        raise DataError("--benchmark has no HTML report", "take --json")
    rows, names = _benchmark_rows(args)
    info = {
        **picked(args, "model", "benchmark", "judge"),
        "dataset": named,
        "row_limit": args.limit,
        "companion": __version__,
    }
    if url := args.url or args.base_url:
        info["url"] = url
    with contextlib.ExitStack() as stack:
        if args.judge is None:
            for name in ("base_url", "cache"):
                if getattr(args, name) is not None:
                    raise DataError(f"--{name} is of a judge", "name its template: --judge")
            model = open_scorer(args)
            model.processes = args.processes
        else:
            model = stack.enter_context(_open_judge(args))
        said = 0 if args.judge else len(model.notes)
        unit = "answers" if args.judge else "texts"
        moved = stack.enter_context(progress_bar("scoring", unit))
        how = {"names": names, "on_error": args.on_error, "info": info}
        result = evaluate_benchmark(model, rows, args.benchmark, **how, **moved)
    if args.processes is not None and not args.processes.is_main_process:
        return 0
    print(f"{args.model} on {named}\n\n{result.table()}")
    if not args.judge:
        say_noticed(model, said)
    for reason, count in result.metrics["dropped"]["reasons"].items():
        print(f"dropped {count:,} of {result.metrics['n_rows']:,} rows: {reason}", file=sys.stderr)
    if args.json is not None:
        print(f"\nfigures: {result.save(args.json)}")
    return 0


def _open_judge(args: argparse.Namespace) -> Any:
    from companion.judge import load_template

    if args.url:
        raise DataError("--url names a server that scores", "a judge's is --base_url")
    if args.processes is not None:
        raise DataError("a judge's questions are not shared among processes", "start one process")
    cache = args.cache or (None if args.json is None else f"{args.json}.cache")
    return open_judge(args, load_template(args.judge), cache)


def _benchmark_rows(args: argparse.Namespace) -> tuple[list[Any], list[str]]:
    """The rows as they are, and how they are called in errors."""
    from companion.data.sources import open_source
    from companion.evaluation.benchmarks.catalogue import find_benchmark
    from companion.layouts import columns_of

    benchmark = find_benchmark(args.benchmark)
    if args.limit is not None and args.limit < 1:
        raise DataError(f"limit={args.limit} keeps no rows", "give a positive number")
    splits = [args.dataset_split] if args.dataset_split else list(benchmark.splits)
    if (
        isinstance(args.dataset_name, str) and Path(args.dataset_name).is_file()
    ):  # it is all splits in one
        splits = splits[:1]
    columns = columns_of(args.columns)
    found: list[tuple[str, Any]] = []
    for split in splits:
        source, records = open_source(
            args.dataset_name, split=split, name=args.dataset_config, revision=None, rename=columns
        )
        rest = None if args.limit is None else args.limit - len(found)
        found += islice(raw_rows(records, source, columns, on_error=args.on_error), rest)
    return [row for _, row in found], [where for where, _ in found]


def _load(args: argparse.Namespace, kind: str) -> tuple[Any, str, dict[str, int]]:
    """The rows, of which kind they are, and how many could not be read, by reason."""
    from companion.data.loading import load_rows_with_report
    from companion.evaluation.tokens import ROWS
    from companion.layouts import columns_of

    def load(rows: str) -> Any:
        return load_rows_with_report(
            args.dataset_name,
            kind=rows,
            split=args.dataset_split or "test",
            name=args.dataset_config,
            limit=args.limit,
            columns=columns_of(args.columns),
            on_error=args.on_error,
        )

    rows, report = load(ROWS.get(kind, "auto"))
    if kind == "scalar" and report.kind == "scores":
        rows, report = load("pairs")  # of the answers to one prompt
    if kind == "scalar" and report.kind not in ("pairs", "rankings"):
        raise DataError(
            f"{args.dataset_name}: holds {report.kind}, but {args.model} gives one score a text",
            "evaluate it on pairs or rankings",
        )
    return rows, report.kind, dict(report.skipped)


def _evaluate(scorer: Any, rows: Any, kind: str, info: dict[str, Any], on_error: str) -> Any:
    """The figures that belong to the kind of the rows."""
    from companion.evaluation.pairs import evaluate_pairs
    from companion.evaluation.rankings import evaluate_rankings
    from companion.evaluation.tokens import evaluate_tokens

    evaluate: Any = evaluate_tokens
    total = len(rows)
    if kind == "pairs":
        evaluate, total = evaluate_pairs, 2 * total
    elif kind == "rankings":
        evaluate, total = evaluate_rankings, sum(map(len, rows["completions"]))
    if scorer.processes is not None:  # the bar is that of the first process
        total = -(-total // scorer.processes.num_processes)
    with progress_bar("scoring", "texts", total) as moved:
        return evaluate(scorer, rows, info=info, on_error=on_error, progress=moved["progress"])
