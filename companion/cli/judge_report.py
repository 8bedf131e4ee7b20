"""``companion judge-report``: biases of a judge, and its agreement with people, from a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from companion.cli.shared import check_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add(
        "--input",
        required=True,
        help="what 'companion judge' wrote, or rows with id, a, b, preference, annotator, kind",
    )
    add("--own_model", help="what model_a and model_b call the judge's own texts")
    add("--json", type=Path, metavar="FILE", help="write all figures here")


def run(args: argparse.Namespace) -> int:
    """Compute, print, write; return 0."""
    check_target(args.json, args.input)
    from companion.data.readers import read_rows
    from companion.judge import annotator_report, judge_report, load_annotations

    source = Path(args.input)
    first = next(read_rows(source), None)
    if first is not None and "annotator" in first[1]:
        report = annotator_report(load_annotations(source))
    else:
        rows = [row for _, row in read_rows(source)]
        report = judge_report(rows, own_model=args.own_model)
    print(report.table())
    if args.json is not None:
        print(f"\nfigures: {report.save(args.json)}")
    return 0
