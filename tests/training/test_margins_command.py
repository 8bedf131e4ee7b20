"""Margins and ratings by ``companion train pairwise``; the temperature is fitted afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from companion import RewardManifest, RewardScorer, fit_temperature
from companion.cli.main import main


def pairs(n: int) -> list[dict[str, Any]]:
    """Rated pairs; one in six is labelled the other way round, so that no T is extreme."""
    rows = []
    for i in range(n):
        good = {"role": "assistant", "content": f"the answer is {i % 3}"}
        bad = {"role": "assistant", "content": f"no {i % 3}"}
        chosen, rejected = (bad, good) if i % 6 == 5 else (good, bad)
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"Ana has {i % 20} pens and {i // 20}"}],
                "chosen": [chosen],
                "rejected": [rejected],
                "chosen_score": 5.0,
                "rejected_score": 5.0 - (1 + i % 3),
            }
        )
    return rows


def with_margin(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "margin": row["chosen_score"] - row["rejected_score"]}


def ranked(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": row["prompt"],
        "completions": [row["rejected"], row["chosen"]],
        "ratings": [row["rejected_score"], row["chosen_score"]],
    }


def train(folder: Path, base: Path, rows: list[dict[str, Any]], *more: str) -> RewardManifest:
    folder.mkdir()
    for name, part in (("train", rows[:96]), ("test", rows[96:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    arguments = {
        "model_name_or_path": base,
        "dataset_name": folder / "train.jsonl",
        "eval_dataset_name": folder / "test.jsonl",
        "output_dir": folder / "model",
        "calibration_fraction": 1,  # all held-out pairs set the temperature
        "per_device_train_batch_size": 16,
        "learning_rate": "3e-3",
        "save_strategy": "no",
        "disable_tqdm": "true",
        "report_to": "none",
    }
    flags = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    assert main(["train", "pairwise", *flags, *more]) == 0
    return RewardManifest.load(folder / "model")


def test_margins_and_ratings_train_and_the_temperature_is_fitted(
    tiny_base: Path, tmp_path: Path
) -> None:
    rows = pairs(150)
    found = {
        "none": train(tmp_path / "none", tiny_base, rows, "--margins", "none"),
        "margin": train(tmp_path / "margin", tiny_base, [with_margin(row) for row in rows]),
        "ratings": train(tmp_path / "ratings", tiny_base, rows, "--margins", "ratings"),
        "ranked": train(
            tmp_path / "ranked", tiny_base, [ranked(row) for row in rows], "--margins", "ratings"
        ),
    }
    loss = {name: manifest.training["train_loss"] for name, manifest in found.items()}
    # three ways to say the same margins, and they make the loss larger than none does
    assert loss["ratings"] == pytest.approx(loss["margin"], abs=1e-6)
    assert loss["margin"] > loss["none"] + 0.3
    # in a ranking the higher rating wins, as in these pairs
    assert loss["ranked"] == pytest.approx(loss["margin"], abs=1e-6)
    for name, manifest in found.items():
        scorer = RewardScorer.from_pretrained(tmp_path / name / "model", device="cpu")
        scores = scorer.score_pairs(rows[96:])
        gaps = scores.chosen - scores.rejected
        fitted = float(fit_temperature(gaps))
        assert manifest.temperature == pytest.approx(fitted, rel=1e-3), name

        def nll(t: float, gaps: np.ndarray = gaps) -> float:
            return float(np.logaddexp(0, -gaps / t).mean())

        # no other temperature makes σ(gap / T) fit the labels better, and 1 does so worse
        assert nll(fitted) <= min(nll(1.0), nll(0.9 * fitted), nll(1.1 * fitted))
        figures = manifest.metrics["at_temperature"]
        assert figures["temperature"] == manifest.temperature
        assert figures["loss"] == pytest.approx(nll(fitted), abs=1e-4)


def test_ratings_that_are_not_used_are_said(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "given", tiny_base, pairs(150))
    assert "margins='ratings' makes margins of them" in capsys.readouterr().out
