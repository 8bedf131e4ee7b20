"""``companion label``: people judge pairs on a page of this machine."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from companion.cli.shared import HelpWithExamples, add_flags, check_target
from companion.data.writing import write_text

_EPILOG = """\
example:
  companion sample completions.jsonl --output pairs.jsonl --n 200
  companion label pairs.jsonl --output labels.jsonl

  Open the address that it prints. 1 or ← the first, 2 or → the second, 0 or t a tie, s skip,
  u undo. Each judgement is on the disk before the next pair is shown; Ctrl-C ends, and the same
  line goes on. Rows have prompt, a, b and label: 'companion train', 'evaluate' and 'monitor run'
  take them as they are (training leaves ties out, and counts them), and 'companion judge-report'
  compares every two annotators.

  From another machine: ssh -L 8100:127.0.0.1:8100 HOST, then http://127.0.0.1:8100/ there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = _EPILOG
    parser.formatter_class = HelpWithExamples
    add = parser.add_argument
    add(
        "pairs",
        metavar="PAIRS",
        help="what 'companion sample' wrote, or rows with prompt and a, b (or chosen, rejected); "
        "labels that they have are not shown",
    )
    add("--output", required=True, help=".jsonl; one that is there is gone on with")
    add("--annotator", help="who judges (default: the page asks, and takes several)")
    add("--port", type=int, default=8100, help="on 127.0.0.1, for no other machine; 0: a free one")
    add("--seed", type=int, default=0, help="of the sides")
    add("--json", type=Path, metavar="FILE", help="write the figures here at the end")
    add_flags(
        parser,
        *("columns", "on_error"),
        on_error="a bad row stops the command, or is named and left out",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; return 0."""
    from companion.errors import DataError
    from companion.layouts import columns_of
    from companion.monitoring.label_page import LabelServer
    from companion.monitoring.labelling import Labelling, figure_lines, read_pairs

    target = Path(args.output)
    check_target(args.json, args.pairs, target)
    check_target(target, args.pairs, regular=True)
    if target.suffix != ".jsonl":
        raise DataError(f"{target}: judgements are appended to plain JSONL", "end it with .jsonl")
    pairs, notes = read_pairs(args.pairs, columns=columns_of(args.columns), on_error=args.on_error)
    with Labelling(pairs, target, annotator=args.annotator, seed=args.seed) as labelling:
        for note in [*notes, *labelling.notes]:
            print(f"note: {note}", file=sys.stderr)
        server = LabelServer(labelling, args.port)
        before = signal.signal(signal.SIGTERM, _stop)  # before anyone is told that it is there
        try:
            print(
                f"{len(pairs):,} pairs, {labelling.found:,} judgements in {target}\n"
                f"ready: {server.url}/ (Ctrl-C ends)",
                file=sys.stderr,
                flush=True,
            )
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
            server.server_close()
        figures = labelling.figures()
    print(f"{target}: {figures['rows']:,} judgements of {figures['pairs']:,} pairs")
    print("\n".join(figure_lines(figures)))
    if figures["skipped"]:
        print(
            f"note: {sum(figures['skipped'].values()):,} pairs were skipped and have no row. If "
            "hard pairs are skipped, the others are no random sample: call a pair without a better "
            "side a tie",
            file=sys.stderr,
        )
    if args.json is not None:
        text = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False)
        write_text(args.json, text + "\n")
        print(f"figures: {args.json}")
    return 0


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt
