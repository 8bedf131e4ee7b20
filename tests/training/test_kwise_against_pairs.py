"""At equal data a K-wise model is at least as good as one trained on pairs of the same rankings."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars

from companion import (
    KwiseRewardConfig,
    KwiseRewardTrainer,
    PairwiseRewardConfig,
    PairwiseRewardTrainer,
    RewardScorer,
    bootstrap_interval,
    load_base,
    load_rows_with_report,
)
from companion.data import prompt_key
from companion.tutor import TUTOR_BASE, make_rows

disable_progress_bars()


@pytest.mark.slow
def test_rankings_teach_as_much_as_their_pairs(tmp_path: Path) -> None:
    """Three seeds; the difference is taken prompt by prompt, on rankings of other problems."""
    test = make_rows("rankings", 300, seed=99)
    held_out = {prompt_key(row) for row in test}
    texts = [{"prompt": r["prompt"], "completion": c} for r in test for c in r["completions"]]
    starts = np.cumsum([0] + [len(row["completions"]) for row in test])

    def right(model: Any) -> np.ndarray:
        """Of each ranking the share of its pairs that the model orders as the labels do."""
        scores = RewardScorer(model).score(texts).raw
        shares = []
        for row, start in zip(test, starts, strict=False):
            places = itertools.combinations(range(len(row["ranks"])), 2)
            shares.append(
                np.mean(
                    [
                        (scores[start + i] > scores[start + j])
                        == (row["ranks"][i] < row["ranks"][j])
                        for i, j in places
                    ]
                )
            )
        return np.array(shares)

    differences = []
    for seed in range(3):
        rankings = [
            {name: row[name] for name in ("prompt", "completions", "ranks")}
            for row in make_rows("rankings", 160, seed=seed)
            if prompt_key(row) not in held_out
        ]
        pairs, _ = load_rows_with_report(rankings, kind="pairs")
        pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs]
        found = []
        for trainer_class, config_class, rows, batch in (
            (KwiseRewardTrainer, KwiseRewardConfig, rankings, 8),
            # as many steps
            (PairwiseRewardTrainer, PairwiseRewardConfig, pairs, 8 * len(pairs) // len(rankings)),
        ):
            model = load_base(TUTOR_BASE)
            trainer_class(
                model=model,
                args=config_class(
                    str(tmp_path),
                    seed=seed,
                    learning_rate=1e-3,
                    lr_scheduler_type="cosine",
                    warmup_steps=0.05,
                    per_device_train_batch_size=batch,
                    eval_strategy="no",
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                ),
                train_dataset=Dataset.from_list(rows),
            ).train()
            found.append(right(model))
        assert found[0].mean() > 0.75
        differences.append(found[0] - found[1])
    mean = np.mean(differences, axis=0)
    low, high = bootstrap_interval(mean)
    assert high > 0  # not behind
    assert low > -0.02  # and what chance hides is small
