"""Does the faster trainer learn the same? ``python -m benchmarks.curves``.

TRL's ``RewardTrainer`` as it is shipped and the companion train on the same pairs of the tutor,
with the same settings, from the same weights, each with several seeds of head and order. Their loss
curves and their accuracy on held-out pairs are written down.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from trl import RewardConfig, RewardTrainer

from benchmarks.measuring import table
from benchmarks.results import add_arguments, save
from companion import (
    PairwiseRewardConfig,
    PairwiseRewardTrainer,
    RewardModel,
    RewardScorer,
    evaluate_pairs,
    load_base,
)
from companion.data import prompt_key
from companion.tutor import TUTOR_BASE, limits, make_rows

METHODS: dict[str, tuple[Any, Any]] = {
    "TRL as shipped": (RewardTrainer, RewardConfig),
    "companion": (PairwiseRewardTrainer, PairwiseRewardConfig),
}
#: Pairs of a logged mean.
WINDOW = 160


def one_run(
    method: str, start: RewardModel, rows: list[dict[str, Any]], test: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Train once; the curve, the held-out accuracy, the seconds of ``train()``."""
    trainer_class, config_class = METHODS[method]
    model = copy.deepcopy(start.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            args=config_class(
                folder,
                num_train_epochs=1,
                per_device_train_batch_size=args.batch_size,
                learning_rate=6e-4,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                center_rewards_coefficient=0.001,
                logging_steps=WINDOW // args.batch_size,
                eval_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                max_length=None,
                seed=args.seed,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=start.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
    if isinstance(trainer, PairwiseRewardTrainer):
        model = trainer.reward_model().model
    model.eval().float()  # type: ignore[no-untyped-call]
    trained = RewardModel(model, start.tokenizer, start.formatter)
    metrics = evaluate_pairs(RewardScorer(trained), test).metrics
    log = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "method": method,
        "seed": args.seed,
        "seconds": seconds,
        "accuracy": metrics["accuracy"],
        "loss": metrics["loss"],
        "steps": [row["step"] for row in log],
        "train_loss": [row["loss"] for row in log],
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=16, help="pairs of a step")
    args = parser.parse_args()
    seeds = args.rounds or (1 if args.quick else 3)  # a round is a seed
    if args.threads:
        torch.set_num_threads(args.threads)
    disable_progress_bars()
    n_train, n_test = (160, 100) if args.quick else (1_600, 2_000)
    test = make_rows("pairs", n_test, seed=70)
    held_out = {prompt_key(row) for row in test}
    drawn = make_rows("pairs", n_train + n_train // 4 + 50, seed=71)
    rows = [row for row in drawn if prompt_key(row) not in held_out][:n_train]
    runs = []
    for seed in range(seeds):
        args.seed = seed
        start = load_base(TUTOR_BASE, head_seed=seed)
        for method in list(METHODS)[:: 1 if seed % 2 else -1]:
            runs.append(one_run(method, start, rows, test, args))
            print(f"seed {seed}, {method}: accuracy {runs[-1]['accuracy']:.3f}")
    best = limits(test)
    rows_of = {m: [run for run in runs if run["method"] == m] for m in METHODS}
    figures = [
        {
            "method": method,
            **{
                name: float(np.mean([run[name] for run in found]))
                for name in ("seconds", "accuracy", "loss")
            },
            "accuracy, least": min(run["accuracy"] for run in found),
            "accuracy, most": max(run["accuracy"] for run in found),
        }
        for method, found in rows_of.items()
    ]
    print(table(figures))
    record = {
        "pairs": n_train,
        "held_out": n_test,
        "best": {"accuracy": best.label_accuracy, "loss": best.label_loss},
        "methods": figures,
        "runs": runs,
    }
    print(f"written: {save('curves', record, args)}")


if __name__ == "__main__":
    main()
