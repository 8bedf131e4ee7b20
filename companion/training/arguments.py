"""Settings that every ``companion train`` shares: what to load, and where the rows come from.

Chapter 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoadArguments:
    """Which model to start from, and whether to train all of it."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to start from: a folder or a hub id."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit on the hub."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Number format of the weights. With bf16 on, float32 weights are computed "
            "with in bf16; the head of a reward model is float32 in any case.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2, …"}
    )
    use_peft: bool = field(
        default=False, metadata={"help": "Train a LoRA adapter, and a reward model's head."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to adapt; default: all linear ones."}
    )


@dataclass
class SourceArguments:
    """Where the rows come from."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Rows: a file (.jsonl, .parquet, .csv, …), a folder, or a hub id."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a hub dataset."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a hub dataset."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on; slices such as train[:1000] work."}
    )
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split to hold out. Default: a part of the prompts of the train split."},
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out rows from another source."}
    )
    split_seed: int = field(default=0, metadata={"help": "Another seed, another split."})
    limit: int | None = field(default=None, metadata={"help": "Take this many rows at most."})
    on_error: str = field(
        default="raise",
        metadata={
            "help": "Bad rows: stop with all of them named, or skip and count them.",
            "choices": ["raise", "skip"],
        },
    )
