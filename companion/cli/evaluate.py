"""``companion evaluate``: measure a reward model on held-out pairs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from companion.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a reward model: folder or hub id")
    add(
        "--dataset_name",
        required=True,
        metavar="DATA",
        help="pairs: a file (.jsonl, .jsonl.gz, .parquet, .csv), a folder, or a hub id",
    )
    add("--dataset_split", default="test", help="split; a single file has but one")
    add("--dataset_config", default=None, help="configuration of a hub dataset")
    add("--limit", type=int, default=None, help="take the first rows only")
    add("--device", default=None, help="cpu, cuda, …; a GPU is taken if there is one")
    add(
        "--max_tokens_per_batch",
        type=int,
        default=None,
        help="tokens computed in a batch; the scorer's own choice if not given",
    )
    add("--max_length", type=int, default=None, help="in tokens, in place of the model's own")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights",
    )
    add("--revision", default=None, help="of a hub id")
    add("--trust_remote_code", action="store_true", help="run the hub's model code")
    add("--json", type=Path, default=None, metavar="FILE", help="write all figures here")
    add("--report", type=Path, default=None, metavar="FILE", help="write an HTML report here")


def _check_target(path: Path | None) -> None:
    """Fail before the scoring, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise DataError(f"{path} is a folder", "name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {path.parent}: {error.strerror}") from error


def run(args: argparse.Namespace) -> int:
    """Load, score, compute, print; return 0."""
    for target in (args.json, args.report):
        _check_target(target)
    from tqdm.auto import tqdm

    from companion import __version__
    from companion.data.loading import load_rows
    from companion.evaluation import evaluate_pairs
    from companion.scoring import RewardScorer

    # The data first: a wrong path is found in a moment, a model may take minutes.
    rows = load_rows(
        args.dataset_name,
        kind="pairs",
        split=args.dataset_split,
        name=args.dataset_config,
        limit=args.limit,
    )
    scorer = RewardScorer.from_pretrained(
        args.model,
        device=args.device,
        dtype=args.dtype,
        max_tokens_per_batch=args.max_tokens_per_batch,
        max_length=args.max_length,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    for note in scorer.notes:
        print(f"note: {note}", file=sys.stderr)
    info = {
        "model": args.model,
        "dataset": args.dataset_name,
        "split": args.dataset_split,
        "config": args.dataset_config,
        "row_limit": args.limit,
        "companion": __version__,
    }
    with tqdm(desc="scoring", total=2 * len(rows), unit=" texts", file=sys.stderr) as bar:
        result = evaluate_pairs(scorer, rows, info=info, progress=bar.update)
    print(f"{args.model} on {args.dataset_name}\n\n{result.table()}")
    dropped = result.metrics["dropped"]
    for reason, count in dropped["reasons"].items():
        print(f"dropped {count:,} of {result.metrics['n_rows']:,} pairs: {reason}", file=sys.stderr)
    if args.json is not None:
        print(f"\nfigures: {result.save(args.json)}")
    if args.report is not None:
        from companion.report import write_report

        title = f"{Path(args.model).name or args.model} on {Path(args.dataset_name).name}"
        print(f"report: {write_report(args.report, title=title, evaluation=result, run_info=info)}")
    return 0
