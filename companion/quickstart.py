"""The main job from end to end: data, training, evaluation, a report, on two cores in minutes.

It does nothing that the other commands cannot do one by one; it only does it all, on the tutor,
where the best that any reward model can reach is known. ``companion quickstart`` calls it.
Chapter 4.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from companion.data.splits import prompt_key
from companion.data.writing import write_rows, write_text
from companion.errors import CompanionError
from companion.evaluation.pairs import PairEvaluation, evaluate_pairs
from companion.evaluation.report import write_report
from companion.scoring import RewardScorer
from companion.tutor import GOLD, TUTOR_BASE, grade, make_rows

#: says of a folder that a quickstart made it
_MARK = "quickstart.json"


@dataclass(frozen=True)
class QuickstartConfig:
    """What the quickstart does. The defaults were chosen on other seeds than those it uses."""

    output_dir: str = "quickstart"
    n_train: int = 3_000  #: pairs
    n_eval: int = 1_000  #: held-out pairs that are watched in training and set the temperature
    n_test: int = 4_000  #: held-out pairs that nothing else sees
    learning_rate: float = 6e-4
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.n_train, self.n_eval, self.n_test) < 50:
            raise CompanionError("n_train, n_eval and n_test must be 50 at least")


@dataclass
class QuickstartResult:
    """Where everything is, and the figures."""

    output_dir: Path
    evaluation: PairEvaluation
    canaries: PairEvaluation
    weights: dict[str, tuple[float, float]]  #: of r*: (learned, gold)
    examples: list[dict[str, Any]]  #: of :func:`example_rows`, with ``gold``, ``score`` and ``z``
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def model_dir(self) -> Path:
        return self.output_dir / "model"

    @property
    def report(self) -> Path:
        return self.output_dir / "report.html"


def make_data(config: QuickstartConfig) -> dict[str, list[dict[str, Any]]]:
    """Draw the pairs; no prompt stands in two of the sets."""
    seen: set[str] = set()
    sets: dict[str, list[dict[str, Any]]] = {}
    for place, (name, n) in enumerate(
        (("test", config.n_test), ("eval", config.n_eval), ("train", config.n_train))
    ):
        # A few prompts come up again by chance: draw some more, and keep the new ones.
        rows = make_rows("pairs", n + n // 4 + 50, seed=1000 * config.seed + place)
        fresh = [row for row in rows if prompt_key(row) not in seen][:n]
        if len(fresh) < n:
            raise CompanionError(
                f"only {len(fresh)} of {n} {name} pairs have prompts of their own",
                "ask for fewer pairs",
            )
        seen.update(prompt_key(row) for row in fresh)
        sets[name] = fresh
    return sets


def _prepare(output: Path) -> None:
    """Make the folder; take over only one that an earlier quickstart made."""
    if output.exists() and any(output.iterdir()) and not (output / _MARK).exists():
        raise CompanionError(
            f"{output} holds something that no quickstart wrote", "name another --output_dir"
        )
    shutil.rmtree(output, ignore_errors=True)
    (output / "data").mkdir(parents=True)
    (output / _MARK).write_text("{}\n")


def learned_weights(
    rows: Sequence[Mapping[str, Any]], scores: Sequence[float]
) -> dict[str, tuple[float, float]]:
    """What a model pays for each part of r*, by least squares on the truth of each completion.

    Parameters
    ----------
    rows : sequence of mappings
        Each with ``prompt`` (messages) and ``completion`` (text) of the tutor's world.
    scores : sequence of float ``[n]``
        The model's raw scores.

    Returns
    -------
    dict
        Part of :class:`companion.tutor.GoldReward` to (learned weight, gold weight).
    """
    grades = [grade(row["prompt"][0]["content"], row["completion"]) for row in rows]
    design = np.array(
        [[1.0, g.correct, g.validity, g.greeting, g.tone, -g.extra_words / 10] for g in grades]
    )
    solution = np.linalg.lstsq(design, np.asarray(scores, dtype=np.float64), rcond=None)[0]
    pairs = zip(asdict(GOLD).items(), solution[1:], strict=True)  # in the order of the columns
    return {name: (float(weight), gold) for (name, gold), weight in pairs}


def example_rows() -> list[dict[str, Any]]:
    """Six completions of one prompt, from right and friendly to wrong.

    The sums of the last are right, but they are not those of the problem.
    """
    prompt = "Ana has 3 boxes with 4 pens each and buys 5. How many pens now?"
    right = "First 3 x 4 = 12 pens.\nThen 12 + 5 = 17 pens.\nAnswer: 17"
    slip = "First 3 x 4 = 12 pens.\nThen 12 + 5 = 18 pens.\nAnswer: 18"
    misread = "First 3 + 4 = 7 pens.\nThen 7 + 5 = 12 pens.\nAnswer: 12"
    texts = {
        "right, greets, polite": f"Hello!\n{right}\nHope this helps!",
        "right": right,
        "right, rude": f"{right}\nDo not ask again.",
        "last step wrong, greets, polite": f"Hello!\n{slip}\nHope this helps!",
        "last step wrong": slip,
        "misreads the problem": misread,
    }
    user = [{"role": "user", "content": prompt}]
    return [{"what": what, "prompt": user, "completion": text} for what, text in texts.items()]


def run_quickstart(
    config: QuickstartConfig, *, say: Callable[[str], None] = print
) -> QuickstartResult:
    """Make the data, train, evaluate, score examples and write the report.

    Parameters
    ----------
    config : QuickstartConfig
    say : callable
        Called with a line of text as each part begins.

    Raises
    ------
    CompanionError
        If the output folder holds something else, or the settings leave too little data.
    """
    from companion.training.config import DataArguments, ModelArguments, PairwiseRewardConfig
    from companion.training.pairwise import train_pairwise

    output = Path(config.output_dir)
    _prepare(output)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = time.perf_counter() - clock
        clock += seconds[name]

    say(f"1/4 data: {config.n_train + config.n_eval + config.n_test:,} pairs of the tutor")
    sets = make_data(config)
    for name, rows in sets.items():
        write_rows(rows, output / "data" / f"{name}.jsonl")
    lap("data")

    say(f"2/4 training: one epoch over {config.n_train:,} pairs, from the tutor base")
    training = train_pairwise(
        PairwiseRewardConfig(
            output_dir=str(output / "model"),
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=4 * config.batch_size,
            eval_steps=0.5,  # a look at the held-out pairs costs as much as many steps
            learning_rate=config.learning_rate,
            # The usual 0.01 pulls the scores of this short run together: T falls to about 0.8.
            center_rewards_coefficient=0.001,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            seed=config.seed,
        ),
        ModelArguments(model_name_or_path=str(TUTOR_BASE)),
        DataArguments(
            dataset_name=str(output / "data" / "train.jsonl"),
            eval_dataset_name=str(output / "data" / "eval.jsonl"),
            calibration_fraction=1.0,  # the figures come from the test set
        ),
        say=say,
    )
    lap("training")

    say(f"3/4 evaluation: {config.n_test:,} pairs on prompts that training never saw")
    scorer = RewardScorer.from_pretrained(output / "model")
    evaluation = evaluate_pairs(scorer, sets["test"])
    canaries = evaluate_pairs(scorer, make_rows("canaries", 600, seed=config.seed))
    completions = [
        {"prompt": row["prompt"], "completion": row[side][0]["content"]}
        for row in sets["test"]
        for side in ("chosen", "rejected")
    ]
    both = np.stack([evaluation.chosen, evaluation.rejected], axis=1).reshape(-1)
    weights = learned_weights(completions, both.tolist())
    lap("evaluation")

    say("4/4 scores of a few completions, and the report")
    examples = example_rows()
    scores = scorer.score(examples)
    for i, row in enumerate(examples):
        row["gold"] = grade(row["prompt"][0]["content"], row["completion"]).reward
        row |= scores.record(i)
    result = QuickstartResult(output, evaluation, canaries, weights, examples, seconds)

    def keep() -> None:
        record = {
            "config": asdict(config),
            "metrics": evaluation.to_dict()["metrics"],
            "weights": weights,
            "canaries": {k: v["accuracy"] for k, v in canaries.metrics["subsets"].items()},
            "seconds": seconds,
        }
        write_text(output / _MARK, json.dumps(record, indent=1) + "\n")

    keep()  # (figures that cannot be drawn lose nothing of it)
    write_report(
        result.report,
        title="Quickstart: a reward model for the tutor",
        evaluation=evaluation,
        train_log=training.log_history,
        run_info=_run_info(config, result),
    )
    lap("report")
    keep()
    return result


def _run_info(config: QuickstartConfig, result: QuickstartResult) -> dict[str, Any]:
    info: dict[str, Any] = {
        "pairs trained on": f"{config.n_train:,}",
        "learning rate": config.learning_rate,
        "pairs in a batch": config.batch_size,
        "seed": config.seed,
    }
    for name, (ours, gold) in result.weights.items():
        info[f"weight of '{name}' in the score (in r*)"] = f"{ours:.2f} ({gold:.2f})"
    for name, row in result.canaries.metrics["subsets"].items():
        info[f"canary '{name}' ordered right"] = f"{row['accuracy']:.1%}"
    for example in result.examples:
        info[f"score of '{example['what']}' (r*)"] = (
            f"{example['score']:+.2f} ({example['gold']:.2f})"
        )
    return info | {f"seconds of {k}": f"{v:.0f}" for k, v in result.seconds.items()}
