"""Process training: labels at the ends of steps, nothing labelled, resume, a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from example_kinds import QUIET, SEPARATOR, solutions

from companion import load_base, load_rows, load_rows_with_report
from companion.data import describe_rows
from companion.errors import CompanionError, DataError
from companion.functional import step_target
from companion.training import ProcessRewardConfig, ProcessRewardTrainer, format_steps
from companion.training.process import StepCollator


def token_rows(n: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(n):
        length = int(torch.randint(5, 12, (1,), generator=generator))
        ids = [*torch.randint(9, 60, (length,), generator=generator).tolist(), 2]
        rows.append({"input_ids": ids, "ends": [1, 3, length], "targets": [2.0, i % 3, -100.0]})
    return rows


def test_labels_stand_at_the_ends_of_steps_and_nowhere_else(tiny_base: Path) -> None:
    formatter = load_base(tiny_base, labels=3).formatter
    given = [*solutions(5), {**solutions(1)[0], "labels": [None] * 3}]
    rows, report = format_steps(Dataset.from_list(given), formatter, separator=SEPARATOR)
    assert str(report) == "steps: 5 of 6 solutions kept; 1 without a label"
    batch = StepCollator(formatter.tokenizer.pad_token_id)([rows[i] for i in range(5)])
    assert batch["weight"].tolist() == [3, 2, 3, 1, 3]
    words = {}
    for row in range(5):
        for place in (batch["labels"][row] != -100).nonzero()[:, 0].tolist():
            token = formatter.tokenizer.decode([batch["input_ids"][row, place]])
            words.setdefault(row, []).append((token, int(batch["labels"][row, place])))
    assert words[0] == [("so", 2), ("so", 2), ("</s>", 2)]
    assert words[1] == [("so", 2), ("so", 0)]
    assert words[2] == [("so", 1), ("so", 2), ("</s>", 0)]
    rest = [{**row, "rest": ["more"]} for row in solutions(1)]
    rows, _ = format_steps(Dataset.from_list(rest), formatter, separator=SEPARATOR)
    assert formatter.tokenizer.decode([rows[0]["input_ids"][-1]]) == "so"


def test_targets() -> None:
    for label, three, binary in ((1, 2, 1.0), (0, 1, 1.0), (-1, 0, 0.0), (None, -100, -100)):
        assert step_target(label, "three", "good", "x") == three
        assert step_target(label, "binary", "good", "x") == binary
    assert step_target(0, "binary", "ignore", "x") == -100
    assert step_target(0, "binary", "bad", "x") == 0.0
    assert step_target(0.3, "soft", "good", "x") == 0.3
    with pytest.raises(DataError, match="no probability"):
        step_target(-1, "soft", "good", "row 3")
    with pytest.raises(DataError, match="take --label_type soft"):
        step_target(0.3, "three", "good", "row 3")


def test_soft_labels_come_through_the_loader() -> None:
    row = {"prompt": "a", "completions": ["b", "c", "d"], "labels": [0.7, None, 1]}
    given = [row, {**row, "labels": [1, 0, 1]}]
    rows, report = load_rows_with_report(given, kind="steps")
    assert rows["labels"][:] == [[0.7, None, 1.0], [1.0, 0.0, 1.0]]
    assert list(report.notes) == ["labels read as probabilities that a step is good"]
    assert describe_rows(rows, "steps")["labels"] == {"1.0": 3, "0.7": 1, "None": 1, "0.0": 1}
    with pytest.raises(DataError, match=r"labels\[1\]"):
        load_rows([{**row, "labels": [0.7, 1.2, 1]}], kind="steps")


@pytest.mark.parametrize("label_type", ["three", "soft"])
def test_batches_without_any_label_give_zero_and_not_nan(
    tiny_base: Path, tmp_path: Path, label_type: str
) -> None:
    labels = 3 if label_type == "three" else 1
    base = load_base(tiny_base, labels=labels)
    rows = [{**row, "targets": [-100.0] * 3} for row in token_rows(4)]
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    trainer = ProcessRewardTrainer(
        base,
        ProcessRewardConfig(
            str(tmp_path), label_type=label_type, per_device_train_batch_size=2, **QUIET
        ),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    # what stock code makes of them
    batch = StepCollator(0)(rows)
    stock = load_base(tiny_base, labels=3).model
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.isnan(stock(**inputs, labels=batch["labels"]).loss)
    raw = batch["labels"].clone()
    raw[0, 1] = -1  # the rating itself in place of its class
    with pytest.raises(IndexError):
        stock(**inputs, labels=raw)


def test_figures_of_exactly_n_steps(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(tiny_base, labels=3)
    rows = token_rows(5)
    data = Dataset.from_list(rows)
    config = ProcessRewardConfig(str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, **QUIET)
    trainer = ProcessRewardTrainer(base, config, train_dataset=data, eval_dataset=data)
    figures = trainer.evaluate()
    predictions = trainer.predict(data).predictions.reshape(5, 3, 3)
    losses, right = [], []
    for row, found in zip(rows, predictions, strict=True):
        logits = base.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].detach()
        np.testing.assert_allclose(found, logits[row["ends"]], atol=1e-5)
        for end, target in list(zip(row["ends"], row["targets"], strict=True))[:2]:
            losses.append(-float(torch.log_softmax(logits[end], 0)[int(target)]))
            right.append(int(logits[end].argmax()) == target)
    assert figures["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert figures["eval_accuracy"] == pytest.approx(np.mean(right))
    assert (figures["eval_num_texts"], figures["eval_num_steps"]) == (5, 10)


def test_mistakes_are_named(tiny_base: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"label_type": "four"}, "label_type is 'four'"),
        ({"step_separator": ""}, "step_separator is empty"),
        ({"step_score": "worst"}, "step_score is 'worst'"),
    ):
        with pytest.raises(CompanionError, match=message):
            ProcessRewardConfig(str(tmp_path), **settings)
    assert ProcessRewardConfig(str(tmp_path), step_separator=r"\n").step_separator == "\n"
    formatter = load_base(tiny_base, labels=3).formatter
    # this tokenizer drops line breaks
    with pytest.raises(DataError, match=r"train, row 0: after step 0 the tokenizer joins"):
        ProcessRewardTrainer(
            load_base(tiny_base, labels=3),
            ProcessRewardConfig(str(tmp_path), **QUIET),
            train_dataset=Dataset.from_list(solutions(3)),
        )
    uneven = [{**solutions(1)[0], "labels": [1]}]
    with pytest.raises(DataError, match="3 steps but 1 labels"):
        format_steps(Dataset.from_list(uneven), formatter, separator=SEPARATOR)
    with pytest.raises(DataError, match="ends outside of its text"):
        StepCollator(0)([{"input_ids": [5, 2], "ends": [4], "targets": [1.0]}])
