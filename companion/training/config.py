"""Settings of a pairwise run: every field is a flag of ``companion train pairwise``.

Three groups: the model, the data, and the training itself (all of transformers'
``TrainingArguments`` and TRL's ``RewardConfig``, with the defaults that a reward model wants).
Chapter 4.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from trl import RewardConfig

from companion.errors import CompanionError
from companion.training.arguments import LoadArguments, SourceArguments


@dataclass
class PairwiseRewardConfig(RewardConfig):
    """TRL's ``RewardConfig`` with the defaults of a reward model, and two fields more.

    What differs from TRL's defaults, and why:

    =============================  ===================  ==========================================
    field                          here (TRL)           why
    =============================  ===================  ==========================================
    num_train_epochs               1 (3)                reward models overfit beyond one epoch
    center_rewards_coefficient     0.01 (none)          else the scores drift: Bradley–Terry sees
                                                        differences only (arXiv 2312.09244)
    bf16                           on CUDA with bf16    it rounds, and on a CPU it is faster for
                                   (always)             wide models only (book, 'How fast it is')
    activation_checkpointing       off (on)             it costs a second forward; switch it on
                                                        when memory runs out
    logging_steps                  0.02 (10)            a share of the run: 50 points, however long
    eval_strategy, eval_steps      steps, 0.2 (no)      five looks at held-out pairs on the way
    save_total_limit               2 (none)             a checkpoint is three times the model
    ddp_find_unused_parameters     off (on)             all are used; the search costs time at
                                                        every step
    =============================  ===================  ==========================================

    ``label_smoothing_factor`` is the probability with which a label is taken to be flipped.
    Raises :class:`companion.errors.CompanionError` for settings that cannot be honoured.
    """

    num_train_epochs: float = field(
        default=1.0, metadata={"help": "Passes over the data; reward models overfit beyond one."}
    )
    center_rewards_coefficient: float | None = field(
        default=0.01,
        metadata={"help": "Weight of the penalty (chosen + rejected)^2 that keeps scores near 0."},
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Former name of activation_checkpointing. Default: off."},
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "bf16 mixed precision. Default: on where the device is CUDA with bf16."},
    )
    logging_steps: float = field(
        default=0.02, metadata={"help": "Log every N steps, or below 1: every share of the run."}
    )
    eval_strategy: str = field(
        default="steps",
        metadata={
            "help": "Evaluate on held-out pairs: by 'steps', by 'epoch', or 'no'.",
            "choices": ["no", "steps", "epoch"],
        },
    )
    eval_steps: float | None = field(
        default=0.2, metadata={"help": "Evaluate every N steps, or below 1: share of the run."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Keep this many checkpoints."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Look for parameters without a gradient at every step (mixtures)."},
    )
    dataset_num_proc: int | None = field(
        default=None,
        metadata={
            "help": "Processes that tokenise. Default: one for 4,000 rows, at most one a core; "
            "ranks of one machine do not repeat each other's work."
        },
    )
    overlong: str = field(
        default="drop",
        metadata={
            "help": "Pairs with a text above max_length: drop them, stop with an error, or cut "
            "the prompt from its left. Each is counted and shown.",
            "choices": ["drop", "error", "truncate_prompt"],
        },
    )

    packing: str = field(
        default="auto",
        metadata={
            "help": "auto: a step computes each prompt once and no padding, with the same "
            "gradient, where that is exact for the model. off: padded batches.",
            "choices": ["auto", "off"],
        },
    )

    def __post_init__(self) -> None:
        if self.packing not in ("auto", "off"):
            raise CompanionError(f"packing is {self.packing!r}", "use 'auto' or 'off'")
        if self.bf16 is None:
            usable = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            self.bf16 = usable and not self.fp16 and not self.use_cpu
        by_deepspeed = (
            self.deepspeed is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        )
        if not torch.accelerator.is_available() and not by_deepspeed:
            self.use_cpu = True  # several processes then talk over gloo
        super().__post_init__()
        if not 0 <= self.label_smoothing_factor < 0.5:
            raise CompanionError(
                f"label_smoothing_factor is {self.label_smoothing_factor}",
                "give a probability in [0, 0.5) with which a label is flipped",
            )
        if not self.average_tokens_across_devices:
            raise CompanionError(
                "average_tokens_across_devices=False asks for the mean of local means, whose "
                "gradient is wrong whenever the ranks hold different numbers of pairs",
                "leave it on",
            )
        settings: Any = self.accelerator_config
        if settings.split_batches or settings.dispatch_batches:
            raise CompanionError(
                "accelerator_config: split_batches and dispatch_batches are not supported, since "
                "the pairs of a step could then not be counted exactly",
                "leave both off",
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise CompanionError(
                "train_sampling_strategy 'batch_rebalance' is not supported",
                "take 'group_by_length', which also saves padding",
            )
        for name in ("eos_token", "pad_token", "model_init_kwargs"):
            if getattr(self, name) is not None:
                raise CompanionError(
                    f"{name} is set, but models are loaded by companion.models.load_base, "
                    "which chooses pad and EOS safely",
                    "set the token in the tokenizer's own files",
                )


@dataclass
class ModelArguments(LoadArguments):
    """Which base, and whether to train all of it."""

    _argument_group_name = "model"

    keep_head: bool = field(
        default=False,
        metadata={"help": "Go on with the head of an earlier reward model, not a fresh one."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale by alpha/sqrt(r) in place of alpha/r."}
    )


@dataclass
class RowArguments(SourceArguments):
    """Which rows to train on, and which to hold out."""

    eval_fraction: float = field(
        default=0.1,
        metadata={"help": "Share of the rows to hold out, whole prompts, if nothing else is."},
    )
    calibration_fraction: float = field(
        default=0.5,
        metadata={
            "help": "Share of the held-out rows that is looked at during training and sets "
            "temperature, threshold and reference; the others give the final figures. 1: all do "
            "both."
        },
    )


@dataclass
class DataArguments(RowArguments):
    """Which pairs to train on, and which to hold out."""

    margins: str = field(
        default="given",
        metadata={
            "help": "A 'margin' column as given, made from ratings, or none.",
            "choices": ["given", "ratings", "none"],
        },
    )


def describe_settings(config: PairwiseRewardConfig, model: ModelArguments) -> dict[str, Any]:
    """The settings that decide what is learned, for the manifest."""
    names = (
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "world_size",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "optim",
        "center_rewards_coefficient",
        "label_smoothing_factor",
        "max_length",
        "overlong",
        "bf16",
        "fp16",
        "seed",
        "data_seed",
        "train_sampling_strategy",
        "activation_checkpointing",
    )
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    own = {f.name for f in fields(config)} - {f.name for f in fields(PairwiseRewardConfig)}
    settings |= {name: getattr(config, name) for name in sorted(own)}
    settings["optim"] = str(getattr(config.optim, "value", config.optim))
    settings["lr_scheduler_type"] = str(
        getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    )
    if model.use_peft:
        settings["lora"] = {
            "r": model.lora_r,
            "alpha": model.lora_alpha,
            "dropout": model.lora_dropout,
            "target_modules": model.lora_target_modules or "all-linear",
            "use_rslora": model.use_rslora,
        }
    return settings
