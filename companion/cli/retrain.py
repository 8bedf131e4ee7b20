"""``companion retrain``: a new model from the base, published only if it is better than the old."""

from __future__ import annotations

import argparse
import gc
import json
from functools import partial
from pathlib import Path
from typing import Final

from companion.cli.shared import check_target, leave_process_group, picked
from companion.cli.train import before_process_group, parse
from companion.data.writing import write_text

#: what this command does not know is a setting of training, which `args.settings` gets
TAKES_SETTINGS: Final = True
#: exit code of a run whose model is not better
NOT_BETTER: Final = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("old_model", metavar="OLD", help="the pairwise model in use: folder or hub id")
    add("--data", required=True, metavar="PAIRS", help="old pairs: a file, a folder, or a hub id")
    add(
        "--new",
        required=True,
        metavar="PAIRS",
        help="new pairs: chosen and rejected, or a, b and label (ties are left out and counted)",
    )
    add(
        "--output",
        required=True,
        metavar="DIR",
        help="folder of the new model, which appears when it is whole and better; beside it "
        "DIR.rows with all pairs, and DIR.rejected if it is not better",
    )
    add("--base", metavar="ID", help="model to start from; default: the one of OLD's manifest")
    add(
        "--margin",
        type=float,
        default=0.0,
        help="published if accuracy on held-out new pairs rises by more than this, by the lower "
        "end of the paired 95%% interval over prompts …",
    )
    add(
        "--tolerance",
        type=float,
        default=0.02,
        help="… and on held-out old pairs falls by no more than this, by the lower end too",
    )
    add(
        "--new_fraction",
        type=float,
        default=0.3,
        help="share of the new pairs to hold out, whole prompts (of the old: --eval_fraction)",
    )
    add(
        "--also_continue",
        action="store_true",
        help="train a second model from OLD on the same pairs, only to compare",
    )
    add("--dry_run", action="store_true", help="say what would be trained, and stop")
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.epilog = (
        "Then any setting of 'companion train pairwise' may follow (--learning_rate, "
        "--eval_fraction, --config FILE.yaml, …); without them the settings of OLD's run hold, for "
        "one epoch. --columns and the like are of the old pairs. Exit codes: 0 published (or "
        "--dry_run), 20 not better, 2 bad input. Starts under torchrun and accelerate too. "
        "Example: companion retrain reward-model --data old.jsonl --new labelled.jsonl "
        "--output reward-model-2"
    )


def run(args: argparse.Namespace) -> int:
    """Train, compare, publish or not; 0 if published, else 20."""
    check_target(args.json, args.data, args.new)
    before_process_group()
    from companion.monitoring import retrain

    gc.freeze()  # as for `companion train`
    result = retrain(
        *(args.old_model, args.data, args.new, args.output),
        **picked(args, "base", "margin", "tolerance", "new_fraction", "also_continue", "dry_run"),
        arguments=partial(parse, args.settings, "pairwise"),
    )
    if args.json is not None and (result.folder or args.dry_run):
        text = json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(args.json, text + "\n")
    leave_process_group()
    # of several processes the first has compared; the others leave no folder
    return 0 if result.published or args.dry_run or result.folder is None else NOT_BETTER
