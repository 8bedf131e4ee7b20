"""K-wise training: rows, batches, figures, a whole run whose folder is a plain reward model."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from example_kinds import KWISE, rankings

from companion import RewardScorer, load_base, load_rows_with_report
from companion.errors import DataError
from companion.training import format_rankings
from companion.training.kwise import RankingCollator


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
    rows = KWISE.ids(7)
    data = Dataset.from_list(rows)
    trainer = KWISE.trainer(tiny_base, tmp_path, rows=rows, per_device_eval_batch_size=3)
    trainer.eval_dataset = data
    figures = trainer.evaluate()
    predictions = trainer.predict(data).predictions
    assert predictions.shape == (7, 4)
    scorer = RewardScorer(load_base(tiny_base))
    right = pairs = top = 0
    for row, values in zip(rows, predictions, strict=True):
        scores = scorer.score_encoded(row["completion_ids"])
        np.testing.assert_allclose(values[: len(scores)], scores, atol=1e-5)
        assert np.isnan(values[len(scores) :]).all()
        ordered = [
            (i, j)
            for i, j in itertools.combinations(range(len(scores)), 2)
            if row["ranks"][i] < row["ranks"][j]
        ]
        right += sum(scores[i] > scores[j] for i, j in ordered)
        pairs += len(ordered)
        top += int(scores.argmax() == 0)
    assert figures["eval_accuracy"] == pytest.approx(right / pairs)
    assert figures["eval_top1"] == pytest.approx(top / 7)
    assert figures["eval_num_prompts"] == 7
    # other rows, with more completions than any row before, tokenised on the way
    wide = rankings(2)
    wide[0]["completions"] = [[{"role": "assistant", "content": "good " * k}] for k in range(1, 7)]
    wide[0]["ranks"] = [float(k) for k in range(6)]
    assert trainer.evaluate(Dataset.from_list(wide))["eval_num_prompts"] == 2


def test_mistakes_are_named(tiny_base: Path) -> None:
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
