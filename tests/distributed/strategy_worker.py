"""Train each kind for an epoch under a strategy; write the weights and figures that come out.

Usage: ``strategy_worker.py STRATEGY OUTPUT`` on any number of ranks; a strategy is a file of
``recipes/accelerate``. Imported, ``train_all("plain")`` is the same in this process.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import gradient_worker as worker
import torch
from datasets import Dataset
from transformers import PrinterCallback

RECIPES = Path(__file__).parents[2] / "recipes"
STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": str(RECIPES / "fsdp/fsdp2.json")},
    "zero2": {"deepspeed": str(RECIPES / "deepspeed/zero2.json")},
    "zero3": {"deepspeed": str(RECIPES / "deepspeed/zero3.json")},
}
#: rows, rows that go through the model at once on all ranks together, accumulation: the last step
#: has one row (on one of the ranks), or less than its last micro-batch holds
CASES = [(13, 6, 1), (13, 6, 2), (17, 6, 4), (9, 6, 2)]


def train(
    strategy: str, kind: worker.Kind, model: Any, case: tuple[int, int, int]
) -> dict[str, Any]:
    """Weights before and after an epoch, and what was logged and predicted."""
    n, micro, accumulation = case
    start = {name: value.clone() for name, value in model.state_dict().items()}
    rows = Dataset.from_list(kind.rows(n))
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind.trainer(
            model,
            kind.config(
                folder,
                per_device_train_batch_size=micro // int(os.environ.get("WORLD_SIZE", 1)),
                per_device_eval_batch_size=2,
                gradient_accumulation_steps=accumulation,
                # each part is an exchange of weights: ranks must run as many as the others
                micro_batch_tokens=None if strategy == "plain" else 25,
                learning_rate=0.05,
                lr_scheduler_type="constant",
                optim="sgd",
                max_grad_norm=0.0,
                save_strategy="no",
                eval_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                **STRATEGIES[strategy],
                **kind.settings,
            ),
            train_dataset=rows,
            processing_class=worker.make_tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        held_out = trainer.evaluate(rows.select(range(5)))
        predictions = trainer.predict(rows.select(range(5))).predictions
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    return {
        "start": start,
        "weights": {name: value.detach().cpu().clone() for name, value in state.items()},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "eval_loss": held_out["eval_loss"],
        "predictions": torch.tensor(predictions),
    }


def train_all(strategy: str) -> dict[str, dict[tuple[int, int, int], dict[str, Any]]]:
    """All kinds and cases."""
    kinds = {name: make() for name, make in worker.KINDS.items()}
    # all now: once it has begun, DeepSpeed cuts each module that is made
    models = {name: {case: kind.model() for case in CASES} for name, kind in kinds.items()}
    return {
        name: {case: train(strategy, kinds[name], model, case) for case, model in own.items()}
        for name, own in models.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = train_all(sys.argv[1])
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(found, sys.argv[2])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
