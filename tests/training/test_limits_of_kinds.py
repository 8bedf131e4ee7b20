"""On the tutor the best possible is known: how near outcome and process models come to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars
from sklearn.metrics import roc_auc_score

from companion import (
    OutcomeRewardConfig,
    OutcomeRewardTrainer,
    ProcessRewardConfig,
    ProcessRewardTrainer,
    TokenScorer,
    evaluate_tokens,
    load_base,
)
from companion.data import prompt_key
from companion.models import TokenReadout
from companion.tutor import TUTOR_BASE, make_rows

disable_progress_bars()
NOISE = 0.2
KINDS: dict[str, tuple[Any, Any, str, tuple[str, ...], TokenReadout]] = {
    "outcome": (
        OutcomeRewardTrainer, OutcomeRewardConfig, "outcomes", ("prompt", "completion", "label"),
        TokenReadout("outcome", 1, "last"),
    ),
    "process": (
        ProcessRewardTrainer, ProcessRewardConfig, "steps", ("prompt", "completions", "labels"),
        TokenReadout("process", 3, "min", separator="\n"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Figures and rows of both kinds on fresh problems, where a coin drew a fifth of the labels."""
    found = {}
    for name, (trainer_class, config_class, rows_of, fields, readout) in KINDS.items():
        rows = make_rows(rows_of, 320, seed=51)
        model = load_base(TUTOR_BASE, labels=readout.labels)
        trainer_class(
            model=model,
            args=config_class(
                str(tmp_path_factory.mktemp(name)),
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                per_device_train_batch_size=16,
                eval_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_list(
                [{field: row[field] for field in fields} for row in rows]
            ),
        ).train()
        seen = {prompt_key(row) for row in rows}
        fresh = [
            row
            for row in make_rows(rows_of, 300, seed=52, noise=NOISE)
            if prompt_key(row) not in seen
        ]
        found[name] = (evaluate_tokens(TokenScorer(model, readout), fresh).metrics, fresh)
    return found


def test_an_outcome_model_comes_near_the_auc_that_its_labels_allow(measured: Any) -> None:
    figures, rows = measured["outcome"]
    labels = [row["label"] for row in rows]
    limit = roc_auc_score(labels, [float(row["correct"]) for row in rows])
    assert figures["limit_auc"] == pytest.approx(limit)
    assert 0.85 < limit < 0.95  # one label in ten is wrong
    low, high = figures["auc_interval"]
    assert figures["length_auc"] < low < figures["auc"] < high
    assert limit - 0.08 < figures["auc"] < limit + 0.02


def test_a_process_model_comes_near_the_f1_that_its_labels_allow(measured: Any) -> None:
    figures, rows = measured["process"]

    def first(labels: list[int]) -> int | None:
        return labels.index(-1) if -1 in labels else None

    hits = [(first(row["labels"]), first(row["true_labels"])) for row in rows]
    on_errors = np.mean([a == b for a, b in hits if a is not None])
    on_right = np.mean([a == b for a, b in hits if a is None])
    limit = 2 * on_errors * on_right / (on_errors + on_right)
    assert figures["limit_f1"] == pytest.approx(limit)
    assert 0.6 < limit < 0.9
    low, high = figures["first_error_interval"]
    f1 = figures["first_error"]["first_error_f1"]
    assert figures["guessing_f1"] < low < f1 < high
    assert limit - 0.15 < f1 < limit + 0.02
