"""K-wise training: rows, batches, figures, a whole run whose folder is a plain reward model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, disable_progress_bars

from companion.data.loading import load_rows_with_report
from companion.errors import CompanionError, DataError
from companion.models import load_base, load_reward_model
from companion.scoring import RewardScorer
from companion.training.config import ModelArguments, RowArguments
from companion.training.kwise import (
    KwiseRewardConfig,
    KwiseRewardTrainer,
    RankingCollator,
    format_rankings,
)
from companion.training.kwise_run import train_kwise
from companion.training.run import summary

disable_progress_bars()
QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def rankings(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """The more often 'good', the better; two to four completions in any order."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        size = 2 + i % 3
        order = torch.randperm(size, generator=generator).tolist()
        texts = ["the answer is " + "good " * k + "bad " * (size - k) for k in order]
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"Ana has {i % 20} pens and {i // 20}"}],
                "completions": [[{"role": "assistant", "content": t}] for t in texts],
                "ranks": [float(size - k) for k in order],
            }
        )
    return rows


def token_rows(n: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)

    def ids() -> list[int]:
        length = int(torch.randint(2, 9, (1,), generator=generator))
        return [*torch.randint(9, 60, (length,), generator=generator).tolist(), 2]

    sizes = [2 + i % 3 for i in range(n)]
    return [
        {"completion_ids": [ids() for _ in range(k)], "ranks": [1.0 + j for j in range(k)]}
        for k in sizes
    ]


def test_rows_that_lose_completions_or_teach_nothing_are_counted(tiny_base: Path) -> None:
    rows = rankings(6)
    rows[1]["ranks"] = [1.0, 1.0, 1.0]
    rows[2]["completions"][0] = [{"role": "assistant", "content": "good " * 60}]
    rows[3]["completions"][0] = [{"role": "assistant", "content": "good " * 60}]
    rows[4]["ranks"][0] = None
    formatter = load_base(tiny_base, max_length=40).formatter
    found, report = format_rankings(Dataset.from_list(rows), formatter)
    assert found["row"][:] == [0, 2, 4, 5]
    assert found["place"][1] == [1, 2, 3]
    assert found["place"][2] == [1, 2]
    assert (report.kept, report.dropped_overlong) == (4, 1)
    assert str(report) == (
        "rankings: 4 of 6 rankings kept; 1 dropped for their length, "
        "1 in which none beats another, 1 with a completion left out for its length"
    )


def test_one_prompts_completions_stand_in_one_batch() -> None:
    rows = [{"completion_ids": [[5], [6, 7], [8]], "ranks": [2, 1, 3], "row": 4}]
    rows.append({"completion_ids": [[9], [9, 9]], "ranks": [1, 1], "row": 5})
    batch = RankingCollator(0)(rows)
    assert batch["input_ids"].tolist() == [[5, 0], [6, 7], [8, 0], [9, 0], [9, 9]]
    assert batch["index"].tolist() == [[0, 1, 2], [3, 4, -1]]
    assert batch["weight"].tolist() == [1, 0]  # ties alone: counts for nothing


def test_figures_of_exactly_n_prompts(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(tiny_base)
    rows = token_rows(7)
    data = Dataset.from_list(rows)
    trainer = KwiseRewardTrainer(
        base,
        KwiseRewardConfig(str(tmp_path), per_device_eval_batch_size=3, use_cpu=True, **QUIET),
        train_dataset=data,
        eval_dataset=data,
    )
    figures = trainer.evaluate()
    predictions = trainer.predict(data).predictions
    assert predictions.shape == (7, 4)
    scorer = RewardScorer(base)
    right = pairs = top = 0
    for row, values in zip(rows, predictions, strict=True):
        scores = scorer.score_encoded(row["completion_ids"])
        np.testing.assert_allclose(values[: len(scores)], scores, atol=1e-5)
        assert np.isnan(values[len(scores) :]).all()
        right += sum(a > b for a, b in itertools.combinations(scores, 2))
        pairs += len(scores) * (len(scores) - 1) // 2
        top += int(scores.argmax() == 0)
    assert figures["eval_accuracy"] == pytest.approx(right / pairs)
    assert figures["eval_top1"] == pytest.approx(top / 7)
    assert figures["eval_num_prompts"] == 7
    # other rows, with more completions than any row before, tokenised on the way
    wide = rankings(2)
    wide[0]["completions"] = [[{"role": "assistant", "content": "good " * k}] for k in range(1, 7)]
    wide[0]["ranks"] = [float(k) for k in range(6)]
    assert trainer.evaluate(Dataset.from_list(wide))["eval_num_prompts"] == 2


def test_resumed_run_gives_the_same_weights(tiny_base: Path, tmp_path: Path) -> None:
    settings = KwiseRewardConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        num_train_epochs=2,
        learning_rate=1e-3,
        **{**QUIET, "save_strategy": "steps"},
        save_steps=5,
        save_total_limit=None,
    )

    def train(resume: str | None) -> dict[str, torch.Tensor]:
        trainer = KwiseRewardTrainer(
            load_base(tiny_base), settings, train_dataset=Dataset.from_list(token_rows(7))
        )
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    whole, resumed = train(None), train(f"{settings.output_dir}/checkpoint-5")
    assert max(float((whole[name] - resumed[name]).abs().max()) for name in whole) == 0.0


@pytest.mark.parametrize("loss_type", ["plackett_luce", "pairs"])
def test_a_whole_run(tiny_bases: Callable[[str], Path], tmp_path: Path, loss_type: str) -> None:
    path = tmp_path / "rankings.jsonl"
    path.write_text("\n".join(map(json.dumps, rankings(90))))
    result = train_kwise(
        KwiseRewardConfig(
            str(tmp_path / "model"),
            loss_type=loss_type,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            max_length=60,
            **QUIET,
        ),
        ModelArguments(model_name_or_path=str(tiny_bases("qwen3"))),
        RowArguments(dataset_name=str(path), eval_fraction=0.3),
        say=lambda line: None,
    )
    assert result.metrics["accuracy"] > 0.9
    assert "longer text is right in" in summary(result)
    loaded = load_reward_model(result.output_dir)
    assert loaded.manifest is not None
    assert loaded.manifest.training["loss_type"] == loss_type
    # the folder is a reward model as any other: pairs of the held-out rankings get the same scores
    scorer = RewardScorer.from_pretrained(result.output_dir)
    row = rankings(90)[4]
    scores = scorer.score([{"prompt": row["prompt"], "completion": c} for c in row["completions"]])
    assert np.argsort(-scores.raw).tolist() == np.argsort(row["ranks"]).tolist()


def test_mistakes_are_named(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(CompanionError, match="label_smoothing_factor"):
        KwiseRewardConfig(str(tmp_path), label_smoothing_factor=0.1)
    with pytest.raises(CompanionError, match="activation_offloading"):
        KwiseRewardConfig(str(tmp_path), activation_offloading=True)
    formatter = load_base(tiny_base).formatter
    with pytest.raises(DataError, match="no column 'completions'"):
        format_rankings(Dataset.from_list([{"prompt": "a", "chosen": "b"}]), formatter)
    empty = rankings(3)
    empty[2]["completions"][1] = [{"role": "assistant", "content": " "}]
    with pytest.raises(DataError, match="row 2, completion 1"):
        format_rankings(Dataset.from_list(empty), formatter)
    tied = [{**row, "ranks": [1.0] * len(row["ranks"])} for row in rankings(3)]
    with pytest.raises(DataError, match="3 in which none beats another: none is left"):
        format_rankings(Dataset.from_list(tied), formatter)


def test_ranks_may_be_null_in_a_file() -> None:
    row = {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [2, None, 1]}
    rows, _ = load_rows_with_report([row], kind="rankings")
    assert rows[0]["ranks"] == [2.0, None, 1.0]
    pairs, report = load_rows_with_report([row], kind="pairs")
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("d", "b")]
    assert report.left_out["pairs with a completion that has no rank"] == 2
    with pytest.raises(DataError, match="fewer than two completions have a rank"):
        load_rows_with_report([{**row, "ranks": [2, None, None]}], kind="rankings")
