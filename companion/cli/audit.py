"""``companion audit``: find the silent bugs in a reward model or an endpoint."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from companion.cli.shared import HelpWithExamples, add_flags, check_target, picked
from companion.errors import DataError, ServiceError

_EPILOG = """\
what each target can be asked:
                          folder or hub id   endpoint, --model   endpoint
  read-out                all                all but padding     batches of text
  text, by its tokenizer  all                all                 -
  text, as it is read     all                words against ids   long and empty texts
  head and weights        all                golden texts        range of the scores
  meaning                 all                all                 all
  --data                  all                all                 all

exit codes: 0 sound, 1 a fault (or a bias beyond a limit of yours), 2 bad input,
  3 the target was not reached

examples:
  companion audit reward-model --html audit.html
  companion audit reward-model --level full --data held-out.jsonl --junit audit.xml
  companion audit http://127.0.0.1:8000 --model reward-model --json audit.json
  companion audit reward-model --at_most verbosity=0.5 \\
    --waive 'pad-is-eos=served one text at a time'

A fault is wrong for every user, and fails. A hazard is wrong in one way of use, and never fails. A
bias is measured with an interval, and fails only at a limit of yours.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = _EPILOG
    parser.formatter_class = HelpWithExamples
    add = parser.add_argument
    add("target", metavar="MODEL_OR_URL", help="folder, hub id, or http://host:port of a server")
    add("--data", metavar="FILE", help="labelled pairs: also accuracy, ties, calibration, leakage")
    add("--against", metavar="FILE", help="rows that those of --data must not repeat: training")
    add(
        "--level",
        choices=("quick", "full"),
        default="quick",
        help="at most 30,000 tokens through the model, or 300,000",
    )
    add("--json", type=Path, metavar="FILE", help="write the report here")
    add("--html", type=Path, metavar="FILE", help="the same as a page that needs no network")
    add("--junit", type=Path, metavar="FILE", help="the same as JUnit XML, for CI systems")
    add(
        "--waive",
        action="append",
        default=[],
        metavar="NAME=REASON",
        help="a fault that is known and lived with does not fail; several times for several",
    )
    add("--waivers", type=Path, metavar="FILE", help="the same as a YAML file, NAME: REASON")
    add(
        "--at_most",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a bias fails if its whole interval is beyond this, in either direction",
    )
    add(
        "--at_least",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a figure, accuracy say, fails if its whole interval is below this",
    )
    endpoint = parser.add_argument_group("of an endpoint")
    endpoint.add_argument(
        "--protocol",
        choices=("companion", "vllm", "openrlhf"),
        help="which of its routes is asked: /v1/rewards, /classify or /get_reward; default: found "
        "by GET of /openapi.json and /v1/models",
    )
    endpoint.add_argument(
        "--model",
        metavar="DIR",
        help="folder or hub id of what it runs: its tokenizer makes token ids, its manifest says "
        "what it said when it was saved",
    )
    endpoint.add_argument(
        "--max_requests",
        type=int,
        metavar="N",
        help="most requests that are posted; default: 1,000, or 10,000 at --level full",
    )
    endpoint.add_argument("--timeout", type=float, default=120.0, help="seconds for an answer")
    add_flags(endpoint, "api_key_env")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="in which a model here is to run (default: as it was saved), or an endpoint runs "
        "(default: as --model was saved)",
    )
    add_flags(parser, "device", "revision", "trust_remote_code")


def run(args: argparse.Namespace) -> int:
    """Ask, print, write; 0 sound, 1 fault, 3 not reached."""
    from companion.audit.waivers import read_waivers, split_limits, split_waivers

    for file in (args.json, args.html, args.junit):
        check_target(file, args.data, args.waivers)
    if args.max_requests is not None and args.max_requests < 0:
        raise DataError(f"--max_requests is {args.max_requests}", "give a positive number")
    waivers = split_waivers(args.waive)
    if args.waivers is not None:
        waivers = read_waivers(args.waivers) | waivers
    limits = {
        name: split_limits(getattr(args, name), f"--{name}") for name in ("at_most", "at_least")
    }
    try:
        report = _ask(args, waivers, limits)
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print(report.table())
    for file, write in (
        (args.json, report.save),
        (args.html, report.write_html),
        (args.junit, report.write_junit),
    ):
        if file is not None:
            print(f"report: {write(file)}", file=sys.stderr)
    return 0 if report.sound else 1


def _ask(args: argparse.Namespace, waivers: dict[str, str], limits: dict[str, Any]) -> Any:
    from tqdm.auto import tqdm

    from companion.audit import audit
    from companion.audit.auditing import all_checks, open_subject
    from companion.audit.endpoint import EndpointSubject

    key = None
    if args.api_key_env is not None and not (key := os.environ.get(args.api_key_env)):
        raise DataError(
            f"--api_key_env: the environment has no {args.api_key_env}", "set it to the key"
        )
    shared = ("level", "protocol", "model", "dtype", "device", "max_requests", "timeout")
    # (before the model, which takes longer to load)
    checks = all_checks(args.data, args.against)
    subject = open_subject(
        args.target, api_key=key, **picked(args, *shared, "revision", "trust_remote_code")
    )
    if isinstance(subject, EndpointSubject):
        for line in subject.posts(args.data):
            print(line, file=sys.stderr, flush=True)
    with tqdm(desc="audit", total=len(checks), unit=" checks", file=sys.stderr) as bar:

        def moved(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        return audit(
            subject, level=args.level, checks=checks, waivers=waivers, progress=moved, **limits
        )
