"""``companion evaluate``: measure a reward model of any kind on held-out rows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from companion.cli.shared import (
    REMOTE,
    add_flags,
    check_target,
    one_or_all,
    open_scorer,
    progress_bar,
    say_noticed,
)
from companion.errors import DataError

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
    add("--dataset_split", default="test", help="split; a single file has but one")
    add("--dataset_config", help="configuration of a hub dataset")
    add_flags(
        parser,
        *(
            "columns",
            "limit",
            "on_error",
            "device",
            "max_tokens_per_batch",
            "packing",
            "max_length",
            "dtype",
        ),
        *("text", "revision", "trust_remote_code", *REMOTE),
        on_error="a row that cannot be read, formatted or scored stops the run, or is left out, "
        "counted and named",
        device="cpu, cuda, …; a GPU is taken if there is one",
        max_tokens_per_batch="tokens computed in a batch; the scorer's own choice if not given",
        packing="auto: no padding, and a pair's prompt computed once, where that is exact for the "
        "model (if not, the log says why); off: padded batches",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    text = "write an HTML report here (not for token-level models)"
    add("--report", type=Path, metavar="FILE", help=text)


def run(args: argparse.Namespace) -> int:
    """Load, score, compute, print; return 0."""
    for target in (args.json, args.report):
        check_target(target)
    from companion.data.sources import source_name
    from companion.scoring import model_kind

    args.dataset_name = one_or_all(args.dataset_name)
    named = source_name(args.dataset_name)
    kind = model_kind(args.model, revision=args.revision)
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
        "split": args.dataset_split,
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


def _load(args: argparse.Namespace, kind: str) -> tuple[Any, str, dict[str, int]]:
    """The rows, of which kind they are, and how many could not be read, by reason."""
    from companion.data.loading import load_rows_with_report
    from companion.evaluation.tokens import ROWS
    from companion.layouts import columns_of

    def load(rows: str) -> Any:
        return load_rows_with_report(
            args.dataset_name,
            kind=rows,
            split=args.dataset_split,
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
