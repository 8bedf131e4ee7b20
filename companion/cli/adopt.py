"""``companion adopt``: write the manifest that a published reward model lacks."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from companion.cli.shared import (
    READING,
    add_flags,
    load_texts,
    loading,
    picked,
    progress_bar,
    read_as,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or hub id of a reward model of somebody else")
    add(
        "--reference",
        required=True,
        metavar="DATA",
        help="texts whose scores others are compared with: rows as 'score' takes them, or pairs; "
        "a file (.jsonl, .jsonl.gz, .parquet, .csv), a folder, or a hub id",
    )
    add("--reference_split", default="test", help="split; a single file has but one")
    add(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="write the manifest there, with links to the model's files; default: into MODEL",
    )
    add("--json", action="store_true", help="print what was written as one JSON object")
    add_flags(
        parser,
        *("columns", "limit", "on_error", "max_length", "overlong", "text"),
        *("device", "dtype", "revision", "trust_remote_code", *READING),
        on_error="a bad row stops the run, or is left out of the reference",
    )
    parser.epilog = (
        "Example: companion adopt Org/some-reward-model --reference texts.jsonl --output_dir "
        "some-reward-model; then give some-reward-model to score, serve, monitor and audit."
    )


def run(args: argparse.Namespace) -> int:
    """Score the reference, write the manifest, say what stands in it; return 0."""
    from companion.scoring import adopt, model_kind

    kind = model_kind(args.model, revision=args.revision, read_as=read_as(args))
    rows, names, label = load_texts(
        *(args.reference, args.reference_split, args.limit, args.columns),
        as_they_are=kind != "scalar",
    )
    with progress_bar("scoring", "texts", len(rows)) as moved:
        done = adopt(
            args.model,
            rows,
            names=names,
            source=label,
            **picked(args, "output_dir", "on_error"),
            **loading(args),
            progress=moved["progress"],
        )
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        print(json.dumps(done.to_dict(), ensure_ascii=False, indent=2))
        return 0
    reference, golden = done.manifest.reference, done.manifest.golden_texts
    assert reference is not None  # it was just made
    print(f"manifest: {done.path}")
    print(f"read-out: {done.manifest.readout['rule']} (a model of the kind {done.manifest.kind})")
    print(
        f"reference: {reference.source}, mean {reference.mean:.4g}, standard deviation "
        f"{reference.std:.4g}"
    )
    print(f"golden texts: {0 if golden is None else len(golden.rows)}")
    if done.dropped:
        print(f"{done.dropped} texts without a score are not in the reference", file=sys.stderr)
    return 0
