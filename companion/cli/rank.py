"""``companion rank``: best-of-N over a file of prompts; the best as data for fine-tuning."""

from __future__ import annotations

import argparse
from typing import Final

from companion.cli.shared import (
    READING,
    REMOTE,
    add_flags,
    check_target,
    loading,
    open_scorer,
    picked,
    progress_bar,
    say_notes,
    say_noticed,
)

#: what a launcher starts of it work together, as `args.processes`
SHARES_WORK: Final = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a reward model")
    add(
        "--input",
        required=True,
        help=".jsonl, .jsonl.gz, .json, .csv or .parquet; each row has prompt and, without "
        "--policy, "
        "completions (a list)",
    )
    add(
        "--output", required=True, help="the best, as rows of prompt and completion for fine-tuning"
    )
    add("--ranks", help="all, best first (default: OUTPUT.ranks.jsonl)")
    add("--pairs", help="best and worst as chosen and rejected")
    add("--policy", help="folder or hub id of a model that draws completions")
    add("--n", type=int, default=16, help="completions that the policy draws")
    add("--temperature", type=float, default=1.0, help="of the policy")
    add("--top_p", type=float, default=1.0, help="of the policy")
    add("--max_new_tokens", type=int, default=512, help="of a completion")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--top_k", type=int, default=1, help="how many of each prompt to write")
    add_flags(
        parser,
        *("on_error", "overwrite", "text", "max_tokens_per_batch"),
        on_error="a bad row stops the run, or gets an 'error' in the ranks",
        max_tokens_per_batch="tokens of a batch, of the model and of the policy",
    )
    add("--chunk_rows", type=int, default=64, help="prompts of each process, done at a time")
    add_flags(parser, "device", "dtype", "trust_remote_code", *READING, *REMOTE)


def run(args: argparse.Namespace) -> int:
    """Rank the file; 0 if at least one row was ranked, or there was nothing to do."""
    ranks = args.ranks or f"{args.output}.ranks.jsonl"
    for target in (args.output, ranks, args.pairs):
        check_target(target, args.input, regular=True)
    from companion.generation import Policy
    from companion.search import rank_file

    scorer = open_scorer(args, also_local=args.policy is not None)
    said = len(scorer.notes)
    settings = {
        name: value for name, value in loading(args).items() if name not in ("text", "read_as")
    }
    policy = Policy.from_pretrained(args.policy, **settings) if args.policy else None
    if policy is not None:
        say_notes(policy)
    with progress_bar("ranking", "prompts") as moved:
        report = rank_file(
            scorer,
            args.input,
            args.output,
            ranks_path=args.ranks,
            pairs_path=args.pairs,
            policy=policy,
            **picked(args, "n", "temperature", "top_p", "max_new_tokens", "seed"),
            **picked(args, "top_k", "on_error", "overwrite", "chunk_rows"),
            processes=args.processes,
            **moved,
        )
    say_noticed(scorer, said)
    ranked = report.rows - report.failed
    print(
        f"{args.output}: {report.best} rows, the best {args.top_k} of {report.candidates} "
        f"completions of {ranked} prompts"
        + (f", {report.resumed_at} done before" if report.resumed_at else "")
    )
    if args.pairs:
        print(f"{args.pairs}: {report.pairs} pairs of best and worst")
    if ranked and report.kl_interval is not None:
        print(f"score: {report.score_best:+.3f} of the best, {report.score_mean:+.3f} of all")
        print(
            f"KL from the policy: {report.kl_measured:.3f} nats measured "
            f"[{report.kl_interval.low:.3f}, {report.kl_interval.high:.3f}], "
            f"at most {report.kl_bound:.3f} (closed form)"
        )
        print(f"ties for the best: {report.tied} prompts (the first one is taken)")
    for count, text in (
        (report.cut_off, "completions were cut off: ranked last, never written"),
        (report.without_score, "completions without a score (see their 'error')"),
        (report.not_written, "prompts without a finished completion that has a score"),
        (report.failed, "rows without a ranking (see their 'error')"),
    ):
        if count:
            print(f"{count} {text}")
    return 1 if report.failed and not ranked else 0
