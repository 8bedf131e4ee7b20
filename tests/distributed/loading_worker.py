"""How much memory each rank takes to load a base and make a trainer of it, sharded.

Usage: ``torchrun … loading_worker.py zero3|fsdp2 BASE OUTPUT [whole]``, on two ranks; with `whole`
as it would be if each read the base for itself.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback

from companion import ModelArguments, PairwiseRewardConfig, PairwiseRewardTrainer
from companion.training import trainer as training

RECIPES = Path(__file__).parents[2] / "recipes"
SHARDED: dict[str, dict[str, Any]] = {
    "zero3": {"deepspeed": str(RECIPES / "deepspeed/zero3.json")},
    "fsdp2": {"fsdp": True, "fsdp_config": str(RECIPES / "fsdp/fsdp2.json")},
}


def resident(which: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since :func:`begin`."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def begin() -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    return resident("VmRSS")


class Sharded(TrainerCallback):
    """The peak when all is ready for the first step."""

    peak = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        Sharded.peak = resident("VmHWM")


def main(strategy: str, base: str, output: str, whole: str = "") -> None:
    if whole:
        training.one_reader = lambda _: contextlib.nullcontext()
        training.partition = lambda *_: None
    with tempfile.TemporaryDirectory() as folder:
        config = PairwiseRewardConfig(
            folder,
            per_device_train_batch_size=2,
            optim="sgd",
            learning_rate=0.0,
            max_steps=1,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **SHARDED[strategy],
        )
        dist.barrier()
        before = begin()
        start = training.load_start(None, config, ModelArguments(model_name_or_path=base))
        loaded = resident("VmHWM") - before
        trainer = PairwiseRewardTrainer(
            start,
            config,
            train_dataset=Dataset.from_list(
                [{"chosen_ids": [5, 6, i, 1], "rejected_ids": [5, 7, i, 1]} for i in range(4)]
            ),
            callbacks=[Sharded()],
        )
        trainer.train()
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        sums = {name: float(value.double().sum()) for name, value in (state or {}).items()}
    record = {"loaded": loaded, "sharded": Sharded.peak - before, "sums": sums}
    Path(f"{output}.{dist.get_rank()}").write_text(json.dumps(record), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
