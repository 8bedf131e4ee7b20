"""Settings that follow what is trained, and what is too little to be stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from example_kinds import KINDS, PAIRWISE, QUIET, pairs

from companion import RewardManifest
from companion.evaluation import StepEvaluation
from companion.evaluation.pairs import scored_pairs
from companion.models import TokenReadout
from companion.scoring import PairScores
from companion.training import default_learning_rate, load_kind


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_the_rate_follows_what_is_trained(kind: Any, tiny_base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    assert kind.trainer(tiny_base, tmp_path).args.learning_rate == default_learning_rate(False)
    assert kind.trainer(tiny_base, tmp_path, learning_rate=0.5).args.learning_rate == 0.5
    if kind.name == "pairwise":
        config = load_kind(kind.name).trainer.config_class(str(tmp_path), **QUIET)
        trainer = load_kind(kind.name).trainer(
            kind.base(tiny_base, config),
            config,
            train_dataset=Dataset.from_list(kind.ids(7)),
            peft_config=LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]),
        )
        assert trainer.args.learning_rate == default_learning_rate(True)


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_says_and_records_its_rate(lora: bool, tiny_base: Path, tmp_path: Path) -> None:
    from companion import DataArguments, ModelArguments, PairwiseRewardConfig, train_pairwise

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, pairs(90))))
    said: list[str] = []
    result = train_pairwise(
        PairwiseRewardConfig(str(tmp_path / "model"), max_steps=2, **QUIET),
        ModelArguments(model_name_or_path=str(tiny_base), use_peft=lora, lora_r=2),
        DataArguments(dataset_name=str(tmp_path / "rows.jsonl"), eval_fraction=0.3),
        say=said.append,
    )
    rate = 1e-4 if lora else 1e-5
    assert f"learning rate {rate:g}: the default of what is trained" in said
    assert RewardManifest.load(result.output_dir).training["learning_rate"] == rate
    # and these are too few pairs for a temperature
    assert result.temperature is None
    assert sum("no temperature: " in line for line in said) == 1
    assert any("no temperature: " in note for note in result.manifest.notes)
    assert "temperature" not in result.summary()
    assert result.metrics["at_temperature"] is None
    assert result.manifest.reference is not None


@pytest.mark.parametrize(("number", "fitted"), [(49, False), (50, True)])
def test_fifty_pairs_are_enough_for_a_temperature(number: int, fitted: bool) -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0.7, 1.0, number)
    rows = PAIRWISE.texts(number)
    lengths = np.ones(number, dtype=np.int64)
    scores = PairScores(margins, np.zeros(number), lengths, lengths, [None] * number)
    evaluation = scored_pairs(rows, scores)
    manifest = RewardManifest()
    notes = evaluation.calibrate(manifest, "rows")
    assert (manifest.temperature is not None) is fitted
    assert bool(notes) is not fitted
    assert manifest.reference is not None


@pytest.mark.parametrize(("number", "fitted"), [(49, False), (50, True)])
def test_fifty_solutions_are_enough_for_a_threshold(number: int, fitted: bool) -> None:
    """Wrong steps have P(wrong) = 0.3 and right ones 0.1: the best threshold lies between."""
    last_is_right = [float(i % 2) for i in range(number)]
    evaluation = StepEvaluation(
        rows=[{"prompt": str(i)} for i in range(number)],
        reasons=[None] * number,
        readout=TokenReadout("process", 1, "min", separator=" "),
        logits=[np.array([[2.2], [2.2 if right else 0.85]]) for right in last_is_right],
        targets=[[1.0, right] for right in last_is_right],
    )
    manifest = RewardManifest(readout=evaluation.readout.to_dict())
    notes = evaluation.calibrate(manifest, "rows")
    threshold = manifest.readout["threshold"]
    assert 0.09 < threshold < 0.31 if fitted else threshold == 0.5
    assert len(notes) == (0 if fitted else 1)
    assert fitted or "49 solutions to fit it on are fewer than 50" in notes[0]
