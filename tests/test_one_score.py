"""One text has one score, whoever asks: the trainer, the scorer, the command line, GRPO, best-of-N.

Two stock ways to score the same texts are shown to be wrong beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from companion import (
    PairwiseRewardConfig,
    PairwiseRewardTrainer,
    RewardScorer,
    evaluate_pairs,
    load_base,
    save_reward_model,
)
from companion.cli.main import main
from companion.search import score_rows
from companion.tutor import make_rows

PAIRS = make_rows("pairs", 24, seed=5)
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def trained(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, Path]:
    """Scores ``[24, 2]`` as the trainer gives them, and the folder of the saved model."""
    folder = tmp_path_factory.mktemp("one-score")
    trainer = PairwiseRewardTrainer(
        model=load_base(tiny_base),
        args=PairwiseRewardConfig(
            str(folder / "run"),
            max_steps=2,
            learning_rate=1e-2,
            per_device_train_batch_size=8,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(PAIRS),
    )
    trainer.train()
    scores = np.asarray(trainer.predict(Dataset.from_list(PAIRS)).predictions)
    save_reward_model(trainer.reward_model(), folder / "model")
    return scores, folder / "model"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row[side][0]["content"]}
        for row in PAIRS
        for side in SIDES
    ]


def test_one_text_has_one_score(
    trained: tuple[np.ndarray, Path], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    expected, folder = trained
    assert expected.std() > 1e-3  # else all would agree on nothing
    scorer = RewardScorer.from_pretrained(folder)
    evaluated = evaluate_pairs(scorer, PAIRS)
    given, taken = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["score", "--model", str(folder), "--input", str(given), "--output", str(taken)]
    assert main(command) == 0
    lines = [json.loads(line) for line in taken.read_text(encoding="utf-8").splitlines()]
    chat = [[{"role": "assistant", "content": row["completion"]}] for row in rows]
    ways = {
        "evaluated": np.stack([evaluated.chosen, evaluated.rejected], axis=1).reshape(-1),
        "scored": scorer.score(rows).raw,
        "one by one": np.array([scorer.score([row]).raw[0] for row in rows]),
        "command": [line["score"] for line in lines],
        "in GRPO": scorer.as_reward_func()([row["prompt"] for row in rows], chat),
        "in best-of-N": score_rows(scorer, rows)[0],
    }
    for name, values in ways.items():
        np.testing.assert_allclose(
            np.asarray(values, dtype=float), expected.reshape(-1), atol=1e-5, err_msg=name
        )


def test_stock_ways_give_another_score(
    trained: tuple[np.ndarray, Path], rows: list[dict[str, Any]]
) -> None:
    expected, folder = trained
    reward_model = RewardScorer.from_pretrained(folder).reward_model
    tokenizer, model = reward_model.tokenizer, reward_model.model
    for text in (
        str(rows[0]["prompt"]) + rows[0]["completion"],
        rows[0]["prompt"][0]["content"] + rows[0]["completion"],
    ):
        with torch.no_grad():
            wrong = model(**tokenizer(text, return_tensors="pt")).logits.item()
        assert abs(wrong - expected[0, 0]) > 1e-4
