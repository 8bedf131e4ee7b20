"""A plan's bytes against the profiler's: ``python -m benchmarks.memory``.

Two steps of the companion's trainer on a CPU, at widths of 512 and more, under PyTorch's profiler,
which logs each allocation: the most that is alive in the second step, weights included, is compared
with :func:`companion.plan_training` of the same case. Sharded cases run on two processes over gloo,
each under a profiler of its own. It is no clock: other work on the machine does not matter.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

import companion
from benchmarks.measuring import table
from benchmarks.results import add_arguments, save
from companion import PairwiseRewardConfig, RewardFormatter, RewardModel, apply_lora, plan_training
from companion.models import install_head
from companion.training import PairwiseRewardTrainer

ROOT = Path(__file__).parents[1]
BASE = Path(companion.__file__).parent / "assets" / "tutor-base"
#: what starts the sharding of a strategy, as `companion train` takes it
SHARDED = {
    "zero2": {"deepspeed": "recipes/deepspeed/zero2.json"},
    "zero3": {"deepspeed": "recipes/deepspeed/zero3.json"},
    "fsdp2": {"fsdp": "full_shard", "fsdp_config": "recipes/fsdp/fsdp2.json"},
}


@dataclass(frozen=True)
class Case:
    """A model's shape, a batch of pairs, and how they are trained."""

    model_type: str = "qwen3"
    hidden: int = 512
    layers: int = 6
    heads: int = 8
    key_heads: int = 8
    pairs: int = 4
    length: int = 128
    packing: bool = True
    checkpointing: bool = False
    bf16: bool = False
    dtype: str = "float32"
    lora: int = 0
    accumulation: int = 2
    part_tokens: int | None = None
    strategy: str = "ddp"
    ranks: int = 1

    @property
    def config(self) -> Any:
        """The model's."""
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        own = {"head_dim": 64} if self.model_type in ("qwen3", "gemma") else {}
        return AutoConfig.for_model(
            self.model_type,
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=4096,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            num_labels=1,
            **own,
        )

    @property
    def adapter(self) -> dict[str, Any] | None:
        """The arguments of LoRA."""
        return {"r": self.lora, "alpha": 2 * self.lora} if self.lora else None

    def plan(self) -> Any:
        """What is planned for it."""
        return plan_training(
            self.config,
            gpus=self.ranks,
            strategy=self.strategy,  # type: ignore[arg-type]
            tokens=self.part_tokens,
            length=self.length,
            batch=self.pairs,
            accumulation=self.accumulation,
            packing=self.packing,
            checkpointing=self.checkpointing,
            bf16=self.bf16,
            dtype=self.dtype,
            lora=self.adapter,
            device="cpu",
        )

    def says(self) -> str:
        """What differs from the first case."""
        first = asdict(Case())
        own = [f"{k} {v}" for k, v in asdict(self).items() if v != first[k]]
        return ", ".join(own) or "packed, float32"


HALF: dict[str, Any] = {"bf16": True}
AGAIN: dict[str, Any] = {"checkpointing": True}
PADDED: dict[str, Any] = {"packing": False}
TWO: dict[str, Any] = {"ranks": 2, "layers": 4, "pairs": 2}
CASES: Sequence[Case] = (
    Case(),
    Case(**PADDED),
    Case(**AGAIN),
    Case(**AGAIN, **PADDED),
    Case(**HALF),
    Case(**HALF, **PADDED),
    Case(**HALF, **AGAIN),
    Case(accumulation=1),
    Case(accumulation=1, **AGAIN, layers=12, pairs=8),
    Case(pairs=16, part_tokens=1024, **HALF),
    Case(hidden=768, layers=8, heads=12, key_heads=4, length=256),
    Case(hidden=1024, layers=4, heads=16, key_heads=8, length=512, pairs=2, **HALF, **AGAIN),
    Case(model_type="llama", key_heads=2),
    Case(model_type="qwen2", hidden=896, heads=14, key_heads=2, **HALF),
    Case(model_type="gemma", key_heads=1, **PADDED),
    Case(lora=16, **HALF),
    Case(lora=32, dtype="bfloat16", **HALF, **AGAIN),
    Case(**TWO),
    Case(**TWO, strategy="zero2"),
    Case(**TWO, strategy="zero3"),
    Case(**TWO, strategy="zero3", **AGAIN),
    Case(**TWO, strategy="fsdp2"),
    Case(**TWO, strategy="fsdp2", **AGAIN),
)


def make_trainer(case: Case, folder: str) -> Any:
    """A trainer of two steps."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_config(
        case.config, dtype=getattr(torch, case.dtype)
    )
    install_head(model).to(torch.float32)
    reward_model = RewardModel(model, tokenizer, RewardFormatter(tokenizer))
    if case.adapter:
        apply_lora(reward_model, **case.adapter)
    special = set(tokenizer.all_special_ids)
    words = [i for i in range(len(tokenizer)) if i not in special]

    def text(n: int) -> list[int]:  # no two begin alike
        draw = torch.Generator().manual_seed(n)
        chosen = torch.randint(len(words), (case.length - 1,), generator=draw)
        return [*(words[i] for i in chosen), int(tokenizer.eos_token_id)]

    steps, count = 2, case.pairs * case.accumulation * case.ranks
    rows = [{"chosen_ids": text(2 * i), "rejected_ids": text(2 * i + 1)} for i in range(count)]
    config = PairwiseRewardConfig(
        folder,
        per_device_train_batch_size=case.pairs,
        gradient_accumulation_steps=case.accumulation,
        max_steps=steps,
        num_train_epochs=steps,
        micro_batch_tokens=case.part_tokens,
        activation_checkpointing=case.checkpointing,
        packing="auto" if case.packing else "off",
        bf16=case.bf16,
        max_length=case.length,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
        **SHARDED.get(case.strategy, {}),  # type: ignore[arg-type]
    )
    return PairwiseRewardTrainer(reward_model, config, train_dataset=Dataset.from_list(rows))


class SecondStep(TrainerCallback):
    """Marks in the log where the second step begins: Adam's moments are there by then."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark it."""
        if state.global_step == 1:
            with record_function("second step"):
                pass


def measure(case: Case) -> int:
    """Most bytes of this process that are alive at any time from the second step on.

    Also the making of the model is logged: a profiler does not see the end of what is older than
    itself, such as whole weights that are sharded later.
    """
    disable_progress_bars()
    gc.collect()  # what another case has left would be given back, and counted, in this one
    with (
        tempfile.TemporaryDirectory() as folder,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log,
    ):
        trainer = make_trainer(case, folder)
        trainer.add_callback(SecondStep())
        trainer.train()
    assert log.profiler is not None
    events = sorted(log.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = most = 0
    begun = False
    for event in events:
        if event.name() == "second step":
            begun, most = True, now
        elif event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert begun
    return most


def measure_ranks(case: Case) -> int:
    """The same on so many processes; the most of any."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(case.ranks),
    }
    command = [sys.executable, "-m", "benchmarks.memory", "--rank_of", json.dumps(asdict(case))]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(case.ranks)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, said, strict=True):
        if process.returncode:
            raise SystemExit(f"{case.says()}: a rank failed\n{text[-3000:]}")
    return max(int(text.rsplit("bytes:", 1)[1].split()[0]) for text in said)


def compare(case: Case) -> dict[str, Any]:
    """A line of the table."""
    plan = case.plan()
    if case.ranks == 1:
        profiled = measure(case)
    else:  # how long FSDP2 keeps a layer's copies depends on when the other rank is there
        profiled = max(measure_ranks(case) for _ in range(3 if case.strategy == "fsdp2" else 1))
    return {
        "case": case.says(),
        "planned MiB": plan.total / 2**20,
        "profiled MiB": profiled / 2**20,
        "ratio": plan.total / profiled,
        **{
            name: getattr(plan, name) / 2**20
            for name in ("parameters", "gradients", "optimizer", "activations", "other", "overlap")
        },
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--cases", nargs="*", type=int, help="only these, by their number")
    parser.add_argument("--rank_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads or 1)
    if args.rank_of:
        print("bytes:", measure(Case(**json.loads(args.rank_of))), flush=True)
        return
    numbers = args.cases or (range(2) if args.quick else range(len(CASES)))
    found = []
    for number in numbers:
        found.append(compare(CASES[number]))
        print(table(found[-1:]), flush=True)
    print(table(found))
    worst = max(found, key=lambda line: abs(line["ratio"] - 1))
    print(f"furthest off: {worst['ratio']:.3f}, {worst['case']}")
    print(f"written: {save('memory', {'cases': found}, args)}")
    if abs(worst["ratio"] - 1) > 0.15:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
