"""Memory of training and scoring by the number of rows: ``python -m benchmarks.rows``.

Rows lie on the disk as Arrow and reports keep bytes, so two million rows take little more memory
than twenty thousand. The peak is what the kernel has seen resident, pages of files included. Other
work on the machine does not matter. (The model has one layer; it takes half an hour and 8 GB of
disk.)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.results import add_arguments, save
from companion import load_base, save_reward_model
from companion.tutor import TUTOR_BASE, make_rows

ROOT: Final = Path(__file__).parents[1]
#: GiB that two million rows may take more than twenty thousand
BOUND: Final = 1.5
COMMANDS: Final = ("train", "score")


def write_pairs(file: Path, n: int) -> None:
    """Pairs of the tutor's, no prompt of which stands twice."""
    drawn = make_rows("pairs", min(n, 2_000), seed=1)
    with file.open("w", encoding="utf-8") as out:
        for i in range(n):
            row = drawn[i % len(drawn)]
            [turn] = row["prompt"]
            prompt = [{**turn, "content": f"{turn['content']} {i}"}]
            given = {"id": str(i), "prompt": prompt, "chosen": row["chosen"]}
            out.write(json.dumps({**given, "rejected": row["rejected"]}) + "\n")


def peak(command: str, model: Path, rows: Path, folder: Path) -> float:
    """GiB of a run over all rows: 20 steps of a training, or the scores of a side of each pair.

    `folder` takes what the run writes.
    """
    if command == "train":
        arguments = ["train", "pairwise", "--model_name_or_path", str(model)]
        arguments += ["--dataset_name", str(rows), "--output_dir", str(folder / "model")]
        arguments += ["--max_steps", "20", "--eval_fraction", "0.001", "--save_strategy", "no"]
    else:
        arguments = ["score", "--model", str(model), "--input", str(rows)]
        arguments += ["--output", str(folder / "scores.jsonl"), "--completion_field", "chosen"]
    process = subprocess.Popen(
        [sys.executable, "-m", "companion", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / "cache")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{' '.join(arguments)} ended with {code}")
    return usage.ru_maxrss / 2**20


def small_models(folder: Path) -> dict[str, Path]:
    """What each command takes: the tutor base with one layer, and a reward model of it."""
    base = AutoModelForCausalLM.from_pretrained(TUTOR_BASE)
    base.model.layers = base.model.layers[:1]
    base.config.num_hidden_layers = 1
    if getattr(base.config, "layer_types", None):
        base.config.layer_types = base.config.layer_types[:1]
    base.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(TUTOR_BASE).save_pretrained(folder / "base")
    save_reward_model(load_base(folder / "base"), folder / "reward")
    return {"train": folder / "base", "score": folder / "reward"}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--rows", nargs=2, type=int, default=[20_000, 2_000_000])
    args = parser.parse_args()
    few, many = [2_000, 5_000] if args.quick else args.rows
    figures: dict[str, dict[str, float]] = {command: {} for command in COMMANDS}
    with tempfile.TemporaryDirectory(prefix="rows-", dir=Path.cwd()) as scratch:
        models = small_models(Path(scratch))
        for n in (few, many):
            rows = Path(scratch) / f"{n}.jsonl"
            write_pairs(rows, n)
            for command in COMMANDS:
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    found = peak(command, models[command], rows, Path(folder))
                figures[command][str(n)] = found
                print(f"{command:<6} {n:>10,} rows: {found:.2f} GiB", flush=True)
    more = {name: found[str(many)] - found[str(few)] for name, found in figures.items()}
    for name, by in more.items():
        print(f"{name}: {many:,} rows take {by:.2f} GiB more than {few:,}")
    print(f"written: {save('rows', {'peak_gib': figures, 'more_gib': more}, args)}")
    if max(more.values()) > BOUND:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
