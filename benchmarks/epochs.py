"""How many epochs? ``python -m benchmarks.epochs``.

Reward models are trained for four epochs on pairs of the tutor at the settings of chapter 4, from
several seeds, each with pairs, a head and an order of its own. With a constant learning rate the
model after k epochs is the one that ``num_train_epochs=k`` gives; with a rate that falls to zero
each k is a run of its own. All are looked at on the same held-out pairs, whose true probabilities
are known: accuracy and loss are expectations over the labels. What is finished lies in ``--work``
and is not done again.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import permutations, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import PrinterCallback, TrainerCallback

from benchmarks.measuring import table
from benchmarks.overoptimization import once
from benchmarks.results import add_arguments, save
from companion import PairwiseRewardConfig, PairwiseRewardTrainer, RewardScorer, load_base
from companion.data import prompt_key
from companion.functional import bootstrap_runs
from companion.tutor import TUTOR_BASE, limits, make_rows

TRAIN_SEED, TEST_SEED = 7_100, 7_000
BATCH = 16

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """What is trained on."""

    name: str
    pairs: int  #: a multiple of twice the batch, so that half an epoch is whole steps
    noise: float = 0.0  #: share of labels that are a coin's flip
    schedule: str = "constant"  #: of the learning rate
    epochs: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  #: after which it is looked at


SETTINGS = (
    Setting("256 pairs", 256),
    Setting("1024 pairs", 1024),
    Setting("256 pairs, cosine", 256, schedule="cosine", epochs=(1.0, 2.0, 4.0)),
    Setting("256 pairs, 40% coin flips", 256, 0.4),
)


class Snapshots(TrainerCallback):
    """Keeps the weights after given steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps, self.kept = set(steps), list[dict[str, torch.Tensor]]()

    def on_step_end(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        """Copy them, if it is the turn of this step."""
        if state.global_step in self.steps:
            weights = found["model"].state_dict()
            self.kept.append({name: value.clone() for name, value in weights.items()})


def make_test(n: int) -> list[dict[str, Any]]:
    """Held-out pairs, no two of one prompt, so that each may be drawn by itself."""
    rows = {prompt_key(row): row for row in make_rows("pairs", n + n // 2 + 20, seed=TEST_SEED)}
    return list(rows.values())[:n]


def run(setting: Setting, seed: int, test: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The margin of each held-out pair at each look, and the training figures of all epochs."""
    begin = time.process_time()
    held_out = {prompt_key(row) for row in test}
    drawn = make_rows("pairs", 2 * setting.pairs, seed=TRAIN_SEED + seed, noise=setting.noise)
    rows = [row for row in drawn if prompt_key(row) not in held_out][: setting.pairs]
    margins = []
    together = setting.schedule == "constant"
    for looks in [setting.epochs] if together else [(look,) for look in setting.epochs]:
        trainer, weights = train(setting, rows, seed, looks)
        trained = trainer.reward_model()
        for kept in weights:
            trained.model.load_state_dict(kept)
            scores = RewardScorer(trained).score_pairs(test)
            margins.append((scores.chosen - scores.rejected).round(5).tolist())
    log = [row for row in trainer.state.log_history if "nll" in row]  # of the longest
    return {
        "margins": margins,
        "train_loss": [row["nll"] for row in log],
        "train_accuracy": [row["accuracy"] for row in log],
        "seconds": time.process_time() - begin,
    }


def train(
    setting: Setting, rows: list[dict[str, Any]], seed: int, looks: Sequence[float]
) -> tuple[PairwiseRewardTrainer, list[dict[str, torch.Tensor]]]:
    """Train to the last look; the trainer, and the weights at each look."""
    snapshots = Snapshots([round(look * setting.pairs / BATCH) for look in looks])
    with TemporaryDirectory() as scratch:
        trainer = PairwiseRewardTrainer(
            model=load_base(TUTOR_BASE, head_seed=seed),
            args=PairwiseRewardConfig(
                scratch,
                num_train_epochs=max(looks),
                learning_rate=1e-3,
                lr_scheduler_type=setting.schedule,
                center_rewards_coefficient=0.01,
                per_device_train_batch_size=BATCH,
                train_sampling_strategy="group_by_length",
                eval_strategy="no",
                save_strategy="no",
                logging_strategy="epoch",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
            ),
            train_dataset=Dataset.from_list(rows),
            callbacks=[snapshots],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer, snapshots.kept


def figures_of(margins: Array, probability: Array) -> dict[str, Array]:
    """Accuracy and loss of each pair, in expectation over its label; how sure the model is.

    ``probability`` is the true one that the label prefers ``chosen``.
    """
    return {
        "accuracy": np.where(margins > 0, probability, 1 - probability),
        "loss": probability * np.logaddexp(0, -margins)
        + (1 - probability) * np.logaddexp(0, margins),
        "confidence": 1 / (1 + np.exp(-np.abs(margins))),
    }


def rows_of(values: Array) -> dict[str, Any]:
    """``[seeds, looks, pairs]``: mean, 95% interval over seeds and pairs, and the single seeds."""
    ends = [bootstrap_runs(values[:, k]) for k in range(values.shape[1])]
    return {
        "mean": values.mean((0, 2)).round(4).tolist(),
        "low": [round(end.low, 4) for end in ends],
        "high": [round(end.high, 4) for end in ends],
        "each_seed": values.mean(2).round(4).tolist(),
    }


def summarise(
    runs: Sequence[dict[str, Any]], looks: Sequence[float], probability: Array
) -> dict[str, Any]:
    """The curves of one setting, and their differences from the first epoch, pair by pair."""
    found = figures_of(np.array([one["margins"] for one in runs]), probability)
    first = list(looks).index(1.0)
    return {
        **{name: rows_of(values) for name, values in found.items()},
        "against_epoch_1": {
            name: rows_of(found[name] - found[name][:, [first]]) for name in ("accuracy", "loss")
        },
        **{
            name: np.mean([one[name] for one in runs], 0).round(4).tolist()
            for name in ("train_loss", "train_accuracy")
        },
        "seconds": round(sum(one["seconds"] for one in runs), 1),
    }


def same_steps(
    settings: Sequence[Setting], found: dict[str, dict[str, Array]]
) -> list[dict[str, Any]]:
    """What going over pairs again costs, against new pairs for as many steps.

    After an epoch more a model has also taken more steps at its learning rate. Settings of
    a constant rate that differ in nothing but the number of pairs are compared where they have
    taken as many.
    """
    out = []
    for few, many in permutations(settings, 2):
        alike = (few.noise, few.schedule) == (many.noise, many.schedule) == (many.noise, "constant")
        if few.pairs >= many.pairs or not alike:
            continue
        for (i, again), (j, once_over) in product(enumerate(few.epochs), enumerate(many.epochs)):
            if few.pairs * again == many.pairs * once_over:
                row: dict[str, Any] = {"few": few.name, "epochs_of_few": again}
                row |= {"many": many.name, "epochs_of_many": once_over}
                for name in ("accuracy", "loss"):
                    gap = found[few.name][name][:, [i]] - found[many.name][name][:, [j]]
                    rows = rows_of(gap)
                    row[name] = {key: rows[key][0] for key in ("mean", "low", "high")}
                    row[name]["each_seed"] = [seed for (seed,) in rows["each_seed"]]
                out.append(row)
    return out


def study(args: argparse.Namespace) -> dict[str, Any]:
    """All runs, each kept when it is done."""
    begin = time.process_time()
    test = make_test(args.test)
    probability = np.array([row["probability"] for row in test])
    settings = []
    found = {}
    for setting in args.settings:
        runs = []
        for seed in range(args.seeds):
            name = f"{setting.name.replace(', ', '-').replace(' ', '_')}-{seed}.json"
            runs.append(once(args.work / name, partial(run, setting, seed, test)))
            print(f"{time.process_time() - begin:6.0f} s  {name}", flush=True)
        margins = np.array([one["margins"] for one in runs])
        found[setting.name] = figures_of(margins, probability)
        settings.append({**asdict(setting), **summarise(runs, setting.epochs, probability)})
    best = limits(test)
    return {
        "seeds": args.seeds,
        "held_out": len(test),
        "batch": BATCH,
        "best": {"accuracy": best.accuracy, "loss": best.loss},
        "settings": settings,
        "same_steps": same_steps(args.settings, found),
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--work", type=Path, default=Path("runs/epochs"), help="what is finished")
    parser.add_argument("--seeds", type=int, help="runs of each setting; default 5, quick 2")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="only the first")
    args = parser.parse_args()
    args.seeds = args.seeds or (2 if args.quick else 5)
    args.test = 40 if args.quick else 1000
    args.settings = SETTINGS[: args.settings]
    if args.quick:
        args.settings = (
            Setting("32 pairs", 32, epochs=(0.5, 1.0, 2.0)),
            Setting("32 pairs, cosine", 32, schedule="cosine", epochs=(1.0, 2.0)),
        )
        args.work = args.work / "quick"
    if args.threads:
        torch.set_num_threads(args.threads)
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    figures = study(args)
    rows = [
        {
            "trained on": setting["name"],
            "epoch": str(look),
            **{name: setting[name]["mean"][k] for name in ("accuracy", "loss", "confidence")},
            **{
                f"{name} {end}": setting["against_epoch_1"][name][end][k]
                for name in ("accuracy", "loss")
                for end in ("low", "high")
            },
        }
        for setting in figures["settings"]
        for k, look in enumerate(setting["epochs"])
    ]
    print(table(rows))
    print(f"written: {save('epochs', figures, args)}")


if __name__ == "__main__":
    main()
