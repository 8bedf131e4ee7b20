"""Outcome training: labels, refusals, stock mistakes, resume, a whole run and its scorer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, disable_progress_bars

from companion.errors import CompanionError, DataError
from companion.models import load_base
from companion.models.readout import TokenReadout
from companion.reduction import aggregate
from companion.scoring import TokenScorer
from companion.training.config import ModelArguments, RowArguments
from companion.training.outcome import (
    MEASURED,
    OutcomeCollator,
    OutcomeRewardConfig,
    OutcomeRewardTrainer,
    format_outcomes,
)
from companion.training.outcome_run import summary, train_outcome

disable_progress_bars()
QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def outcomes(n: int) -> list[dict[str, Any]]:
    """Text rows; 'good' is right, and the wrong ones are longer."""
    return [
        {
            "prompt": f"Ana has {i % 20} pens and {i // 20}",
            "completion": "the answer is " + ("good" if i % 3 else "bad bad bad"),
            "label": bool(i % 3),
        }
        for i in range(n)
    ]


def token_rows(n: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(n):
        length = int(torch.randint(3, 12, (1,), generator=generator))
        ids = [*torch.randint(9, 60, (length,), generator=generator).tolist(), 2]
        rows.append({"input_ids": ids, "prompt_length": 2, "label": i % 2})
    return rows


def test_the_label_stands_on_every_completion_token() -> None:
    rows = [{"input_ids": [5, 6, 7, 8, 2], "prompt_length": 3, "label": 1, "row": 7}]
    rows.append({"input_ids": [5, 2], "prompt_length": 1, "label": 0, "row": 8})
    batch = OutcomeCollator(0)(rows)
    assert batch["labels"].tolist() == [[-100, -100, -100, 1, 1], [-100, 0, -100, -100, -100]]
    assert batch["weight"].tolist() == [2, 1]
    assert OutcomeCollator(0, "sequence")(rows)["weight"].tolist() == [1, 1]


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
    rows = token_rows(7)
    data = Dataset.from_list(rows)
    config = OutcomeRewardConfig(str(tmp_path), per_device_eval_batch_size=3, use_cpu=True, **QUIET)
    trainer = OutcomeRewardTrainer(base, config, train_dataset=data, eval_dataset=data)
    figures = trainer.evaluate()
    predictions = trainer.predict(data).predictions
    losses, right = [], []
    for row, found in zip(rows, predictions, strict=True):
        logits = base.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, 2:, 0].detach()
        target = torch.full_like(logits, float(row["label"]))
        losses += torch.nn.functional.binary_cross_entropy_with_logits(
            logits, target, reduction="none"
        ).tolist()
        values = torch.sigmoid(logits)[None]
        mask = torch.ones_like(values, dtype=torch.bool)
        expected = [float(aggregate(values, mask, how)) for how in MEASURED]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        right.append((found[-1] > 0.5) == row["label"])
    assert figures["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert figures["eval_accuracy"] == pytest.approx(np.mean(right))
    assert figures["eval_num_texts"] == 7
    assert 0 <= figures["eval_auc"] <= 1


def test_stock_cross_entropy_over_one_class_teaches_nothing(tiny_base: Path) -> None:
    """Loss and gradient are exactly 0, whatever the labels; here they are not."""
    model = load_base(tiny_base, labels=1).model
    batch = OutcomeCollator(model.config.pad_token_id)(token_rows(4))
    labels = batch["labels"].clamp(max=0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert loss.item() == 0.0
    assert float(model.score.weight.grad.abs().max()) == 0.0
    with pytest.raises(IndexError):  # and the label 1 has no class
        model(**inputs, labels=batch["labels"])


def test_resumed_run_gives_the_same_weights(tiny_base: Path, tmp_path: Path) -> None:
    settings = OutcomeRewardConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        num_train_epochs=2,
        learning_rate=1e-3,
        **{**QUIET, "save_strategy": "steps"},
        save_steps=5,
        save_total_limit=None,
    )

    def train(resume: str | None) -> dict[str, torch.Tensor]:
        trainer = OutcomeRewardTrainer(
            load_base(tiny_base, labels=1),
            settings,
            train_dataset=Dataset.from_list(token_rows(7)),
        )
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    whole, resumed = train(None), train(f"{settings.output_dir}/checkpoint-5")
    assert max(float((whole[name] - resumed[name]).abs().max()) for name in whole) == 0.0


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_whole_run(tiny_bases: Callable[[str], Path], tmp_path: Path, use_peft: bool) -> None:
    path = tmp_path / "outcomes.jsonl"
    path.write_text("\n".join(map(json.dumps, outcomes(90))))
    result = train_outcome(
        OutcomeRewardConfig(
            str(tmp_path / "model"),
            per_device_train_batch_size=8,
            learning_rate=2e-2 if use_peft else 5e-3,
            max_length=60,
            **QUIET,
        ),
        ModelArguments(model_name_or_path=str(tiny_bases("qwen3")), use_peft=use_peft, lora_r=4),
        RowArguments(dataset_name=str(path), eval_fraction=0.3),
        say=lambda line: None,
    )
    assert result.metrics["auc"] > 0.95
    assert result.metrics["length_auc"] == 1.0
    assert "AUC by aggregation" in summary(result)
    assert any("eval_auc" in entry for entry in result.log_history)

    scorer = TokenScorer.from_pretrained(result.output_dir)
    rows = [{**row, "label": None} for row in outcomes(6)]
    scores = scorer.score(rows)
    assert scores.raw[1] > scores.raw[0]
    for values, raw, places in zip(scores.values, scores.raw, scores.places, strict=True):
        assert values is not None
        assert places is not None
        assert values[-1] == raw
        assert len(values) == len(places)
    alone = [float(scorer.score([row]).raw[0]) for row in rows]
    np.testing.assert_allclose(scores.raw, alone, atol=1e-6)
    product = TokenScorer.from_pretrained(result.output_dir, aggregation="product").score(rows)
    assert product.raw[1] == pytest.approx(np.prod(scores.values[1]))
    assert loaded_metrics(result.output_dir)["auc"] == result.metrics["auc"]


def loaded_metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "reward_manifest.json").read_text())
    assert found["readout"]["kind"] == "outcome"
    assert found["readout"]["aggregation"] == "last"
    return dict(found["metrics"])


def test_mistakes_are_named(tiny_base: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"center_rewards_coefficient": 0.1}, "center_rewards_coefficient is set"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is set"),
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


def test_values_that_are_not_finite_stop_the_run(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(tiny_base, labels=1)
    rows = [{**row, "row": 10 + i} for i, row in enumerate(token_rows(4))]
    rows[2]["input_ids"][3] = 61
    with torch.no_grad():
        base.model.get_input_embeddings().weight[61] = float("nan")
    trainer = OutcomeRewardTrainer(
        base, OutcomeRewardConfig(str(tmp_path), **QUIET), train_dataset=Dataset.from_list(rows)
    )
    with pytest.raises(CompanionError, match="not finite in rows 12"):
        trainer.train()
