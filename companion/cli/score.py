"""``companion score``: score a file; a run that was stopped goes on where it was.

Started by torchrun or ``accelerate launch``, its processes share the rows.
"""

from __future__ import annotations

import argparse
import sys
from typing import Final

from companion.cli.shared import (
    READING,
    REMOTE,
    add_flags,
    check_target,
    open_scorer,
    picked,
    progress_bar,
    say_noticed,
)

#: what a launcher starts of it work together, as `args.processes`
SHARES_WORK: Final = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a reward model of any kind")
    add(
        "--input",
        required=True,
        help=".jsonl, .jsonl.gz, .json, .csv or .parquet; each row a text, a list of messages, or "
        "an object with "
        "prompt and completion (or a known layout: instruction, question, …), messages, or text",
    )
    add("--output", required=True, help=".jsonl, one line for each row, in order")
    add("--fields", nargs="*", default=[], help="fields to copy besides 'id'; '*' copies all")
    add("--completion_field", default="completion", help="field that holds the completion")
    add(
        "--unterminated",
        action="store_true",
        help="all completions were cut off: write no end (default: what a row's 'terminated' says)",
    )
    add_flags(
        parser,
        *("columns", "on_error", "overwrite", "max_length", "overlong", "text"),
        *("max_tokens_per_batch", "packing"),
        on_error="a bad row stops the run, or gets an 'error' in place of a score",
    )
    add(
        "--compile",
        action="store_true",
        help="compile norms and MLPs: seconds at the start, then somewhat faster on wide models; "
        "on a CPU it needs a C++ compiler",
    )
    add("--chunk_rows", type=int, default=1024, help="rows of each process, written at a time")
    add_flags(
        parser,
        *("device", "dtype", "device_map", "load_in_4bit", "revision", "trust_remote_code"),
        *READING,
        *REMOTE,
    )
    parser.epilog = (
        "On several GPUs of a machine: torchrun --nproc_per_node 8 -m companion score --model DIR "
        "--input rows.jsonl --output scores.jsonl. On several machines: recipes/corpus."
    )


def run(args: argparse.Namespace) -> int:
    """Score the file; 0 if at least one row has a score, or there was nothing left to do."""
    check_target(args.output, args.input, regular=True)
    from companion.engine import compile_parts
    from companion.layouts import columns_of
    from companion.scoring import score_file

    scorer = open_scorer(args)
    said = len(scorer.notes)
    if args.compile:
        compile_parts(scorer.reward_model.model)
    with progress_bar("scoring", "rows") as moved:
        report = score_file(
            scorer,
            args.input,
            args.output,
            columns=columns_of(args.columns),
            terminated=False if args.unterminated else None,
            **picked(args, "fields", "completion_field", "on_error", "overwrite", "chunk_rows"),
            processes=args.processes,
            **moved,
        )
    parts = [f"{report.rows} rows"]
    if report.resumed_at:
        parts.append(f"{report.resumed_at} done before")
    parts.append(f"{report.scored} scored now")
    if report.without_score:
        parts.append(f"{report.without_score} without a score (see their 'error')")
    counts = scorer.formatter.counts
    if counts.truncated:
        parts.append(f"{counts.truncated} cut by {counts.tokens_cut} tokens of prompt in all")
    if counts.prompts_found:
        parts.append(f"{counts.prompts_found} with the prompt, or parts of it, in other columns")
    say_noticed(scorer, said)
    print(f"{args.output}: {', '.join(parts)}", file=sys.stderr)
    return 1 if report.without_score and not report.scored else 0
