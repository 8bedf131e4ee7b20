"""The trainer: figures of exactly n pairs, n predictions, resume, refusals, LoRA."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, disable_progress_bars
from trl import RewardConfig, RewardTrainer

from companion import (
    PairwiseRewardConfig,
    PairwiseRewardTrainer,
    load_base,
    load_reward_model,
)
from companion.engine.devices import has_bf16
from companion.errors import CompanionError, DataError, ModelError, ReadoutError
from companion.models import ScoreHead, find_head

disable_progress_bars()
QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., PairwiseRewardConfig]:
    def make(**settings: Any) -> PairwiseRewardConfig:
        return PairwiseRewardConfig(str(tmp_path / "out"), **{**QUIET, **settings})

    return make


def token_rows(n: int, *, seed: int = 0, first: int = 9, last: int = 60) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(2, 12, (1,), generator=generator))
        return [*torch.randint(first, last, (length,), generator=generator).tolist(), 2]

    return [{"chosen_ids": ids(), "rejected_ids": ids()} for _ in range(n)]


def text_rows(n: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"Ana has {i % 20} pens"}],
            "chosen": [{"role": "assistant", "content": f"the answer is {i % 20}"}],
            "rejected": [{"role": "assistant", "content": "no" + " more" * (i % 7)}],
        }
        for i in range(n)
    ]


def scores_alone(model: Any, rows: list[dict[str, Any]]) -> np.ndarray:
    """Stock transformers, a text at a time, without padding."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        return np.array(
            [
                [
                    float(type(plain).forward(plain, input_ids=torch.tensor([row[side]])).logits)
                    for side in ("chosen_ids", "rejected_ids")
                ]
                for row in rows
            ]
        )


def test_five_pairs_in_batches_of_four(config: Any, tiny_bases: Any, tmp_path: Path) -> None:
    """0.60 is true; the mean of batch means, which stock TRL reports, is 0.75 (trl #7010)."""
    base = load_base(tiny_bases("qwen3"))
    rows = token_rows(5)
    scores = scores_alone(base.model, rows)
    for i, right in enumerate([True, True, False, False, True]):
        if (scores[i, 0] > scores[i, 1]) != right:
            rows[i] = {"chosen_ids": rows[i]["rejected_ids"], "rejected_ids": rows[i]["chosen_ids"]}
    data = Dataset.from_list(rows)
    settings = {"per_device_eval_batch_size": 4, "use_cpu": True}
    trainer = PairwiseRewardTrainer(base, config(**settings), train_dataset=data, eval_dataset=data)
    figures = trainer.evaluate()
    assert figures["eval_accuracy"] == pytest.approx(0.60)
    assert figures["eval_num_pairs"] == 5

    expected = scores_alone(base.model, rows)
    margins = expected[:, 0] - expected[:, 1]
    nll = np.logaddexp(0, -margins)
    assert figures["eval_margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert figures["eval_nll"] == pytest.approx(nll.mean(), abs=1e-5)
    loss = (nll + 0.01 * expected.sum(axis=1) ** 2).mean()
    assert figures["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert figures["eval_max_reward"] == pytest.approx(expected.max(), abs=1e-5)

    predictions = trainer.predict(data).predictions
    assert predictions.shape == (5, 2)
    np.testing.assert_allclose(predictions, expected, atol=1e-5)

    stock = RewardTrainer(
        load_base(tiny_bases("qwen3")).model,
        RewardConfig(str(tmp_path / "stock"), bf16=False, **QUIET, **settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=base.tokenizer,
    )
    assert stock.evaluate()["eval_accuracy"] == pytest.approx(0.75)
    assert len(stock.predict(data).predictions) != 5


def test_logged_figures_are_means_over_pairs(config: Any, tiny_bases: Any) -> None:
    rows = token_rows(7)
    base = load_base(tiny_bases("llama"))
    expected = scores_alone(base.model, rows)
    trainer = PairwiseRewardTrainer(
        base,
        config(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            learning_rate=0.0,
            logging_steps=2,
            center_rewards_coefficient=None,
        ),
        train_dataset=Dataset.from_list(rows),
    )
    output = trainer.train()
    margins = expected[:, 0] - expected[:, 1]
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(np.logaddexp(0, -margins).mean(), abs=1e-5)
    assert logged["accuracy"] == pytest.approx((margins > 0).mean())
    assert logged["num_tokens"] == sum(
        len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")
    )
    assert output.training_loss == pytest.approx(logged["loss"])
    assert output.metrics["train_pairs"] == 7


def test_training_learns_and_saves_a_checkpoint_that_loads(config: Any, tiny_bases: Any) -> None:
    rows = text_rows(64)
    settings = config(
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        num_train_epochs=3,
        save_strategy="epoch",
        train_sampling_strategy="group_by_length",
    )
    trainer = PairwiseRewardTrainer(
        load_base(tiny_bases("qwen3")),
        settings,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:20]),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_accuracy"] == 1.0
    folder = sorted(Path(str(settings.output_dir)).glob("checkpoint-*"))[-1]
    loaded = load_reward_model(folder)
    assert loaded.formatter.fingerprint() == trainer.formatter.fingerprint()
    ids = loaded.formatter.encode_pair(rows[0])
    assert ids is not None
    again = scores_alone(
        loaded.model, [{"chosen_ids": ids[0].input_ids, "rejected_ids": ids[1].input_ids}]
    )
    np.testing.assert_allclose(
        again, trainer.predict(Dataset.from_list(rows[:1])).predictions, atol=1e-5
    )


def test_dropped_pairs_are_counted_logged_and_nan_in_predict(
    config: Any, tiny_bases: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = text_rows(8)
    rows[3]["rejected"][0]["content"] = "no" + " more" * 50
    data = Dataset.from_list(rows)
    settings = config(max_length=40)
    with caplog.at_level(logging.INFO):
        trainer = PairwiseRewardTrainer(
            tiny_bases("qwen3").as_posix(), settings, train_dataset=data
        )
    report = trainer.format_reports["train"]
    assert (report.rows, report.kept, report.dropped_overlong) == (8, 7, 1)
    assert "1 dropped for their length" in caplog.text
    assert trainer.train().metrics["train_pairs"] == 7
    predictions = trainer.predict(data).predictions
    assert predictions.shape == (8, 2)
    assert np.isnan(predictions).any(axis=1).tolist() == [i == 3 for i in range(8)]
    tokens = Dataset.from_list([*token_rows(3), {"chosen_ids": [9] * 50, "rejected_ids": [9, 2]}])
    assert np.isnan(trainer.predict(tokens).predictions).any(axis=1).tolist() == [False] * 3 + [
        True
    ]


def test_cut_prompts_are_counted(config: Any, tiny_bases: Any) -> None:
    rows = text_rows(4)
    rows[1]["prompt"][0]["content"] = "Ana has" + " more" * 60
    settings = config(max_length=40, overlong="truncate_prompt")
    trainer = PairwiseRewardTrainer(
        tiny_bases("qwen3").as_posix(), settings, train_dataset=Dataset.from_list(rows)
    )
    report = trainer.format_reports["train"]
    assert (report.kept, report.truncated) == (4, 1)
    assert report.tokens_cut > 0
    assert report.longest == 40


@pytest.mark.parametrize("formatted", [True, False])
def test_all_rows_too_long(config: Any, tiny_bases: Any, formatted: bool) -> None:
    rows = token_rows(4) if formatted else text_rows(4)
    with pytest.raises(DataError, match="all 4 pairs") as caught:
        PairwiseRewardTrainer(
            tiny_bases("qwen3").as_posix(),
            config(max_length=2),
            train_dataset=Dataset.from_list(rows),
        )
    assert "--max_length" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("formatted", [True, False])
def test_bad_margins_name_the_row(
    config: Any, tiny_bases: Any, formatted: bool, value: float | None
) -> None:
    rows = token_rows(4) if formatted else text_rows(4)
    rows = [{**row, "margin": 1.0} for row in rows]
    rows[2]["margin"] = value
    with pytest.raises(DataError, match=r"train, row 2, field 'margin'"):
        PairwiseRewardTrainer(
            load_base(tiny_bases("qwen3")), config(), train_dataset=Dataset.from_list(rows)
        )


def test_margin_and_smoothing_enter_the_loss(config: Any, tiny_bases: Any) -> None:
    rows = [{**row, "margin": 0.7 * i} for i, row in enumerate(token_rows(5))]
    base = load_base(tiny_bases("qwen3"))
    scores = scores_alone(base.model, rows)
    data = Dataset.from_list(rows)
    trainer = PairwiseRewardTrainer(
        base,
        config(label_smoothing_factor=0.1, center_rewards_coefficient=0.3),
        train_dataset=data,
        eval_dataset=data,
    )
    z = scores[:, 0] - scores[:, 1] - 0.7 * np.arange(5)
    loss = 0.9 * np.logaddexp(0, -z) + 0.1 * np.logaddexp(0, z) + 0.3 * scores.sum(axis=1) ** 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.mean(), rel=1e-5)


def test_guards_speak_before_training(config: Any, tiny_bases: Any) -> None:
    data = Dataset.from_list(token_rows(4))
    base = load_base(tiny_bases("qwen3"))
    base.model.config.pad_token_id = 5
    with pytest.raises(ReadoutError, match="pad_token_id"):
        PairwiseRewardTrainer(base, config(), train_dataset=data)
    base = load_base(tiny_bases("qwen3"))
    base.tokenizer.pad_token = base.tokenizer.eos_token
    with pytest.raises(ReadoutError, match="the pad token is the EOS"):
        PairwiseRewardTrainer(base, config(), train_dataset=data)
    base = load_base(tiny_bases("qwen3"))
    with torch.no_grad():
        find_head(base.model).weight.zero_()
    with pytest.raises(ModelError, match="all zero"):
        PairwiseRewardTrainer(base, config(), train_dataset=data)
    with pytest.raises(ModelError, match="without a tokenizer"):
        PairwiseRewardTrainer(load_base(tiny_bases("qwen3")).model, config(), train_dataset=data)


def test_plain_model_gets_the_fp32_head(config: Any, tiny_bases: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    base = load_base(tiny_bases("qwen3"))
    model = AutoModelForSequenceClassification.from_config(base.model.config)
    trainer = PairwiseRewardTrainer(
        model,
        config(),
        train_dataset=Dataset.from_list(token_rows(4)),
        processing_class=base.tokenizer,
    )
    assert isinstance(find_head(trainer.model), ScoreHead)
    assert trainer.train().metrics["train_pairs"] == 4


def test_lora_trains_the_head_and_little_else(config: Any, tiny_bases: Any) -> None:
    peft = pytest.importorskip("peft")
    data = Dataset.from_list(token_rows(12))
    base = load_base(tiny_bases("qwen3"))
    head_before = find_head(base.model).weight.detach().clone()
    body_before = base.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer = PairwiseRewardTrainer(
        base,
        config(learning_rate=1e-2),
        train_dataset=data,
        peft_config=peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"),
    )
    trainer.train()
    inner = trainer.model.get_base_model()
    trained = inner.score.modules_to_save["default"]
    assert not torch.equal(trained.weight, head_before)
    assert torch.equal(inner.score.original_module.weight, head_before)
    assert torch.equal(inner.model.layers[0].mlp.up_proj.base_layer.weight, body_before)


def test_defaults() -> None:
    config = PairwiseRewardConfig("out")
    assert config.num_train_epochs == 1
    assert config.center_rewards_coefficient == 0.01
    assert config.bf16 is has_bf16()
    assert config.activation_checkpointing is False
    assert config.report_to == []


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing_factor": 0.6},
        {"accelerator_config": {"split_batches": True}},
        {"accelerator_config": {"dispatch_batches": True}},
        {"train_sampling_strategy": "batch_rebalance"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_cannot_be_honoured_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(CompanionError):
        PairwiseRewardConfig("out", **settings)


def test_user_metrics_get_one_row_a_pair(config: Any, tiny_bases: Any) -> None:
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {
            "mine": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())
        }

    data = Dataset.from_list(token_rows(5))
    trainer = PairwiseRewardTrainer(
        load_base(tiny_bases("qwen3")),
        config(per_device_eval_batch_size=2),
        train_dataset=data,
        eval_dataset={"a": data, "b": data.select(range(3))},
        compute_metrics=metrics,
    )
    figures = trainer.evaluate()
    assert seen == [(5, 2), (3, 2)]
    assert figures["eval_a_mine"] == pytest.approx(figures["eval_a_accuracy"])
    assert figures["eval_b_num_pairs"] == 3
