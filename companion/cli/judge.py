"""``companion judge``: ask a language model which of two completions is better, or for a grade."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from companion.cli.shared import (
    add_flags,
    check_target,
    picked,
    progress_bar,
    say_notes,
)
from companion.errors import DataError

_OBJECT: Final = '{"enable_thinking": false}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id; with --base_url the server's name for it")
    add("--input", required=True, help="pairs (or completions): .jsonl, .json, .csv, .parquet")
    add("--output", required=True, help=".jsonl; trains a reward model as it is")
    add(
        "--template",
        default="pairwise",
        help="pairwise, pointwise, tutor, a .yaml or .txt file, or the prompt itself",
    )
    add("--cache", help="file of answers; default: the output's name and .cache")
    add("--report", type=Path, metavar="FILE", help="write the bias report (JSON) here")
    add("--own_model", help="what model_a and model_b call the judge's own texts")
    add_flags(parser, "limit")
    add("--keep_answers", action="store_true", help="write what the judge said into each row")
    add_flags(
        parser,
        *("on_error", "overwrite"),
        on_error="what a bad row does",
        overwrite="replace the output; the cache stays",
    )
    add_asking(parser, "behind a server")
    add("--api_key_env", default="OPENAI_API_KEY", help="variable with the server's key")
    local = parser.add_argument_group("in this process")
    add_flags(
        local,
        *("max_tokens_per_batch", "device", "dtype", "revision", "trust_remote_code"),
    )


def add_asking(parser: argparse.ArgumentParser, title: str) -> None:
    """Declare how a judge is asked."""
    group = parser.add_argument_group(title)
    add = group.add_argument
    add("--base_url", help="of an OpenAI-compatible server, up to and with /v1")
    add("--concurrency", type=int, default=8, help="requests at one time")
    add("--requests_per_minute", type=float, help="upper bound")
    add("--timeout", type=float, default=120.0, help="seconds for one answer")
    add("--max_retries", type=int, default=6, help="of one request")
    add("--request", type=_json, metavar="JSON", help="fields of each request")
    add("--chat_template_kwargs", type=_json, metavar="JSON", help=f"e.g. {_OBJECT}")
    add("--max_tokens", type=int, help="of an answer; default: as the template says")


def open_judge(args: argparse.Namespace, template: Any, cache: str | None) -> Any:
    """The judge of ``--model``, here or behind ``--base_url``; says what was assumed."""
    from companion.judge import Judge

    shared = {"cache": cache, **picked(args, "max_tokens", "chat_template_kwargs")}
    if args.base_url is not None:
        asking = ("concurrency", "requests_per_minute", "timeout", "max_retries", "request")
        key = args.api_key_env or "OPENAI_API_KEY"
        return Judge.from_server(
            args.model, args.base_url, template, api_key_env=key, **picked(args, *asking), **shared
        )
    local = ("max_tokens_per_batch", "device", "dtype", "revision", "trust_remote_code")
    judge = Judge.from_pretrained(args.model, template, **picked(args, *local), **shared)
    say_notes(judge.backend)
    return judge


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        said = f"no valid JSON; give an object such as {_OBJECT}"
        raise argparse.ArgumentTypeError(said) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"no JSON object, such as {_OBJECT}")
    return value


def run(args: argparse.Namespace) -> int:
    """Judge the file; 0 if at least one row has a verdict."""
    cache = args.cache or f"{args.output}.cache"
    check_target(args.output, args.input, cache, regular=True)
    check_target(args.report, args.input, args.output, cache)
    check_target(cache, args.input, regular=True)
    from companion.judge import judge_file, judge_report, load_template

    template = load_template(args.template)
    if args.report is not None and template.mode != "pairwise":
        raise DataError("--report is for pairs", "leave it out with a pointwise template")
    judge = open_judge(args, template, cache)
    with judge, progress_bar("judging", "answers") as moved:
        report = judge_file(
            judge,
            args.input,
            args.output,
            **picked(args, "limit", "keep_answers", "on_error", "overwrite"),
            **moved,
        )
    _say(judge, report, args.output)
    if args.report is not None:
        rows = [json.loads(line) for line in Path(args.output).read_text("utf-8").splitlines()]
        figures = judge_report(rows, own_model=args.own_model)
        print(f"{figures.table()}\n\nreport: {figures.save(args.report)}")
    return 0 if set(report.outcomes) - {"none"} else 1


def _say(judge: Any, report: Any, output: str) -> None:
    parts = [f"{report.rows} rows"]
    parts += [f"{count} {outcome}" for outcome, count in sorted(report.outcomes.items())]
    parts += [f"{count} rows: {reason}" for reason, count in sorted(report.reasons.items())]
    parts += [f"{judge.counts['asked']} asked", f"{judge.counts['from cache']} from the cache"]
    if judge.backend.retries:
        parts.append(f"{judge.backend.retries} sent again")
    print(f"{output}: {', '.join(parts)}", file=sys.stderr)
    if report.bad_rows:
        said = f"{len(report.bad_rows)} bad rows left out, first: {report.bad_rows[0]}"
        print(said, file=sys.stderr)
