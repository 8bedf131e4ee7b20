"""``companion score``: score a JSONL file; a run that was stopped goes on where it was."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--model", required=True, help="folder or hub id of a reward model of any kind"
    )
    parser.add_argument(
        "--input",
        required=True,
        help=".jsonl or .jsonl.gz; each line a text, a list of messages, or an object with "
        "prompt and completion, messages, or text",
    )
    parser.add_argument("--output", required=True, help=".jsonl, one line for each row, in order")
    parser.add_argument(
        "--fields", nargs="*", default=[], help="fields to copy besides 'id'; '*' copies all"
    )
    parser.add_argument(
        "--completion_field", default="completion", help="field that holds the completion"
    )
    parser.add_argument(
        "--unterminated",
        action="store_true",
        help="all completions were cut off: write no end (default: what a row's 'terminated' says)",
    )
    parser.add_argument(
        "--on_error",
        choices=("raise", "skip"),
        default="raise",
        help="a bad row stops the run, or gets an 'error' in place of a score",
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew")
    parser.add_argument("--max_length", type=int, help="in tokens, in place of the model's own")
    parser.add_argument(
        "--overlong",
        choices=("drop", "error", "truncate_prompt"),
        help="what to do with longer rows",
    )
    parser.add_argument("--max_tokens_per_batch", type=int, help="tokens of a batch")
    parser.add_argument(
        "--packing",
        choices=("auto", "off"),
        default="auto",
        help="auto: no padding, and a shared prompt computed once, where that is exact for the "
        "model (if not, the log says why); off: padded batches",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile norms and MLPs: seconds at the start, then somewhat faster on wide models; "
        "on a CPU it needs a C++ compiler",
    )
    parser.add_argument("--chunk_rows", type=int, default=1024, help="rows written at a time")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights",
    )
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the hub's model code")


def run(args: argparse.Namespace) -> int:
    """Score the file; 0 if at least one row has a score, or there was nothing left to do."""
    from tqdm.auto import tqdm

    from companion.models import compile_parts
    from companion.scoring import load_scorer, score_file

    scorer = load_scorer(
        args.model,
        device=args.device,
        dtype=args.dtype,
        max_tokens_per_batch=args.max_tokens_per_batch,
        packing=args.packing,
        max_length=args.max_length,
        overlong=args.overlong,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    for note in scorer.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.compile:
        compile_parts(scorer.reward_model.model)
    with tqdm(desc="scoring", unit=" rows", file=sys.stderr) as bar:
        report = score_file(
            scorer,
            args.input,
            args.output,
            fields=args.fields,
            completion_field=args.completion_field,
            terminated=False if args.unterminated else None,
            on_error=args.on_error,
            overwrite=args.overwrite,
            chunk_rows=args.chunk_rows,
            progress=bar.update,
            on_total=lambda rows: bar.reset(total=rows),
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
    print(f"{args.output}: {', '.join(parts)}", file=sys.stderr)
    return 1 if report.without_score and not report.scored else 0
