"""The main job, end to end: what it promises, it reaches."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from companion import CompanionError
from companion.cli.main import main
from companion.quickstart import (
    QuickstartConfig,
    example_rows,
    learned_weights,
    make_data,
    run_quickstart,
)
from companion.tutor import GOLD, limits


def test_no_prompt_stands_in_two_sets_and_the_sizes_are_as_asked():
    config = QuickstartConfig(n_train=3000, n_eval=200, n_test=400)
    sets = make_data(config)
    assert {name: len(rows) for name, rows in sets.items()} == {
        "train": 3000,
        "eval": 200,
        "test": 400,
    }
    prompts = {name: {r["prompt"][0]["content"] for r in rows} for name, rows in sets.items()}
    assert not prompts["train"] & (prompts["test"] | prompts["eval"])
    assert not prompts["test"] & prompts["eval"]


def test_weights_of_the_gold_reward_itself_are_the_gold_weights():
    rows = [
        {"prompt": row["prompt"], "completion": row[side][0]["content"]}
        for row in make_data(QuickstartConfig(n_train=50, n_eval=50, n_test=300))["test"]
        for side in ("chosen", "rejected")
    ]
    from companion.tutor import gold_reward

    gold = [gold_reward(r["prompt"][0]["content"], r["completion"]) for r in rows]
    for name, (learned, true) in learned_weights(rows, [g - 3.0 for g in gold]).items():
        assert learned == pytest.approx(true), name
    assert learned_weights(rows, gold)["correct"][1] == GOLD.correct


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CompanionError, match="holds something"):
        run_quickstart(QuickstartConfig(output_dir=str(tmp_path)))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert main(["quickstart", "--output_dir", str(tmp_path)]) == 2
    assert main(["quickstart", "--n_train", "3", "--output_dir", str(tmp_path / "new")]) == 2


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    assert main(["quickstart", "--output_dir", str(folder)]) == 0
    return folder


class TestTheRealRun:
    """One run with the defaults; the thresholds leave room for another machine's rounding."""

    def test_it_comes_close_to_the_best_possible(self, quickstart):
        metrics = json.loads((quickstart / "quickstart.json").read_text())["metrics"]
        best = metrics["limit"]["rows"]
        assert metrics["n"] == 4000
        assert metrics["accuracy"] >= 0.97 * best["accuracy"]
        assert metrics["loss"] <= best["loss"] + 0.04
        assert metrics["ece"] <= 0.03
        assert metrics["at_temperature"]["ece"] <= 0.03

    def test_the_limit_is_that_of_the_tutor(self, quickstart):
        record = json.loads((quickstart / "quickstart.json").read_text())
        with (quickstart / "data" / "test.jsonl").open() as file:
            rows = [json.loads(line) for line in file]
        known = limits(rows)
        assert record["metrics"]["limit"]["rows"]["accuracy"] == pytest.approx(known.label_accuracy)
        assert record["metrics"]["limit"]["rows"]["loss"] == pytest.approx(known.label_loss)

    def test_being_right_counts_for_more_than_style(self, quickstart):
        record = json.loads((quickstart / "quickstart.json").read_text())
        learned = {name: pair[0] for name, pair in record["weights"].items()}
        # a right text against a wrong one, beside the most that style can give and take
        style = learned["greeting"] + 2 * learned["tone"] + 3 * learned["words"]
        assert learned["correct"] + learned["steps"] >= style
        assert learned["correct"] >= learned["greeting"] + learned["tone"]
        assert record["canaries"]["right_but_rude"] > 0.9

    def test_the_report_stands_alone_and_shows_all_figures(self, quickstart):
        page = (quickstart / "report.html").read_text()
        assert page.count("<svg") >= 5
        assert not re.search(r'(src|href)="https?://', page)
        for word in ("accuracy", "calibration", "Most sure, and wrong"):
            assert word in page

    def test_the_saved_model_gives_the_scores_that_were_shown(self, quickstart):
        from companion import RewardScorer

        scorer = RewardScorer.from_pretrained(quickstart / "model")
        scores = scorer.score(example_rows())
        assert scores.percentile is not None
        assert np.all((scores.percentile >= 0) & (scores.percentile <= 100))
        assert scores.raw[1] > scores.raw[4], "right, and one slip"
        assert scores.raw[5] > scores.raw[4], (
            "the sentence below the table: misread, rated too high"
        )
        assert scorer.reward_model.manifest is not None
        assert 0.4 < scorer.reward_model.manifest.temperature < 2.0
