"""``companion export``: what makes vLLM or OpenRLHF give a model's z itself."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from companion.cli.shared import add_flags, check_target
from companion.data.writing import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    from companion.models.exporting import ENGINES

    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a reward model: folder or hub id")
    add(
        "--engine",
        required=True,
        choices=ENGINES,
        help="vllm: a pooler config and the command line that serves with it; openrlhf: mean and "
        "std, which its reward model reads in config.json",
    )
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="write it here: the pooler config, or for openrlhf a patched copy of config.json",
    )
    add("--json", action="store_true", help="print all as one JSON object")
    add_flags(parser, "revision")
    parser.epilog = (
        "Example: companion export --model reward-model --engine openrlhf --output config.json"
    )


def run(args: argparse.Namespace) -> int:
    """Print or write; return 0."""
    from companion.models import export_for_engine

    check_target(args.output)
    export = export_for_engine(args.model, args.engine, revision=args.revision)
    if args.output is not None:
        export.check_target(args.output)
        text = json.dumps(export.contents, indent=2, ensure_ascii=False)
        write_text(args.output, text + "\n")
    if args.json:
        print(json.dumps(export.to_dict(), indent=2, ensure_ascii=False))
        return 0
    if args.output is None:
        print(json.dumps(export.settings, indent=2))
    else:
        print(f"written: {args.output}")
    print(export.command_line)
    one = export.reference
    print(f"note: z against {one.n:,} scores: {one.source}", file=sys.stderr)
    for note in export.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0
