"""From pairs of text to token ids: ``python -m benchmarks.tokenising``.

The tutor's pairs by the tutor base's tokenizer and chat template, as TRL's ``RewardTrainer``
prepares them and as the companion does: in one process, in as many as it takes by itself, and on
the next run, which reads what the first one kept. All must give the same ids.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import RewardTrainer

import companion
from benchmarks.measuring import Outcome, ratio, table, take_turns
from benchmarks.methods import Method
from benchmarks.results import add_arguments, save
from companion import RewardFormatter
from companion.training import format_pairs, tokenising
from companion.tutor import make_rows

BASE = Path(companion.__file__).parent / "assets" / "tutor-base"


def _checked(rows: Dataset) -> Outcome:
    """Tokens, and a sum that other ids would change."""
    ids = [
        rows.with_format("arrow")[:][name].combine_chunks()
        for name in ("chosen_ids", "rejected_ids")
    ]
    values = [column.flatten().to_numpy().astype("int64") for column in ids]
    weighted = sum(int((v * (1 + torch.arange(len(v)).numpy() % 1009)).sum()) for v in values)
    return Outcome(sum(map(len, values)), float(weighted))


def tokenising_methods(rows: Dataset, folder: Path) -> dict[str, Method]:
    """Name to method; the first is the one that the others are compared with."""

    def trl() -> Outcome:
        arguments: Any = SimpleNamespace(dataset_num_proc=None, max_length=None)
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        nobody: Any = None
        return _checked(
            RewardTrainer._prepare_dataset(nobody, rows, tokenizer, arguments, "train")  # type: ignore[arg-type]
        )

    def own(num_proc: int | None, cache: Path) -> Outcome:
        datasets.config.HF_DATASETS_CACHE = cache
        formatter = RewardFormatter(AutoTokenizer.from_pretrained(BASE))
        return _checked(format_pairs(rows, formatter, num_proc=num_proc)[0])

    def anew(num_proc: int | None) -> Method:
        def prepare() -> Any:
            cache = Path(tempfile.mkdtemp(dir=folder))
            return lambda: own(num_proc, cache)

        return prepare

    kept = folder / "kept"
    processes = tokenising.default_processes(len(rows))
    return {
        "TRL, as RewardTrainer does it": lambda: trl,
        "companion, a single process": anew(1),
        f"companion, {processes} process{'es' * (processes > 1)}": anew(None),
        "companion, second run": lambda: lambda: own(None, kept),
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    rounds = args.rounds or (1 if args.quick else 3)
    datasets.disable_progress_bars()
    rows = Dataset.from_list(make_rows("pairs", 500 if args.quick else 12_000, seed=1))
    rows = rows.select_columns(["prompt", "chosen", "rejected"])
    tokenising.CACHE_FROM = min(tokenising.CACHE_FROM, len(rows))  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        methods = tokenising_methods(rows, Path(folder))
        timed = take_turns(methods, rounds, torch.device("cpu"))
    base = next(iter(timed.values()))
    found = []
    for name, times in timed.items():
        if times.outcome != base.outcome:
            raise SystemExit(f"{name}: other ids than those of {next(iter(timed))}")
        faster = ratio(base, times)
        found.append(
            {
                "method": name,
                "seconds": times.median,
                "times faster": faster["median"],
                "least": faster["least"],
                "most": faster["most"],
                "pairs/s": len(rows) / times.median,
            }
        )
    print(table(found))
    figures = {"pairs": len(rows), "tokens": base.outcome.computed, "methods": found}
    print(f"written: {save('tokenising', figures, args)}")


if __name__ == "__main__":
    main()
