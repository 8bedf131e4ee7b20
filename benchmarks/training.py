"""Whole ``train()`` calls on pairs with a prompt in common: ``python -m benchmarks.training``.

Against TRL's ``RewardTrainer`` as it is shipped (bf16, activation checkpointing) and without
checkpointing in either dtype. Every run starts from the same weights and sees the same pairs.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import RewardConfig, RewardTrainer

from benchmarks.measuring import Outcome, matmul_peak, ratio, table, take_turns
from benchmarks.methods import Method
from benchmarks.results import add_arguments, save
from benchmarks.shapes import (
    SHAPES,
    USUAL,
    VOCABULARY,
    make_model,
    needed_tokens,
    pairs,
    useful_flops,
)
from companion import PairwiseRewardConfig, PairwiseRewardTrainer

#: Method -> trainer, configuration and what differs from its defaults. The first is the base.
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "TRL as shipped": (RewardTrainer, RewardConfig, {}),
    "TRL bf16, no checkpointing": (
        RewardTrainer,
        RewardConfig,
        {"bf16": True, "activation_checkpointing": False},
    ),
    "TRL fp32, no checkpointing": (
        RewardTrainer,
        RewardConfig,
        {"bf16": False, "activation_checkpointing": False},
    ),
    "companion bf16, padded": (
        PairwiseRewardTrainer,
        PairwiseRewardConfig,
        {"bf16": True, "packing": "off"},
    ),
    "companion bf16": (PairwiseRewardTrainer, PairwiseRewardConfig, {"bf16": True}),
    "companion fp32": (PairwiseRewardTrainer, PairwiseRewardConfig, {"bf16": False}),
}
#: Which method each is compared with besides the first.
SAME_DTYPE = {
    "companion bf16": "TRL bf16, no checkpointing",
    "companion fp32": "TRL fp32, no checkpointing",
}


def make_tokenizer() -> Any:
    """One word for each id; the pairs are token ids already, so it only tells pad and EOS."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCABULARY))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w2"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="w2"
    )


def method(
    name: str, model: Any, rows: Dataset, settings: dict[str, Any], device: torch.device
) -> Method:
    """A fresh copy and its trainer are made before the clock starts."""
    trainer_class, config_class, own = METHODS[name]

    def prepare() -> Any:
        folder = tempfile.TemporaryDirectory()
        trainer = trainer_class(
            model=copy.deepcopy(model),
            args=config_class(
                folder.name,
                num_train_epochs=1,
                learning_rate=1e-4,
                logging_steps=1_000_000,
                eval_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=device.type == "cpu",
                center_rewards_coefficient=0.01,
                max_length=1024,
                seed=0,
                **{**settings, **own},
            ),
            train_dataset=rows,
            processing_class=make_tokenizer(),
        )

        trainer.remove_callback(PrinterCallback)
        computed = _computed(trainer.data_collator, rows, settings["per_device_train_batch_size"])

        def run() -> Outcome:
            with folder:
                loss = trainer.train().training_loss
            return Outcome(computed, float(loss))

        return run

    return prepare


def _computed(collator: Any, rows: Dataset, batch_size: int) -> int:
    """Tokens of an epoch's batches, in arrival order (the shuffle changes the padding little)."""
    return sum(
        int(
            collator(rows.select(range(i, min(i + batch_size, len(rows)))).to_list())[
                "input_ids"
            ].numel()
        )
        for i in range(0, len(rows), batch_size)
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), help="default: tiny and small, quick: tiny"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs of a step")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 5)
    args.shapes = args.shapes or (["tiny"] if args.quick else list(USUAL))
    if args.threads:
        torch.set_num_threads(args.threads)
    disable_progress_bars()
    device = torch.device(args.device)
    cases = []
    for shape in args.shapes:
        full = {"tiny": 160, "small": 24, "0.6b": 24}[shape]
        examples = pairs(2 * args.batch_size if args.quick else full)
        case = one_shape(shape, examples, args, device)
        cases.append({"shape": shape, **case})
        print(f"\ntraining, {shape}, {case['pairs']} pairs")
        print(table(case["methods"]), "\n")
    print(f"written: {save('training', {'cases': cases}, args)}")


def one_shape(
    shape: str, examples: list[dict[str, list[int]]], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """All methods on one model."""
    rows = Dataset.from_list(examples)
    ids = [row[side] for row in examples for side in ("chosen_ids", "rejected_ids")]
    model = make_model(shape, device)
    settings = {
        "per_device_train_batch_size": args.batch_size,
        "train_sampling_strategy": "random",
    }
    methods = {name: method(name, model, rows, settings, device) for name in METHODS}
    timed = take_turns(methods, args.rounds, device)
    base = next(iter(timed.values()))
    peaks = {
        kind: matmul_peak(getattr(torch, kind), device, quick=args.quick)
        for kind in ("float32", "bfloat16")
    }
    flops, needed = useful_flops(model, ids, backward=True), needed_tokens(ids)
    table_rows = []
    for name, found in timed.items():
        times = ratio(base, found)
        kind = "float32" if "fp32" in name else "bfloat16"
        same = SAME_DTYPE.get(name)
        table_rows.append(
            {
                "method": name,
                "seconds": found.median,
                "times faster": times["median"],
                "least": times["least"],
                "most": times["most"],
                "than TRL, same dtype": None
                if same is None
                else ratio(timed[same], found)["median"],
                "text tokens/s": sum(map(len, ids)) / found.median,
                "needed/computed": needed / found.outcome.computed,
                "share of peak": flops / found.median / peaks[kind],
                "peak MiB": found.peak_mib,
                "train loss": found.outcome.check,
            }
        )
    return {
        "pairs": len(examples),
        "batch_size": args.batch_size,
        "text_tokens": sum(map(len, ids)),
        "needed_tokens": needed,
        "matmul_peak_flops": peaks,
        "methods": table_rows,
        "seconds": {name: found.seconds for name, found in timed.items()},
    }


if __name__ == "__main__":
    main()
