"""Gradients of every optimiser step of every kind, against the mean over the whole step computed
directly, a text at a time, in float64, by stock code.

Run by itself, under ``torchrun``, or imported; writes a JSON file with one entry for each case.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
if __name__ == "__main__":
    gc.disable()  # a collection would walk what is imported again and again

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer

from companion import (
    KwiseRewardConfig,
    KwiseRewardTrainer,
    OutcomeRewardConfig,
    OutcomeRewardTrainer,
    PairwiseRewardConfig,
    PairwiseRewardTrainer,
    ProcessRewardConfig,
    ProcessRewardTrainer,
)
from companion.training.batches import ExactBatches

disable_progress_bars()
CENTERING = 0.05
#: rows, micro-batch, accumulation
CASES = [(9, 4, 1), (9, 2, 2), (13, 2, 4)]
PAIR_CASES = [
    (9, 4, 1),
    (9, 4, 2),
    (9, 4, 4),
    (13, 2, 1),
    (13, 2, 2),
    (13, 2, 4),
    (5, 4, 2),
    (1, 2, 1),
    (8, 2, 2),
]
#: with micro-batches cut into parts of so many tokens, on ranks that would have unlike numbers
CUT_CASES = [((9, 4, 2), 25)]
#: those that are also run without margins and label smoothing
PLAIN_CASES = [(9, 4, 1), (13, 2, 2)]
STOCK_CASES = [(5, 4, 2), (9, 4, 1), (5, 2, 1), (8, 2, 2)]
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


@dataclass
class Kind:
    model: Callable[[], Any]
    rows: Callable[[int], list[dict[str, Any]]]
    gradient: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    trainer: Any
    config: Any
    settings: dict[str, Any]
    cases: list[tuple[int, int, int]] = field(default_factory=lambda: CASES)


def make_tokenizer() -> Any:
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i + 3 for i in range(40)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, "<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def make_model(**overrides: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 43,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "num_labels": 1,
        "initializer_range": 0.2,
    }
    return Qwen3ForSequenceClassification(Qwen3Config(**{**settings, **overrides}))


def random_ids(generator: torch.Generator, low: int = 2, high: int = 12) -> list[int]:
    length = int(torch.randint(low, high, (1,), generator=generator))
    return [*torch.randint(3, 43, (length,), generator=generator).tolist(), 1]


def gradient_of(model: Any) -> dict[str, Tensor]:
    """Zeros where nothing had a label."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


# ---------------------------------------------------------------------- pairs


def pair_rows(n: int, *, margin: bool, seed: int = 1) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    sides = ("chosen_ids", "rejected_ids")
    rows = [{side: random_ids(generator) for side in sides} for _ in range(n)]
    return [{**row, "margin": 0.3 * i} for i, row in enumerate(rows)] if margin else rows


def pair_gradient(rows: list[dict[str, Any]], *, smoothing: float) -> Any:
    """Gradient of the mean over these pairs, a text at a time, in float64, by stock code."""
    model = make_model().double()
    for row in rows:
        chosen, rejected = (
            model(input_ids=torch.tensor([row[name]])).logits[0, 0]
            for name in ("chosen_ids", "rejected_ids")
        )
        z = chosen - rejected - row.get("margin", 0.0)
        loss = -(1 - smoothing) * torch.nn.functional.logsigmoid(z)
        loss = loss - smoothing * torch.nn.functional.logsigmoid(-z)
        loss = loss + CENTERING * (chosen + rejected) ** 2
        (loss / len(rows)).backward()
    return gradient_of(model)


def pairwise(smoothing: float, margin: bool) -> Kind:
    return Kind(
        make_model,
        lambda n: pair_rows(n, margin=margin),
        lambda rows: pair_gradient(rows, smoothing=smoothing),
        PairwiseRewardTrainer,
        PairwiseRewardConfig,
        {"label_smoothing_factor": smoothing, "center_rewards_coefficient": CENTERING},
        PAIR_CASES if margin else PLAIN_CASES,
    )


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
    model = make_model().double()
    loss = ranking_by_orders if loss_type == "plackett_luce" else ranking_by_pairs
    informed = [row for row in rows if len(set(row["ranks"])) > 1]
    for row in informed:
        texts = [model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in row["completion_ids"]]
        scores = torch.stack(texts)
        value = loss(scores, row["ranks"]) + CENTERING * (2 * scores.mean()) ** 2
        (value / len(informed)).backward()
    return gradient_of(model)


def kwise(loss_type: str) -> Kind:
    return Kind(
        make_model,
        ranking_rows,
        lambda rows: kwise_gradient(rows, loss_type),
        KwiseRewardTrainer,
        KwiseRewardConfig,
        {"loss_type": loss_type, "center_rewards_coefficient": CENTERING},
    )


# ---------------------------------------------------------------------- outcomes


def make_token_model(labels: int = 1) -> Any:
    torch.manual_seed(0)
    config = make_model().config
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


KINDS: dict[str, Callable[[], Kind]] = {
    "pairwise, margins": lambda: pairwise(0.1, margin=True),
    "pairwise": lambda: pairwise(0.0, margin=False),
    "kwise, Plackett–Luce": lambda: kwise("plackett_luce"),
    "kwise, pairs": lambda: kwise("pairs"),
    "outcome, token": lambda: outcome("token"),
    "outcome, sequence": lambda: outcome("sequence"),
    "process, three classes": lambda: process(soft=False),
    "process, soft": lambda: process(soft=True),
}


class Recorder(TrainerCallback):
    """Keeps the gradients that the optimiser is about to use."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        inner = getattr(model, "module", model)
        self.steps.append({n: p.grad.detach().clone() for n, p in inner.named_parameters()})


def run(
    trainer_class: Any,
    config_class: Any,
    model: Any,
    rows: list[dict[str, Any]],
    batch: int,
    accumulation: int,
    *,
    tokenizer: bool = True,
    **settings: Any,
) -> tuple[list[dict[str, Tensor]], Any]:
    """Train an epoch with a learning rate of 0; gradients of each step, and the trainer."""
    recorder = Recorder()
    own = {name: settings.pop(name) for name in ("data_collator",) if name in settings}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model,
            config_class(
                folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                **SETTINGS,
                **settings,
            ),
            train_dataset=Dataset.from_list(rows),
            callbacks=[recorder],
            **({"processing_class": make_tokenizer()} if tokenizer else {}),
            **own,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return recorder.steps, trainer


class ForgetsTheEpoch(PairwiseRewardTrainer):
    """A wrong one: a resumed run sees the first epoch's order in its second epoch."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        return super(ExactBatches, self)._run_epoch(*args, **kwargs)


def resume_gap(trainer_class: Any, folder: str) -> float:
    """Largest difference of the weights of a run and of one resumed in its second epoch."""
    weights = []
    for resume in (None, f"{folder}/checkpoint-5"):
        trainer = trainer_class(
            model=make_model(),
            args=PairwiseRewardConfig(
                folder,
                per_device_train_batch_size=2,
                num_train_epochs=2,
                learning_rate=1e-3,
                use_cpu=True,
                save_strategy="steps",
                save_steps=5,
                save_total_limit=None,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(pair_rows(13, margin=False)),
            processing_class=make_tokenizer(),
        )
        trainer.train(resume_from_checkpoint=resume)
        weights.append(flat(dict(trainer.model.state_dict())))
    return float((weights[0] - weights[1]).abs().max())


def flat(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient[name].double().flatten() for name in sorted(gradient)])


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
    steps, _ = run(
        Trainer,
        TrainingArguments,
        make_token_model(2),
        rows,
        batch,
        accumulation,
        tokenizer=False,
        data_collator=StockCollator(),
        remove_unused_columns=False,
    )
    model = make_token_model(2).double()
    inputs = StockCollator()(rows)
    logits = model(input_ids=inputs["input_ids"]).logits
    F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten()).backward()
    exact = flat({name: p.grad for name, p in model.named_parameters()})
    return float(flat(steps[0]).norm() / exact.norm())


def main(output: str) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    first = int(os.environ.get("RANK", 0)) == 0  # the ranks hold the same gradients
    results: list[dict[str, Any]] = []
    for name, make in KINDS.items():
        kind = make()
        for (n, batch, accumulation), cut in [*((c, None) for c in kind.cases), *CUT_CASES]:
            rows, model, forwards = kind.rows(n), kind.model(), []
            model.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
            steps, trainer = run(
                kind.trainer,
                kind.config,
                model,
                rows,
                batch,
                accumulation,
                micro_batch_tokens=cut,
                **kind.settings,
            )
            size = batch * accumulation * ranks
            errors = []
            for i, found in enumerate(steps if first else []):
                exact = flat(kind.gradient(rows[i * size : (i + 1) * size]))
                size_of = exact.norm() if bool(exact.any()) else 1.0
                errors.append(float((flat(found) - exact).norm() / size_of))
            last = trainer.state.log_history[-1]
            results.append(
                {
                    "kind": name,
                    "case": [n, batch, accumulation],
                    "cut": cut,
                    "forwards": len(forwards),
                    "errors": errors,
                    "expected_steps": -(-n // size),
                    "train_loss": last["train_loss"],
                    "pairs": last.get("train_pairs"),
                }
            )
    for n, batch, accumulation in STOCK_CASES:
        rows = pair_rows(n, margin=False)
        steps, _ = run(
            RewardTrainer,
            RewardConfig,
            make_model(),
            rows,
            batch,
            accumulation,
            center_rewards_coefficient=CENTERING,
            gradient_checkpointing=False,
        )
        size = batch * accumulation * ranks
        exact = flat(pair_gradient(rows[(len(steps) - 1) * size :], smoothing=0.0))
        found = flat(steps[-1])
        cosine = float(found @ exact / found.norm() / exact.norm())
        results.append({"stock": [n, batch, accumulation], "cosine": cosine})
    for accumulation in (1, 4):
        results.append({"stock scale": accumulation, "scale": stock_scale(2, accumulation)})
    for trainer_class in (PairwiseRewardTrainer, ForgetsTheEpoch):
        folder = f"{output}.{trainer_class.__name__}"
        gap = resume_gap(trainer_class, folder)
        results.append({"resumed": trainer_class.__name__, "gap": gap})
    if first:
        Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    gc.freeze()  # accelerate collects before each training
    gc.enable()
    main(sys.argv[1])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    # The results are written. A rank that tears gloo down while its threads still run was seen to
    # abort ("terminate called without an active exception"); what is tested lies before that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
