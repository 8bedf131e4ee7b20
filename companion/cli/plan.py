"""``companion plan``: what a run takes of memory, time and money, before it is started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from companion.cli.shared import HelpWithExamples
from companion.errors import CompanionError
from companion.training.kind import KINDS, load_kind

#: what this command does not know is a setting of training, which `args.settings` gets
TAKES_SETTINGS: Final = True
#: texts of a row, where that is no single one; a ranking has about so many
_TEXTS: Final = {"pairwise": 2, "kwise": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    parser.formatter_class = HelpWithExamples
    add("--model", metavar="BASE", help="the same as --model_name_or_path: its config is enough")
    add("--kind", choices=tuple(KINDS), default="pairwise", help="of training")
    add("--gpus", type=int, default=1, help="of all machines together")
    add(
        "--strategy",
        choices=("auto", "ddp", "zero2", "zero3", "fsdp2"),
        default="auto",
        help="auto: the first of ddp, zero2 and zero3 that fits",
    )
    add("--gpu_memory", type=float, default=80.0, metavar="GIB", help="of a GPU")
    add("--rows", type=int, help="to train on, or to score: for steps, time and cost")
    add(
        "--mean_tokens",
        type=float,
        help="of a row, as many as are computed: both texts of a pair, their prompt once",
    )
    add("--peak", type=float, metavar="TFLOPS", help="of a GPU, as 989 of an H100 in bf16")
    add("--mfu", type=float, default=0.4, help="the share of --peak that is reached")
    add("--price", type=float, help="of a GPU's hour")
    add("--score", action="store_true", help="plan the scoring of --rows in place of training")
    add("--json", action="store_true", help="print it as one JSON object")
    parser.epilog = (
        "Then any setting of 'companion train' may follow (--config FILE.yaml, --max_length, "
        "--micro_batch_tokens, --activation_checkpointing, --use_peft, …); bf16 is on unless "
        "--bf16 false says otherwise.\n\nExamples:\n"
        "  companion plan --config recipes/pairwise/qwen3-8b-zero3-ultrafeedback.yaml --gpus 8 "
        "--strategy zero3\n"
        "  companion plan --model Qwen/Qwen3-8B --score --rows 1000000 --mean_tokens 800 "
        "--peak 989 --price 2.5\n\nExit codes: 0 it fits, 1 it does not, 2 bad input."
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan; return 0 if it fits, else 1."""
    from companion.cli.train import parse

    settings = list(args.settings)
    if args.model is not None:
        settings += ["--model_name_or_path", args.model]
    _, model, config = parse(settings, args.kind, {"bf16": True})
    if model.model_name_or_path is None:
        raise CompanionError("there is no model to plan for", "give --model, or --config FILE.yaml")
    return _score(args, model) if args.score else _train(args, model, config)


def _score(args: argparse.Namespace, model: Any) -> int:
    from companion.training.memory import plan_scoring

    for name in ("rows", "mean_tokens", "peak"):
        if getattr(args, name) is None:
            raise CompanionError(f"--score needs --{name}", f"give --{name}")
    names = ("rows", "mean_tokens", "peak", "mfu", "gpus", "price")
    plan = plan_scoring(model.model_name_or_path, **{name: getattr(args, name) for name in names})
    print(json.dumps(plan.to_dict(), indent=2) if args.json else plan)
    return 0


def _train(args: argparse.Namespace, model: Any, config: Any) -> int:
    from companion.training.memory import plan_training

    if config.max_length is None:
        raise CompanionError("max_length is None", "give the most tokens of a text: --max_length")
    if not config.optim.startswith("adamw_torch"):
        raise CompanionError(f"optim is {config.optim}", "plans know AdamW (adamw_torch…) alone")
    asked = {
        **{n: getattr(args, n) for n in ("gpus", "strategy", "gpu_memory", "rows", "mean_tokens")},
        **{name: getattr(args, name) for name in ("peak", "mfu", "price")},
        "tokens": config.micro_batch_tokens,
        "length": config.max_length,
        "texts": _TEXTS.get(args.kind, 1),
        "packing": config.packing == "auto",
        "checkpointing": bool(config.activation_checkpointing),
        "bf16": bool(config.bf16 or config.fp16),
        "dtype": model.dtype,
        "lora": model.lora if model.use_peft else None,
        "labels": load_kind(args.kind).trainer.labels(config),
        "batch": config.per_device_train_batch_size,
        "accumulation": config.gradient_accumulation_steps,
        "epochs": config.num_train_epochs,
    }
    plan = plan_training(model.model_name_or_path, **asked)
    if not plan.fits:
        plan = replace(plan, notes=(*plan.notes, _cure(model.model_name_or_path, asked, plan)))
    print(json.dumps(plan.to_dict(), indent=2) if args.json else plan)
    return 0 if plan.fits else 1


def _cure(model: str, asked: dict[str, Any], plan: Any) -> str:
    """The first plan that fits, from what costs least time to what costs most."""
    from companion.training.memory import plan_training

    for changed in _cheaper(asked, plan):
        found = plan_training(model, **asked | changed)
        if found.fits:
            flags = {
                "strategy": "--strategy {}",
                "tokens": "--micro_batch_tokens {}",
                "checkpointing": "--activation_checkpointing true",
            }
            said = " ".join(flags[name].format(value) for name, value in changed.items())
            return f"it fits with {said}: {found.total / 2**30:.1f} GiB a rank"
    return "take more GPUs (ZeRO-3 shares weights among them), LoRA (--use_peft), or shorter texts"


def _cheaper(asked: dict[str, Any], plan: Any) -> Iterator[dict[str, Any]]:
    """What to change: fewer tokens at once, each layer computed twice, weights shared out."""
    order = ("single", "ddp", "zero2", "zero3")
    later = order[order.index(plan.strategy) + 1 :] if plan.strategy in order else ()
    strategies = [plan.strategy, *(later if asked["gpus"] > 1 else ())]
    least = asked["texts"] * asked["length"]  # a single row is never cut
    for strategy in strategies:
        for checkpointing in sorted({asked["checkpointing"], True}):
            for tokens in dict.fromkeys(max(least, plan.tokens // 2**k) for k in range(4)):
                changed = {}
                if strategy != plan.strategy:
                    changed["strategy"] = strategy
                if tokens != plan.tokens:
                    changed["tokens"] = tokens
                if checkpointing != asked["checkpointing"]:
                    changed["checkpointing"] = True
                yield changed
