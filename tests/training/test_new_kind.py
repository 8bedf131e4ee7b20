"""A new kind is one file, this one, and one line, in the test: a score that is a rating's mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from datasets import Dataset, Value
from example_kinds import outcomes
from torch import Tensor
from transformers import Trainer

from companion import (
    PairwiseRewardConfig,
    RewardFormatter,
    RewardManifest,
    RewardScorer,
    RowArguments,
)
from companion.cli.main import main
from companion.evaluation import Evaluation, format_table
from companion.evaluation.tables import number
from companion.functional import SumCount
from companion.training import (
    KINDS,
    Collator,
    ExactTrainer,
    FormatReport,
    Kind,
)
from companion.training.batches import forward_inputs, text_lengths
from companion.training.config import not_offered
from companion.training.rows import format_all, ids_feature
from companion.training.trainer import OWN


@dataclass
class RegressionConfig(PairwiseRewardConfig):
    """Settings: those of pairs, without centring, and a scale of the ratings."""

    center_rewards_coefficient: float | None = not_offered("the ratings hold the scores in place")
    scale: float = field(default=1.0, metadata={"help": "What a label of 1 is worth."})


def to_ids(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], formatter: RewardFormatter
) -> list[dict[str, Any]]:
    encoded = formatter.encode_many(rows, names=names)
    return [
        {"input_ids": item.input_ids, "label": float(row["label"]), "length": len(item), "cut": 0}
        for row, item in zip(rows, encoded, strict=True)
        if item is not None
    ]


class RegressionCollator(Collator):
    def texts(self, examples: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        return [list(e["input_ids"]) for e in examples]

    def labels(
        self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        label = torch.tensor([float(e.get("label", 0)) for e in examples])
        return {"label": label, "weight": batch["real"]}


class RegressionTrainer(ExactTrainer, Trainer):
    config_class = RegressionConfig
    collator_class = RegressionCollator
    ids = ("input_ids", "label")
    items = "texts"
    predicted = slice(OWN, OWN + 1)

    @classmethod
    def format_rows(
        cls, dataset: Dataset, formatter: RewardFormatter, args: Any, source: str
    ) -> tuple[Dataset, FormatReport]:
        columns = {"input_ids": ids_feature(), "label": Value("float32")}
        return format_all(
            dataset, formatter, to_ids, columns, source=source, noun="texts", num_proc=None
        )

    def padding_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"input_ids": [int(row["input_ids"][-1])], "label": 0.0}

    def row_lengths(self, dataset: Any) -> list[int]:
        return [len(ids) for ids in dataset["input_ids"]]

    def item_table(self, model: Any, inputs: Any) -> Tensor:
        score = model(**forward_inputs(inputs)).logits.squeeze(-1)
        loss = (score - self.args.scale * inputs["label"]).square()
        self.refuse_not_finite(~torch.isfinite(loss.detach()), inputs["row"])
        columns = [inputs["real"], inputs["weight"], loss, text_lengths(inputs), score]
        return torch.stack([column.to(loss.dtype) for column in columns], dim=1)

    def sums(self, table: Tensor) -> dict[str, SumCount]:
        return {"score": SumCount().add(table[:, OWN])}


@dataclass
class RegressionEvaluation(Evaluation):
    rows: list[Mapping[str, Any]]
    scores: np.ndarray
    info: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def measure(self) -> Self:
        labels = [float(row["label"]) for row in self.rows]
        self.metrics = {"correlation": float(np.corrcoef(labels, self.scores)[0, 1])}
        return self

    def table(self) -> str:
        return format_table(("figure", "ours"), [("r", number(self.metrics["correlation"]))])


def scored(
    given: Sequence[Mapping[str, Any]], rows: Dataset, predictions: Any, about: RewardManifest
) -> RegressionEvaluation:
    return RegressionEvaluation(list(given), predictions[:, 0])


KIND = Kind(RegressionTrainer, "outcomes", scored, RowArguments)


def test_a_new_kind_is_one_file_and_one_line(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(KINDS, "regression", (__name__, "a score that is a rating"))
    assert main(["train", "--help"]) == 0
    assert "regression" in capsys.readouterr().out
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in outcomes(90)))
    settings = {
        "model_name_or_path": tiny_base,
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "model",
        "eval_fraction": 0.3,
        "scale": 2.0,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "save_strategy": "no",
        "disable_tqdm": "true",
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main(["train", "regression", *flags]) == 0
    capsys.readouterr()
    manifest = RewardManifest.load(tmp_path / "model")
    assert manifest.metrics["correlation"] > 0.9
    assert manifest.training["scale"] == 2.0
    scores = RewardScorer.from_pretrained(tmp_path / "model", device="cpu").score(outcomes(6)).raw
    assert scores[1] > scores[0] + 1.0
    assert main(["train", "regression", *flags, "--center_rewards_coefficient", "0.1"]) == 2
    assert "the ratings hold the scores in place" in capsys.readouterr().err
