"""Gradients of every optimiser step of the K-wise, outcome and process trainers, against the mean
over the whole step computed directly, a text at a time, in float64, by stock code.

Run by itself or under ``torchrun``; writes a JSON file with one entry for each case.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3ForTokenClassification, Trainer, TrainingArguments

spec = importlib.util.spec_from_file_location(
    "exact_worker", Path(__file__).with_name("exact_worker.py")
)
assert spec is not None
assert spec.loader is not None
base = importlib.util.module_from_spec(spec)
spec.loader.exec_module(base)

from companion.training.kwise import KwiseRewardConfig, KwiseRewardTrainer  # noqa: E402
from companion.training.outcome import OutcomeRewardConfig, OutcomeRewardTrainer  # noqa: E402
from companion.training.process import ProcessRewardConfig, ProcessRewardTrainer  # noqa: E402

#: rows, micro-batch, accumulation
CASES = [(9, 4, 1), (9, 2, 2), (13, 2, 4)]
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}


def random_ids(generator: torch.Generator, low: int = 2, high: int = 12) -> list[int]:
    length = int(torch.randint(low, high, (1,), generator=generator))
    return [*torch.randint(3, 43, (length,), generator=generator).tolist(), 1]


def gradient_of(model: Any) -> dict[str, Tensor]:
    """Zeros where nothing had a label."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


# ---------------------------------------------------------------------- K-wise


def ranking_rows(n: int) -> list[dict[str, Any]]:
    """Two to four completions; ties, and in some rows nothing but ties."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(n):
        size = 2 + i % 3
        ranks = torch.randint(1, 4, (size,), generator=generator).tolist()
        ids = [random_ids(generator) for _ in range(size)]
        rows.append({"completion_ids": ids, "ranks": [float(r) for r in ranks], "row": i})
    return rows


def ranking_by_orders(scores: Tensor, ranks: list[float]) -> Tensor:
    """Plackett–Luce summed over all total orders that agree with the ranks."""
    logs = []
    for order in itertools.permutations(range(len(ranks))):
        if all(ranks[a] <= ranks[b] for a, b in itertools.pairwise(order)):
            chosen = scores[list(order)]
            left = torch.stack([torch.logsumexp(chosen[i:], 0) for i in range(len(order))])
            logs.append((chosen - left).sum())
    return -torch.logsumexp(torch.stack(logs), 0)


def ranking_by_pairs(scores: Tensor, ranks: list[float]) -> Tensor:
    pairs = [
        -F.logsigmoid(scores[i] - scores[j])
        for i, j in itertools.permutations(range(len(ranks)), 2)
        if ranks[i] < ranks[j]
    ]
    return torch.stack(pairs).mean()


def kwise_gradient(rows: list[dict[str, Any]], loss_type: str) -> dict[str, Tensor]:
    model = base.make_model().double()
    loss = ranking_by_orders if loss_type == "plackett_luce" else ranking_by_pairs
    informed = [row for row in rows if len(set(row["ranks"])) > 1]
    for row in informed:
        texts = [model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in row["completion_ids"]]
        scores = torch.stack(texts)
        value = loss(scores, row["ranks"]) + base.CENTERING * (2 * scores.mean()) ** 2
        (value / len(informed)).backward()
    return gradient_of(model)


def kwise(loss_type: str) -> Kind:
    return Kind(
        base.make_model,
        ranking_rows,
        lambda rows: kwise_gradient(rows, loss_type),
        KwiseRewardTrainer,
        KwiseRewardConfig,
        {"loss_type": loss_type, "center_rewards_coefficient": base.CENTERING},
    )


# ---------------------------------------------------------------------- outcomes


def make_token_model(labels: int = 1) -> Any:
    torch.manual_seed(0)
    config = base.make_model().config
    config.num_labels, config.classifier_dropout = labels, 0.0
    model = Qwen3ForTokenClassification(config)
    torch.nn.init.normal_(model.score.bias)
    return model


def outcome_rows(n: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    rows = []
    for i in range(n):
        ids = random_ids(generator, 3, 14)
        rows.append({"input_ids": ids, "prompt_length": 1 + i % 2, "label": i % 3 % 2, "row": i})
    return rows


def outcome_gradient(rows: list[dict[str, Any]], reduction: str) -> dict[str, Tensor]:
    model = make_token_model().double()
    tokens = sum(len(row["input_ids"]) - row["prompt_length"] for row in rows)
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :, 0]
        own = logits[row["prompt_length"] :]
        target = torch.full_like(own, float(row["label"]))
        losses = F.binary_cross_entropy_with_logits(own, target, reduction="none")
        value = losses.sum() / tokens if reduction == "token" else losses.mean() / len(rows)
        value.backward()
    return gradient_of(model)


def outcome(reduction: str) -> Kind:
    return Kind(
        make_token_model,
        outcome_rows,
        lambda rows: outcome_gradient(rows, reduction),
        OutcomeRewardTrainer,
        OutcomeRewardConfig,
        {"reduction": reduction},
    )


# ---------------------------------------------------------------------- steps


def step_rows(n: int, soft: bool) -> list[dict[str, Any]]:
    """One to four steps, some without a label; every fourth row has none at all."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(n):
        ids = random_ids(generator, 6, 14)
        ends = sorted(torch.randperm(len(ids), generator=generator)[: 1 + i % 4].tolist())
        values = torch.rand(len(ends), generator=generator)
        targets = (values if soft else (values * 3).long()).float()
        targets[1 if i % 4 else 0 :: 2] = -100
        rows.append({"input_ids": ids, "ends": ends, "targets": targets.tolist(), "row": i})
    return rows


def step_gradient(rows: list[dict[str, Any]], soft: bool) -> dict[str, Tensor]:
    model = make_token_model(1 if soft else 3).double()
    labelled = [(r, e, t) for r in rows for e, t in zip(r["ends"], r["targets"]) if t != -100]  # noqa: B905
    for row, end, target in labelled:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, end]
        if soft:
            value = -target * F.logsigmoid(logits[0]) - (1 - target) * F.logsigmoid(-logits[0])
        else:
            value = -torch.log_softmax(logits, 0)[int(target)]
        (value / len(labelled)).backward()
    return gradient_of(model)


def process(soft: bool) -> Kind:
    return Kind(
        lambda: make_token_model(1 if soft else 3),
        lambda n: step_rows(n, soft),
        lambda rows: step_gradient(rows, soft),
        ProcessRewardTrainer,
        ProcessRewardConfig,
        {"label_type": "soft" if soft else "three"},
    )


# ---------------------------------------------------------------------- all


class Kind:
    def __init__(
        self,
        model: Callable[[], Any],
        rows: Callable[[int], list[dict[str, Any]]],
        gradient: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
        trainer: Any,
        config: Any,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.rows, self.gradient = model, rows, gradient
        self.trainer, self.config, self.settings = trainer, config, settings


KINDS: dict[str, Callable[[], Kind]] = {
    "kwise, Plackett–Luce": lambda: kwise("plackett_luce"),
    "kwise, pairs": lambda: kwise("pairs"),
    "outcome, token": lambda: outcome("token"),
    "outcome, sequence": lambda: outcome("sequence"),
    "process, three classes": lambda: process(soft=False),
    "process, soft": lambda: process(soft=True),
}


def run(kind: Kind, rows: list[dict[str, Any]], batch: int, accumulation: int) -> Any:
    recorder = base.Recorder()
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind.trainer(
            kind.model(),
            kind.config(
                folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                **SETTINGS,
                **kind.settings,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=base.make_tokenizer(),
            callbacks=[recorder],
        )
        trainer.pop_callback(
            next(type(c) for c in trainer.callback_handler.callbacks if "Printer" in str(type(c)))
        )
        trainer.train()
    return recorder.steps, trainer


class StockCollator:
    """What a stock trainer gets: padded ids and per-token labels."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        batch = {name: [] for name in ("input_ids", "attention_mask", "labels")}
        for row in rows:
            ids, prompt = list(row["input_ids"]), row["prompt_length"]
            gap = width - len(ids)
            batch["input_ids"].append(ids + [0] * gap)
            batch["attention_mask"].append([1] * len(ids) + [0] * gap)
            label = [row["label"]] * (len(ids) - prompt)
            batch["labels"].append([-100] * prompt + label + [-100] * gap)
        return {name: torch.tensor(values) for name, values in batch.items()}


def stock_scale(batch: int, accumulation: int) -> float:
    """Length of a stock ``Trainer``'s gradient on a token classifier, over that of the mean.

    Two classes, and texts of equal length, so that nothing but the divisor differs.
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    generator = torch.Generator().manual_seed(4)
    rows = []
    for i in range(batch * accumulation * ranks):
        ids = torch.randint(3, 43, (6,), generator=generator).tolist()
        rows.append({"input_ids": ids, "prompt_length": 2, "label": i % 2})
    recorder = base.Recorder()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            make_token_model(2),
            TrainingArguments(
                folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                remove_unused_columns=False,
                **SETTINGS,
            ),
            data_collator=StockCollator(),
            train_dataset=Dataset.from_list(rows),
            callbacks=[recorder],
        )
        trainer.train()
    model = make_token_model(2).double()
    inputs = StockCollator()(rows)
    logits = model(input_ids=inputs["input_ids"]).logits
    F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten()).backward()
    exact = base.flat({name: p.grad for name, p in model.named_parameters()})
    return float(base.flat(recorder.steps[0]).norm() / exact.norm())


def main(output: str) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    results = []
    for name, make in KINDS.items():
        kind = make()
        for n, batch, accumulation in CASES:
            rows = kind.rows(n)
            steps, trainer = run(kind, rows, batch, accumulation)
            size = batch * accumulation * ranks
            errors = []
            for i, found in enumerate(steps):
                exact = base.flat(kind.gradient(rows[i * size : (i + 1) * size]))
                size_of = exact.norm() if bool(exact.any()) else 1.0
                errors.append(float((base.flat(found) - exact).norm() / size_of))
            results.append(
                {
                    "kind": name,
                    "case": [n, batch, accumulation],
                    "errors": errors,
                    "expected_steps": -(-n // size),
                    "train_loss": trainer.state.log_history[-1]["train_loss"],
                }
            )
    for accumulation in (1, 4):
        results.append({"stock": accumulation, "scale": stock_scale(2, accumulation)})
    if int(os.environ.get("RANK", 0)) == 0:
        Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    # The results are written. A rank that tears gloo down while its threads still run was seen to
    # abort ("terminate called without an active exception"); what is tested lies before that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
