"""``torchrun -m companion retrain`` on two processes: one compares, and publishes once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import launch

from companion.cli.main import main
from companion.models import RewardManifest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def pairs(n: int, words: str) -> list[dict[str, Any]]:
    better, worse = words.split()
    return [
        {
            "prompt": f"Ana has {i % 20} pens and {i // 20} {better}",
            "chosen": f"the answer is {i % 7} {better}",
            "rejected": f"the answer is {i % 5} {worse}",
        }
        for i in range(n)
    ]


def test_two_processes_publish_one_model(tmp_path: Path, tiny_base: Path) -> None:
    for name, rows in (("old", pairs(200, "good bad")), ("new", pairs(200, "yes no"))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    quiet = ["--disable_tqdm", "true", "--save_strategy", "no", "--eval_strategy", "no"]
    start = ["--model_name_or_path", str(tiny_base), "--dataset_name", str(tmp_path / "old.jsonl")]
    start += ["--output_dir", str(tmp_path / "model"), "--per_device_train_batch_size", "8"]
    start += ["--learning_rate", "0.01", "--eval_fraction", "0.3"]
    assert main(["train", "pairwise", *start, *quiet]) == 0
    words = ["retrain", str(tmp_path / "model"), "--data", str(tmp_path / "old.jsonl")]
    words += ["--new", str(tmp_path / "new.jsonl"), "--output", str(tmp_path / "next")]
    words += ["--tolerance", "0.1", "--per_device_train_batch_size", "4", *quiet]
    text = launch(["-m", "companion", *words], torchrun=True)  # both end with 0
    assert text.count("published as") == 1
    manifest = RewardManifest.load(tmp_path / "next")
    assert manifest.training["world_size"] == 2
    assert manifest.reference is not None
    assert not any("a step has" in note for note in manifest.notes)  # 4 x 2 pairs, as before
    assert {path.name for path in tmp_path.glob("next*")} == {"next", "next.rows"}
