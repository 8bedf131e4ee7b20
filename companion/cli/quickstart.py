"""``companion quickstart``: train a reward model on the tutor and show how good it is."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from companion.quickstart import QuickstartResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--output_dir", default="quickstart", help="data, model and report go here")
    add("--n_train", type=int, default=3_000, help="pairs to train on")
    add("--n_eval", type=int, default=1_000, help="held-out pairs during training")
    add("--n_test", type=int, default=4_000, help="held-out pairs to judge it on")
    add("--learning_rate", type=float, default=6e-4, help="peak of the cosine")
    add("--batch_size", type=int, default=16, help="pairs a step")
    add("--seed", type=int, default=0, help="of data, order and head")


def run(args: argparse.Namespace) -> int:
    """Run it; print the tables and what to try next."""
    from transformers.utils import logging

    from companion.quickstart import QuickstartConfig, run_quickstart

    logging.disable_progress_bar()  # of loading and writing a model this small
    _show(run_quickstart(QuickstartConfig(**vars(args))))
    return 0


def _table(title: str, columns: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left")
    return table


def _show(result: QuickstartResult) -> None:
    from rich.console import Console

    from companion.evaluation.pairs import summary_rows

    console = Console(highlight=False)
    names = ("completion", "gold r*", "score", "z", "percentile")
    examples = _table("One prompt, six completions", names)
    table = _table("Held-out prompts", ("figure", "ours", "limit"))
    for row in result.examples:
        examples.add_row(
            row["what"],
            f"{row['gold']:.2f}",
            f"{row['score']:+.2f}",
            f"{row['z']:+.2f}",
            f"{row['percentile']:.0f}",
        )
    for figure in summary_rows(result.evaluation.metrics):
        table.add_row(*figure)
    for name, (ours, gold) in result.weights.items():
        table.add_row(f"weight of '{name}'", f"{ours:.2f}", f"{gold:.2f}")
    console.print(examples)
    console.print(
        "The last one's sums are right, but it adds where the problem multiplies. The tutor's base "
        "checks sums and hardly compares them with the problem, so a reward model made of it "
        "rates such a completion too high.\n"
    )
    console.print(table)
    total = sum(result.seconds.values())
    console.print(f"Done in {total:.0f} s. Open {result.report} in a browser. Then try:")
    folder = result.output_dir
    program = _program()
    for command in (
        f"{program} evaluate --model {result.model_dir} --dataset_name {folder}/data/test.jsonl",
        f"{program} data tutor --kind outcomes --n 1000 --output answers.jsonl"
        f" && {program} score --model {result.model_dir} --input answers.jsonl"
        " --output scores.jsonl",
        f"{program} train pairwise --model_name_or_path Qwen/Qwen3-0.6B"
        " --dataset_name trl-lib/ultrafeedback_binarized --output_dir runs/qwen3",
    ):
        console.print(f"  {command}", soft_wrap=True)


def _program() -> str:
    """How to call the companion from here: by its name, or by its path in an environment that is
    not activated (``make quickstart``)."""
    if shutil.which("companion"):
        return "companion"
    return os.path.relpath(Path(sys.prefix) / "bin" / "companion")
