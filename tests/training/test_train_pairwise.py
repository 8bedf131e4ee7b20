"""From rows on disk to a saved reward model with figures on pairs that nothing was chosen by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_kinds import pairs

from companion import (
    DataArguments,
    ModelArguments,
    PairwiseRewardConfig,
    TrainingResult,
    load_reward_model,
    train_pairwise,
)
from companion.data import prompt_key
from companion.errors import CompanionError, DataError


@pytest.fixture
def run(tmp_path: Path, tiny_bases: Callable[[str], Path]) -> Callable[..., TrainingResult]:
    def start(
        rows: list[dict[str, Any]] | None = None,
        *,
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        kind: str = "qwen3",
        lines: list[str] | None = None,
        **settings: Any,
    ) -> TrainingResult:
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join(map(json.dumps, rows or pairs(90))))
        defaults: dict[str, Any] = {
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "max_length": 60,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        return train_pairwise(
            PairwiseRewardConfig(str(tmp_path / "model"), **{**defaults, **settings}),
            ModelArguments(model_name_or_path=str(tiny_bases(kind)), **(model or {})),
            DataArguments(dataset_name=str(path), **{"eval_fraction": 0.3, **(data or {})}),
            say=(lines if lines is not None else []).append,
        )

    return start


def stock_scores(result: TrainingResult, row: dict[str, Any]) -> list[float]:
    """Stock transformers on the saved folder, a text at a time."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(
        result.output_dir, dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.output_dir)
    scores = []
    for side in ("chosen", "rejected"):
        ids = tokenizer.apply_chat_template(
            row["prompt"] + row[side], tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            scores.append(float(model(**ids).logits))
    return scores


def test_a_whole_run(run: Any) -> None:
    lines: list[str] = []
    result = run(pairs(90, long=4), lines=lines)
    told = "\n".join(lines)
    counts = [result.reports[name] for name in ("train", "held_out")]
    assert sum(report.dropped_overlong for report in counts) == 4
    for report in counts:
        assert str(report) in told
    assert "longer text is right in" in result.summary()

    # learned, on prompts that it has not seen
    assert result.metrics["accuracy"] == 1.0
    assert result.metrics["n"] == len(result.test)
    assert set(result.metrics["subsets"]) == {"even", "odd"}
    calibration = {prompt_key(row) for row in result.calibration.rows}
    test = {prompt_key(row) for row in result.test.rows}
    assert calibration
    assert test
    assert not calibration & test
    assert any("eval_accuracy" in entry for entry in result.log_history)

    # what is saved gives the scores that were measured, to stock transformers too
    first = [result.test.chosen[0], result.test.rejected[0]]
    assert stock_scores(result, result.test.rows[0]) == pytest.approx(first, abs=1e-5)
    loaded = load_reward_model(result.output_dir)
    manifest = loaded.manifest
    assert manifest is not None
    assert manifest.temperature == pytest.approx(result.temperature)
    assert manifest.metrics["accuracy"] == 1.0
    both = np.concatenate([result.calibration.chosen, result.calibration.rejected])
    assert manifest.reference is not None
    assert manifest.reference.mean == pytest.approx(both.mean())
    assert manifest.reference.n == both.size
    assert manifest.data["train"]["kept"] == counts[0].kept
    assert manifest.data["held_out"]["test"] == len(result.test)
    assert manifest.training["learning_rate"] == 3e-3
    assert manifest.training["train_pairs"] == counts[0].kept
    assert not result.reward_model.model.training
    assert "forward" not in vars(result.reward_model.model)


def test_lora_is_merged_into_a_plain_checkpoint(run: Any) -> None:
    pytest.importorskip("peft")
    result = run(model={"use_peft": True, "lora_r": 4}, learning_rate=1e-2)
    assert result.metrics["accuracy"] == 1.0
    names = {path.name for path in result.output_dir.iterdir()}
    assert "model.safetensors" in names
    assert "adapter_config.json" not in names
    first = [result.test.chosen[0], result.test.rejected[0]]
    assert stock_scores(result, result.test.rows[0]) == pytest.approx(first, abs=1e-4)
    assert result.manifest.training["lora"]["r"] == 4


def test_absolute_positions_and_a_base_with_fewer_of_them(run: Any) -> None:
    lines: list[str] = []
    result = run(kind="gpt2", max_length=1000, lines=lines)
    assert any("max_length set to 128 tokens (was 1000)" in line for line in lines)
    assert result.reward_model.formatter.max_length == 128
    first = [result.test.chosen[0], result.test.rejected[0]]
    assert stock_scores(result, result.test.rows[0]) == pytest.approx(first, abs=1e-5)


def test_held_out_pairs_from_elsewhere(run: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    rows = pairs(60)
    other.write_text("\n".join(map(json.dumps, rows[30:])))
    lines: list[str] = []
    result = run(
        rows[:33], data={"eval_dataset_name": str(other), "calibration_fraction": 1.0}, lines=lines
    )
    told = "\n".join(lines)
    assert "held-out prompts stand in the training rows: 1 prompts, 3 held-out rows" in told
    assert "same held-out pairs" in told
    assert len(result.test) == len(result.calibration) == 30
    assert result.reports["train"].rows == 33
    assert result.manifest.data["held_out"]["source"] == str(other)


def test_the_same_seed_gives_the_same_model(run: Any) -> None:
    weights = [run().reward_model.model.score.weight.detach().clone() for _ in range(2)]
    assert torch.equal(*weights)
    other = run(seed=1).reward_model.model.score.weight
    assert not torch.equal(other, weights[0])


def test_resume_by_the_last_checkpoint(run: Any) -> None:
    whole = run(save_strategy="steps", save_steps=3, save_total_limit=None)
    weights = whole.reward_model.model.state_dict()
    for folder in whole.output_dir.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > 3:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    again = run(
        save_strategy="steps", save_steps=3, save_total_limit=None, resume_from_checkpoint="last"
    )
    for name in ("train_pairs", "train_loss"):  # of the whole run
        assert again.train_metrics[name] == pytest.approx(whole.train_metrics[name], rel=1e-6)
    for name, value in again.reward_model.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert again.temperature == whole.temperature


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resume_from_checkpoint": "last"}, "no checkpoint to go on from"),
        ({"resume_from_checkpoint": "/nowhere"}, "is no training checkpoint"),
        ({"chat_template_path": "nowhere.jinja"}, "no such file"),
        ({"max_length": 3}, "all 63 pairs"),
    ],
)
def test_settings_that_lead_nowhere(run: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CompanionError, match=message):
        run(**settings)


def test_one_prompt_cannot_be_split(run: Any) -> None:
    with pytest.raises(DataError, match="part is empty"):
        run(pairs(3))


def test_bad_rows_can_be_skipped_and_are_counted(run: Any) -> None:
    rows = pairs(90)
    rows[5]["rejected"] = rows[5]["chosen"]
    with pytest.raises(DataError, match="chosen equals rejected"):
        run(rows)
    lines: list[str] = []
    result = run(rows, data={"on_error": "skip"}, lines=lines)
    assert any("1 rows skipped: chosen equals rejected" in line for line in lines)
    assert sum(report.rows for report in result.reports.values()) == 89
