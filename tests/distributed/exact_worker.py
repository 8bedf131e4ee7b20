"""Gradients of every optimiser step, against the mean over the step's pairs computed directly.

Run by itself, under ``torchrun``, or imported; writes a JSON file with one entry for each case.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer

from companion.training.batches import ExactBatches
from companion.training.config import PairwiseRewardConfig
from companion.training.pairwise import PairwiseRewardTrainer

disable_progress_bars()
CENTERING = 0.05
#: pairs, micro-batch, accumulation
CASES = [
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
#: those that are also run without margins and label smoothing
PLAIN_CASES = [(9, 4, 1), (13, 2, 2)]
STOCK_CASES = [(5, 4, 2), (9, 4, 1), (5, 2, 1), (8, 2, 2)]


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


def make_rows(n: int, *, margin: bool, seed: int = 1) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(2, 12, (1,), generator=generator))
        return [*torch.randint(3, 43, (length,), generator=generator).tolist(), 1]

    rows = [{"chosen_ids": ids(), "rejected_ids": ids()} for _ in range(n)]
    return [{**row, "margin": 0.3 * i} for i, row in enumerate(rows)] if margin else rows


def direct_gradient(rows: list[dict[str, Any]], *, smoothing: float, centering: float) -> Any:
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
        loss = loss + centering * (chosen + rejected) ** 2
        (loss / len(rows)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


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
    rows: list[dict[str, Any]],
    batch: int,
    accumulation: int,
    **settings: Any,
) -> tuple[list[dict[str, torch.Tensor]], Any]:
    """Train an epoch with a learning rate of 0; gradients of each step, and the trainer."""
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=make_model(),
            args=config_class(
                folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                num_train_epochs=1,
                learning_rate=0.0,
                max_grad_norm=0.0,
                train_sampling_strategy="sequential",
                center_rewards_coefficient=CENTERING,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                eval_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
            callbacks=[recorder],
        )
        trainer.pop_callback(
            next(type(c) for c in trainer.callback_handler.callbacks if "Printer" in str(type(c)))
        )
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
            train_dataset=Dataset.from_list(make_rows(13, margin=False)),
            processing_class=make_tokenizer(),
        )
        trainer.train(resume_from_checkpoint=resume)
        weights.append(flat(dict(trainer.model.state_dict())))
    return float((weights[0] - weights[1]).abs().max())


def flat(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient[name].double().flatten() for name in sorted(gradient)])


def main(output: str) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    results = []
    for n, batch, accumulation in CASES:
        plain = (n, batch, accumulation) in PLAIN_CASES
        for smoothing, margin in [(0.1, True), (0.0, False)][: 1 + plain]:
            rows = make_rows(n, margin=margin)
            steps, trainer = run(
                PairwiseRewardTrainer,
                PairwiseRewardConfig,
                rows,
                batch,
                accumulation,
                label_smoothing_factor=smoothing,
            )
            size = batch * accumulation * ranks
            errors, losses = [], []
            for i, found in enumerate(steps):
                part = rows[i * size : (i + 1) * size]
                exact = flat(direct_gradient(part, smoothing=smoothing, centering=CENTERING))
                errors.append(float((flat(found) - exact).norm() / exact.norm()))
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            results.append(
                {
                    "case": [n, batch, accumulation],
                    "margin": margin,
                    "errors": errors,
                    "losses": losses,
                    "train_loss": trainer.state.log_history[-1]["train_loss"],
                    "pairs": trainer.state.log_history[-1]["train_pairs"],
                    "expected_steps": -(-n // size),
                }
            )
    for n, batch, accumulation in STOCK_CASES:
        rows = make_rows(n, margin=False)
        steps, _ = run(RewardTrainer, RewardConfig, rows, batch, accumulation)
        size = batch * accumulation * ranks
        part = rows[(len(steps) - 1) * size :]
        exact = flat(direct_gradient(part, smoothing=0.0, centering=CENTERING))
        found = flat(steps[-1])
        cosine = float(found @ exact / found.norm() / exact.norm())
        results.append({"stock": [n, batch, accumulation], "cosine": cosine})
    for trainer_class in (PairwiseRewardTrainer, ForgetsTheEpoch):
        folder = f"{output}.{trainer_class.__name__}"
        gap = resume_gap(trainer_class, folder)
        results.append({"resumed": trainer_class.__name__, "gap": gap})
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
