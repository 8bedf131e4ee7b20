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

spec = importlib.util.spec_from_file_location(
    "exact_worker", Path(__file__).with_name("exact_worker.py")
)
assert spec is not None
assert spec.loader is not None
base = importlib.util.module_from_spec(spec)
spec.loader.exec_module(base)

from companion.training.kwise import KwiseRewardConfig, KwiseRewardTrainer  # noqa: E402

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


# ---------------------------------------------------------------------- K-wise


def ranking_rows(n: int) -> list[dict[str, Any]]:
    """Two to five completions; ties, and in some rows nothing but ties."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(n):
        size = 2 + i % 4
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
    return {name: p.grad for name, p in model.named_parameters()}


def kwise(loss_type: str) -> Kind:
    return Kind(
        base.make_model,
        ranking_rows,
        lambda rows: kwise_gradient(rows, loss_type),
        KwiseRewardTrainer,
        KwiseRewardConfig,
        {"loss_type": loss_type, "center_rewards_coefficient": base.CENTERING},
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
                errors.append(float((base.flat(found) - exact).norm() / exact.norm()))
            results.append(
                {
                    "kind": name,
                    "case": [n, batch, accumulation],
                    "errors": errors,
                    "expected_steps": -(-n // size),
                    "train_loss": trainer.state.log_history[-1]["train_loss"],
                }
            )
    if int(os.environ.get("RANK", 0)) == 0:
        Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
