"""Outcome training: labels, refusals, stock mistakes, resume, a whole run and its scorer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from example_kinds import OUTCOME, QUIET, outcomes

from companion import TokenScorer, aggregate, load_base
from companion.errors import CompanionError, DataError
from companion.evaluation.tokens import AGGREGATES
from companion.models import TokenReadout
from companion.training import (
    OutcomeRewardConfig,
    OutcomeRewardTrainer,
    format_outcomes,
)
from companion.training.outcome import OutcomeCollator


def test_the_label_stands_on_every_completion_token() -> None:
    rows = [{"input_ids": [5, 6, 7, 8, 2], "prompt_length": 3, "label": 1, "row": 7}]
    rows.append({"input_ids": [5, 2], "prompt_length": 1, "label": 0, "row": 8})
    batch = OutcomeCollator(0)(rows)
    assert batch["labels"].tolist() == [[-100, -100, -100, 1, 1], [-100, 0, -100, -100, -100]]
    assert batch["weight"].tolist() == [2, 1]
    assert OutcomeCollator(0, reduction="sequence")(rows)["weight"].tolist() == [1, 1]


def test_text_becomes_a_conversation_unless_told_otherwise(tiny_base: Path) -> None:
    formatter = load_base(tiny_base, labels=1).formatter
    rows = Dataset.from_list(outcomes(3))
    chat, _ = format_outcomes(rows, formatter)
    text = formatter.tokenizer.decode(chat[1]["input_ids"])
    assert "<|user|>" in text
    assert formatter.tokenizer.decode(chat[1]["input_ids"][chat[1]["prompt_length"] :]) == (
        "the answer is good </s>"
    )
    plain, _ = format_outcomes(rows, formatter, chat=False)
    assert "<|user|>" not in formatter.tokenizer.decode(plain[1]["input_ids"])


def test_figures_and_predictions_of_exactly_n_texts(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(tiny_base, labels=1)
    rows = OUTCOME.ids(7)
    data = Dataset.from_list(rows)
    config = OutcomeRewardConfig(str(tmp_path), per_device_eval_batch_size=3, use_cpu=True, **QUIET)
    trainer = OutcomeRewardTrainer(base, config, train_dataset=data, eval_dataset=data)
    figures = trainer.evaluate()
    predictions = trainer.predict(data).predictions
    losses, right = [], []
    for row, found in zip(rows, predictions, strict=True):
        logits = base.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].detach()
        logits = logits[row["prompt_length"] :, 0]
        target = torch.full_like(logits, float(row["label"]))
        losses += torch.nn.functional.binary_cross_entropy_with_logits(
            logits, target, reduction="none"
        ).tolist()
        values = torch.sigmoid(logits)[None]
        mask = torch.ones_like(values, dtype=torch.bool)
        expected = [float(aggregate(values, mask, how)) for how in AGGREGATES]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        right.append((found[-1] > 0.5) == row["label"])
    assert figures["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert figures["eval_accuracy"] == pytest.approx(np.mean(right))
    assert figures["eval_num_texts"] == 7
    assert 0 <= figures["eval_auc"] <= 1


def test_stock_cross_entropy_over_one_class_teaches_nothing(tiny_base: Path) -> None:
    """Loss and gradient are exactly 0, whatever the labels; here they are not."""
    model = load_base(tiny_base, labels=1).model
    batch = OutcomeCollator(model.config.pad_token_id)(OUTCOME.ids(4))
    labels = batch["labels"].clamp(max=0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert loss.item() == 0.0
    assert float(model.score.weight.grad.abs().max()) == 0.0
    with pytest.raises(IndexError):  # and the label 1 has no class
        model(**inputs, labels=batch["labels"])


def test_mistakes_are_named(tiny_base: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"reduction": "sum"}, "reduction is 'sum'"),
        ({"aggregation": "median"}, "aggregation is 'median'"),
    ):
        with pytest.raises(CompanionError, match=message):
            OutcomeRewardConfig(str(tmp_path), **settings)
    base = load_base(tiny_base, labels=1, max_length=12)
    rows = Dataset.from_list([{**row, "label": 3} for row in outcomes(2)])
    with pytest.raises(DataError, match="row 0, field 'label': 3"):
        format_outcomes(rows, base.formatter)
    long = [{**row, "completion": "good " * 40} for row in outcomes(2)]
    with pytest.raises(DataError, match="2 dropped for their length: none is left"):
        format_outcomes(Dataset.from_list(long), base.formatter)
    scorer = TokenScorer(base, TokenReadout("outcome"))
    scores = scorer.score([long[0], {"prompt": "a", "completion": ""}], on_error="skip")
    assert np.isnan(scores.raw).all()
    assert scores.reasons[0] == "longer than max_length=12 tokens"
    assert "the completion is empty" in str(scores.reasons[1])
    with pytest.raises(DataError, match="row 0"):
        scorer.score([{"prompt": "a", "completion": ""}])
