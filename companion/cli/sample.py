"""``companion sample``: which completions of your policy to label next, as pairs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from companion.cli.shared import (
    REMOTE,
    HelpWithExamples,
    add_flags,
    check_target,
    open_scorer,
    picked,
    progress_bar,
    say_noticed,
)
from companion.data.writing import write_text

_EPILOG = """\
what the rules are for:
  Only rows with "sampling": "random" may feed the alarms of 'companion monitor run', which counts
  the others and sets them aside. Chosen at random, pairs are what the policy writes now, and the
  share that the model orders rightly is its accuracy there. Chosen by uncertainty, they are those
  that the model finds hardest: any model, however good, is right on about half of them. They are
  good for training, since each label says more. --rule uncertainty therefore keeps --random_share
  of the pairs random, and these still may.

example:
  companion sample completions.jsonl --output pairs.jsonl --n 200
  companion sample completions.jsonl --output pairs.jsonl --n 200 --rule uncertainty --model MODEL
  companion label pairs.jsonl --output labels.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = _EPILOG
    parser.formatter_class = HelpWithExamples
    add = parser.add_argument
    add(
        "completions",
        metavar="COMPLETIONS",
        help="what your policy wrote: rows with prompt and completion, several of a prompt, or "
        "prompt and completions (a list); those with terminated: false are left out",
    )
    add("--output", required=True, type=Path, help="the pairs: .jsonl, for 'companion label'")
    add("--n", type=int, default=200, help="pairs")
    add(
        "--rule",
        choices=("random", "uncertainty"),
        default="random",
        help="random: two draws of the policy for one prompt, one pair of each prompt before a "
        "second; uncertainty: the pairs with the least |score of a - score of b| / T",
    )
    add(
        "--model",
        help="folder or hub id of a pairwise model, for uncertainty; with random, its scores are "
        "written beside the pairs, and the monitor need not score them",
    )
    add("--random_share", type=float, default=0.5, help="of the pairs, with --rule uncertainty")
    add("--seed", type=int, default=0, help="of the draws")
    add("--json", type=Path, metavar="FILE", help="write the counts here")
    add_flags(
        parser,
        *("columns", "on_error", "overwrite", "text", "max_tokens_per_batch", "device", "dtype"),
        *("revision", "trust_remote_code", *REMOTE),
        on_error="a bad row stops the command, or is counted and left out",
        overwrite="replace an output that is there",
    )


def run(args: argparse.Namespace) -> int:
    """Choose, write, say what was left out; return 0."""
    from companion.data import write_rows
    from companion.errors import DataError
    from companion.layouts import columns_of
    from companion.monitoring import read_completions, sample_pairs

    for target in (args.output, args.json):
        check_target(target, args.completions)
    if args.output.exists() and not args.overwrite:
        raise DataError(f"{args.output}: is there already", "give another, or --overwrite")
    if args.model is None and (args.url or args.rule == "uncertainty"):
        need = "--url names a server" if args.url else "--rule uncertainty asks a model"
        raise DataError(f"{need}, and no --model is given", "give the model's folder or hub id")
    prompts, left_out = read_completions(
        args.completions, columns=columns_of(args.columns), on_error=args.on_error
    )
    scorer = open_scorer(args) if args.model is not None else None
    said = len(scorer.notes) if scorer is not None else 0
    bar: contextlib.AbstractContextManager[dict[str, Any]] = contextlib.nullcontext({})
    if scorer is not None:
        bar = progress_bar("scoring", "texts")
    with bar as moved:
        sample = sample_pairs(
            prompts,
            args.n,
            scorer=scorer,
            progress=moved.get("progress"),
            **picked(args, "rule", "random_share", "seed"),
        )
    if scorer is not None:
        say_noticed(scorer, said)
    write_rows(sample.rows, args.output)
    counts = sample.counts
    counts["left_out"] = {**left_out, **{k: v for k, v in counts["left_out"].items() if v}}
    print(
        f"{args.output}: {counts['pairs']:,} pairs ({counts['random']:,} at random, "
        f"{counts['uncertainty']:,} by uncertainty) of {counts['prompts_sampled']:,} of "
        f"{counts['prompts']:,} prompts with {counts['completions']:,} completions"
    )
    for reason, number in counts["left_out"].items():
        print(f"left out: {number:,} {reason}", file=sys.stderr)
    for note in sample.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json is not None:
        text = json.dumps(counts, indent=2, ensure_ascii=False)
        write_text(args.json, text + "\n")
    return 0
