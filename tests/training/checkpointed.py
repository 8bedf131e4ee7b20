"""Small runs with checkpoints, for the tests that break them off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from example_kinds import pairs
from transformers import TrainerCallback

from companion import DataArguments, ModelArguments, PairwiseRewardConfig, train_pairwise
from companion.training import TrainingResult

Start = Callable[..., TrainingResult[Any]]


def starter(folder: Path, base: Path) -> Start:
    """Runs of 8 steps in one folder, saved at 3, 6 and 8; only the newest checkpoint is kept."""

    def start(
        rows: list[dict[str, Any]] | None = None,
        *,
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        output: str = "model",
        lines: list[str] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **settings: Any,
    ) -> TrainingResult[Any]:
        source = folder / "pairs.jsonl"
        source.write_text("\n".join(map(json.dumps, rows or pairs(90))))
        defaults: dict[str, Any] = {
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "max_length": 60,
            "eval_strategy": "no",
            "save_strategy": "steps",
            "save_steps": 3,
            "save_total_limit": 1,
            "disable_tqdm": True,
            "report_to": "none",
        }
        return train_pairwise(
            PairwiseRewardConfig(str(folder / output), **{**defaults, **settings}),
            ModelArguments(**{"model_name_or_path": str(base), **(model or {})}),
            DataArguments(dataset_name=str(source), **{"eval_fraction": 0.3, **(data or {})}),
            say=(lines if lines is not None else []).append,
            callbacks=callbacks,
        )

    return start


def weights(result: TrainingResult[Any]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in result.reward_model.model.state_dict().items()}


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
