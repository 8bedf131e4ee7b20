"""Two versions of a model: one percentile threshold accepts the same share, a raw one need not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from companion.cli.main import main
from companion.data import prompt_key, write_rows
from companion.evaluation import compare_scorers
from companion.models import RewardManifest
from companion.scoring import RewardScorer
from companion.training import DataArguments, ModelArguments, PairwiseRewardConfig, train_pairwise
from companion.tutor import TUTOR_BASE, make_rows

PAIRS = 3_000  #: of the reference and of the test each: 6,000 texts
PERCENTILES = (20, 50, 80)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_rows(rows, path)
    return path


def trained(folder: Path, rows: list[dict[str, Any]], seed: int) -> Path:
    """A short run; what differs between two of them is the seed: head, order, rows."""
    folder.mkdir()
    sets = (("train", rows[:1_200]), ("eval", rows[1_200:]))
    data = [written(folder / f"{name}.jsonl", part) for name, part in sets]
    train_pairwise(
        PairwiseRewardConfig(
            output_dir=str(folder / "model"),
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=6e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            eval_strategy="no",
            seed=seed,
        ),
        ModelArguments(model_name_or_path=str(TUTOR_BASE)),
        DataArguments(
            dataset_name=str(data[0]), eval_dataset_name=str(data[1]), calibration_fraction=1.0
        ),
        say=lambda text: None,
    )
    return folder / "model"


@pytest.mark.slow
def test_one_percentile_threshold_for_two_versions(tmp_path: Path):
    """Reference and test have 6,000 texts each, on prompts of their own."""
    seen: set[str] = set()

    def fresh(n: int, seed: int) -> list[dict[str, Any]]:
        rows = make_rows("pairs", n + n // 3, seed=seed)
        rows = [row for row in rows if prompt_key(row) not in seen][:n]
        assert len(rows) == n
        seen.update(map(prompt_key, rows))
        return rows

    reference = written(tmp_path / "reference.jsonl", fresh(PAIRS, 71))
    test = fresh(PAIRS, 72)
    old = trained(tmp_path / "old", fresh(1_400, 73), seed=1)
    new = trained(tmp_path / "new", fresh(1_400, 74), seed=2)
    # the references of both of the same texts
    for a, b in ((new, old), (old, new)):
        argv = ["compare", a, b, "--data", reference, "--device", "cpu", "--write_reference"]
        assert main([str(word) for word in argv]) == 0
        stats = RewardManifest.load(b).reference
        assert stats is not None
        assert stats.n == 2 * PAIRS >= 5_000
    scorers = [RewardScorer.from_pretrained(folder, device="cpu") for folder in (old, new)]
    result = compare_scorers(*scorers, test)
    gaps = []
    for percentile in PERCENTILES:
        figures = replace(result, percentile=percentile).measure().metrics
        assert figures["n_texts"] >= 5_000
        assert figures["correlation"]["spearman"] < 0.99  # they are two models
        own, raw = figures["accepted"]["own"], figures["accepted"]["raw"]
        shares = {side: 100 * own[side]["share"] for side in ("old", "new")}
        gaps.append(100 * abs(raw["old"]["share"] - raw["new"]["share"]))
        print(
            f"percentile {percentile}: OLD accepts {shares['old']:.2f}%, NEW {shares['new']:.2f}%, "
            f"{100 * own['flipped']['share']:.1f}% flip; above OLD's raw threshold "
            f"{100 * raw['old']['share']:.2f}% and {100 * raw['new']['share']:.2f}%; "
            f"Spearman {figures['correlation']['spearman']:.3f}; pairs: "
            f"{figures['pairs']['accuracy']['difference']:+.4f} accuracy, "
            f"{figures['pairs']['log_loss']['difference']:+.4f} log loss"
        )
        assert abs(shares["old"] - shares["new"]) < 2
        assert abs(shares["new"] - (100 - percentile)) < 2
    assert max(gaps) > 2  # the threshold on raw scores is another one for each
