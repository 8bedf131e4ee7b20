"""``companion compare``: how scores, ranks, thresholds and decisions move between two models.

With ``--audits``, two reports of ``companion audit`` side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from companion.cli.shared import (
    REMOTE,
    add_flags,
    check_target,
    load_texts,
    open_scorer,
    picked,
    progress_bar,
    say_noticed,
)
from companion.data.writing import write_text
from companion.errors import DataError, ModelError

#: flags with which scores are no longer those that the manifest's reference would be of
_OTHER_READING = ("max_length", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("old", metavar="OLD", nargs="?", help="the model in use: folder or hub id")
    add("new", metavar="NEW", nargs="?", help="the one that may take its place: folder or hub id")
    add(
        "--audits",
        nargs=2,
        metavar=("A.json", "B.json"),
        help="in place of two models: two files of companion audit --json, check by check",
    )
    add(
        "--data",
        help="rows of prompt and completion, or messages; or labelled pairs, chosen and rejected: "
        "a file (.jsonl, .jsonl.gz, .parquet, .csv), a folder, or a hub id",
    )
    add("--data_split", default="test", help="split; a single file has but one")
    add(
        "--percentile",
        type=float,
        default=50.0,
        help="a text is accepted above this percentile of a model's reference",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    add(
        "--write_reference",
        action="store_true",
        help="make NEW's reference of the scores of --data (both sides of a pair) and write it "
        "into its manifest, so that a percentile means what it does for OLD with a reference of "
        "the same texts; NEW is a local folder",
    )
    for side in ("old", "new"):
        add(
            f"--{side}_url",
            action="append",
            metavar="URL",
            help=f"{side.upper()}'s scores come from this server, http://host:port; several times "
            "for several servers",
        )
        add(f"--{side}_revision", metavar="REV", help=f"of {side.upper()}, a hub id")
    add_flags(
        parser,
        *("protocol", "api_key_env", "columns", "limit", "max_length", "text"),
        *("max_tokens_per_batch", "packing", "device", "dtype", "trust_remote_code"),
        protocol="what the servers of --old_url and --new_url speak: classify (default) or "
        "companion",
        api_key_env="environment variable with the servers' key",
    )
    parser.epilog = (
        "Example: companion compare reward-model reward-model-2 --data held-out.jsonl "
        "--percentile 70 --write_reference; companion compare --audits before.json after.json"
    )


def run(args: argparse.Namespace) -> int:
    """Score with both, compare, print, write; return 0."""
    check_target(args.json, args.data, *(args.audits or ()))
    if args.audits is not None:
        return _audits(args)
    for name in ("old", "new", "data"):
        if getattr(args, name) is None:
            raise DataError(
                f"no {'--data' if name == 'data' else name.upper()}",
                "name OLD, NEW and --data, or two audits: --audits A.json B.json",
            )
    if args.write_reference:
        _check_write(args)
    rows, names, label = load_texts(args.data, args.data_split, args.limit, args.columns)
    from companion import __version__
    from companion.evaluation.comparison import compare_scorers

    old, new = _open(args, "old"), _open(args, "new")
    said = [len(scorer.notes) for scorer in (old, new)]
    info = {**picked(args, "old", "new", "data", "data_split", "limit"), "companion": __version__}
    info |= {name: urls for name in ("old_url", "new_url") if (urls := getattr(args, name))}
    total = 2 * len(rows) * (2 if "chosen" in rows[0] else 1)
    with progress_bar("scoring", "texts", total) as moved:
        result = compare_scorers(
            old,
            new,
            rows,
            percentile=args.percentile,
            info=info,
            names=names,
            progress=moved["progress"],
        )
    print(f"{args.old} and {args.new} on {args.data}\n\n{result.table()}")
    for scorer, before in zip((old, new), said, strict=True):
        say_noticed(scorer, before)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    dropped = result.metrics["dropped"]
    for side in ("old", "new"):
        for reason, count in dropped[side].items():
            print(f"{side.upper()}: {count:,} rows without a score: {reason}", file=sys.stderr)
    if args.write_reference:
        _write_reference(args, result, new, label)
    if args.json is not None:
        print(f"\nfigures: {result.save(args.json)}")
    return 0


def _audits(args: argparse.Namespace) -> int:
    from companion.audit.report import compare_audits, read_audit

    if args.old is not None or args.data is not None:
        raise DataError("--audits compares two files, no models", "leave out OLD, NEW and --data")
    found = compare_audits(*map(read_audit, args.audits))
    print(found.table())
    if args.json is not None:
        text = json.dumps(found.to_dict(), ensure_ascii=False, indent=1)
        write_text(args.json, text + "\n")
    return 0


def _open(args: argparse.Namespace, side: str) -> Any:
    """The scorer of one side: a local one has nothing to do with the other's server."""
    other = "new" if side == "old" else "old"
    url, other_url = getattr(args, f"{side}_url"), getattr(args, f"{other}_url")
    own = {"model": getattr(args, side), "revision": getattr(args, f"{side}_revision"), "url": url}
    if not url and other_url:
        own |= dict.fromkeys(REMOTE)
    print(f"{side.upper()}: {own['model']}", file=sys.stderr)
    return open_scorer(argparse.Namespace(**(vars(args) | own)), also_local=not other_url)


def _check_write(args: argparse.Namespace) -> None:
    """Refuse before the work what cannot be written after it."""
    from companion.models import RewardManifest

    folder = Path(args.new)
    if not folder.is_dir():
        raise DataError(
            f"--write_reference: {args.new} is no local folder", "fetch the model into one first"
        )
    for name in _OTHER_READING:
        if getattr(args, name) is not None:
            raise DataError(
                f"--write_reference: with --{name} the scores are not those that the manifest "
                "stands for",
                f"leave out --{name}",
            )
    RewardManifest.load(folder)
    if not os.access(folder, os.W_OK):
        raise ModelError(f"{folder}: cannot be written to", "copy the model, or take its owner")


def _write_reference(args: argparse.Namespace, result: Any, new: Any, label: str) -> None:
    from companion.models import RewardManifest
    from companion.models.card import write_card

    manifest = RewardManifest.load(args.new)
    before = manifest.reference
    manifest.reference = result.reference_of(
        "new", f"{result.metrics['n_texts']:,} texts of {label}"
    )
    path = manifest.save(args.new)
    write_card(args.new, manifest, new.formatter)
    share = args.percentile / 100
    error = 100 * (share * (1 - share) / manifest.reference.n) ** 0.5
    print(
        f"\nreference: {path}: {manifest.reference.source}"
        + (f", in place of: {before.source}" if before else "")
    )
    print(
        f"of other texts like these, the share above percentile {args.percentile:g} is off by "
        f"about {error:.1f} points from the reference's size alone"
    )
    if args.new_url:
        print("note: the server of --new_url has the former one until it restarts", file=sys.stderr)
