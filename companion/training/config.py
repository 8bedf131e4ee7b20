"""Settings of training: every field is a flag of ``companion train KIND``.

Three groups: the model, the data, and the training itself (all of transformers'
``TrainingArguments`` and TRL's ``RewardConfig``, with the defaults that a reward model wants).
A kind of training adds its own settings to the last group, and takes out what it cannot honour
(:func:`not_offered`). Chapter 4.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Final, get_args, get_type_hints

from trl import RewardConfig

from companion.data.mixing import is_mix
from companion.engine.devices import has_bf16
from companion.errors import CompanionError, first_line
from companion.training.launching import settle_on_cpu


def setting(
    default: Any = MISSING, help: str = "", choices: Any = (), nargs: str = "", **factory: Any
) -> Any:
    """A field that is a flag of the command line, with its text, and what may be chosen."""
    if default is not MISSING:
        factory["default"] = default
    more = {name: value for name, value in (("choices", choices), ("nargs", nargs)) if value}
    return field(metadata={"help": help, **more}, **factory)


_INF: Final = math.inf
#: settings of numbers -> the least and the greatest value, and whether these two are allowed
_RANGES: Final[dict[str, tuple[float, float, bool, bool]]] = {
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size"),
            *("gradient_accumulation_steps", "max_length", "micro_batch_tokens"),
            *("dataset_num_proc", "save_total_limit", "lora_r", "limit", "lora_alpha"),
            *("max_completion_length", "monitor_completions", "monitor_prompts", "test_prompts"),
            *("num_iterations", "steps_per_generation", "generation_batch_size"),
            *("eval_accumulation_steps", "torch_empty_cache_steps", "ddp_timeout"),
            *("ddp_bucket_cap_mb", "dataloader_prefetch_factor"),
        ),
        (1, _INF, True, False),
    ),
    **dict.fromkeys(
        (
            *("learning_rate", "weight_decay", "max_grad_norm", "neftune_noise_alpha"),
            *("center_rewards_coefficient", "warmup_steps", "dataloader_num_workers", "beta"),
            *("epsilon", "epsilon_high", "eval_delay"),
        ),
        (0, _INF, True, False),
    ),
    **dict.fromkeys(
        (
            *("num_train_epochs", "logging_steps", "eval_steps", "save_steps", "adam_epsilon"),
            *("reward_clip", "kl_budget", "temperature", "repetition_penalty", "monitor_steps"),
        ),
        (0, _INF, False, False),
    ),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "lora_dropout", "warmup_ratio"), (0, 1, True, False)
    ),
    **dict.fromkeys(("eval_fraction", "fall_alpha"), (0, 1, False, False)),
    **dict.fromkeys(("calibration_fraction", "top_p"), (0, 1, False, True)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32, True, False)),
    "label_smoothing_factor": (0, 0.5, True, False),
}


def check_numbers(settings: Any) -> None:
    """Refuse a dataclass of settings with a number that makes no sense, and say what would.

    transformers takes a rate of −1, a batch of 0 and NaN, and ends with a traceback in the run, or
    with a model of NaN.

    Raises
    ------
    CompanionError
    """
    hints = get_type_hints(type(settings))
    for own in fields(settings):
        value, hint = getattr(settings, own.name), hints.get(own.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        kinds = {hint, *get_args(hint)}
        if float in kinds and int not in kinds:  # (of YAML; torch takes no 0 for 0.0)
            value = float(value)
            setattr(settings, own.name, value)
        if isinstance(value, float) and int in kinds and float not in kinds:
            raise CompanionError(f"{own.name} is {value}", "give a whole number")
        if own.name == "max_steps" and value < 1 and value != -1:
            raise CompanionError(
                f"max_steps is {value}", "give a positive number, or leave it out: num_train_epochs"
            )
        low, high, with_low, with_high = _RANGES.get(own.name, (-_INF, _INF, False, False))
        above = low <= value if with_low else low < value
        if not (above and (value <= high if with_high else value < high)):
            raise CompanionError(f"{own.name} is {value}", _range_text(own.name))


def _range_text(name: str) -> str:
    low, high, with_low, with_high = _RANGES.get(name, (-_INF, _INF, False, False))
    if high == _INF:
        least = "" if low == -_INF else f" of at least {low:g}" if with_low else " above 0"
        return f"give a finite number{least}"
    return (
        f"give a number in {'[' if with_low else '('}{low:g}, {high:g}{']' if with_high else ')'}"
    )


def not_offered(why: str, default: Any = None) -> Any:
    """A field of a base class that a subclass does not offer: neither argument nor flag.

    `why` is what ``companion train`` says to those who ask for it all the same.
    """
    return field(init=False, default=default, metadata={"not_offered": why})


@dataclass
class LoadArguments:
    """Which model to start from, and whether to train all of it."""

    model_name_or_path: str | None = setting(None, "Model to start from: a folder or a hub id.")
    model_revision: str | None = setting(None, "Branch, tag or commit on the hub.")
    dtype: str = setting(
        "float32",
        "Number format of the weights. With bf16 on, float32 weights are computed with in bf16;"
        " the head of a reward model is float32 in any case.",
        choices=["float32", "bfloat16", "float16"],
    )
    attn_implementation: str | None = setting(None, "eager, sdpa, flash_attention_2, …")
    use_peft: bool = setting(False, "Train a LoRA adapter, and a reward model's head.")
    lora_r: int = setting(16, "Rank of the adapter.")
    lora_alpha: int = setting(32, "Scale of the adapter.")
    lora_dropout: float = setting(0.0, "Dropout of the adapter.")
    lora_target_modules: list[str] | None = setting(
        None, "Layers to adapt; default: all linear ones."
    )

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass
class SourceArguments:
    """Where the rows come from."""

    _argument_group_name = "data"

    dataset_name: str | None = setting(
        None,
        "Rows: a file (.jsonl, .parquet, .csv, …), a glob, a folder, or a hub id; or several.",
        nargs="+",
    )
    dataset_mix: str | None = setting(
        None,
        "In place of dataset_name: a YAML file of sources with weights, which are mixed in exact "
        "counts (README; companion.data.mixing). The manifest keeps the recipe.",
    )
    dataset_config: str | None = setting(None, "Configuration of a hub dataset.")
    dataset_revision: str | None = setting(None, "Branch, tag or commit of a hub dataset.")
    dataset_train_split: str = setting(
        "train", "Split to train on; slices such as train[:1000] work."
    )
    dataset_test_split: str | None = setting(
        None, "Split to hold out. Default: a part of the prompts of the train split."
    )
    eval_dataset_name: str | None = setting(None, "Held-out rows from another source.")
    columns: list[str] | None = setting(
        None,
        "Rename columns, OLD=NEW (question=prompt), or leave one out, OLD=; of the held-out rows "
        "too. A known layout (Alpaca, LLaMA-Factory, ms-swift, ShareGPT, axolotl) needs none.",
    )
    split_seed: int = setting(0, "Another seed, another split.")
    limit: int | None = setting(None, "Take this many rows at most.")
    on_error: str = setting(
        "raise",
        "Bad rows: stop with all of them named, or skip and count them.",
        choices=["raise", "skip"],
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        names: Any = self.dataset_name
        if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
            self.dataset_name = names[0]
        if self.dataset_mix is None:
            return
        if names not in (None, self.dataset_mix):
            raise CompanionError(
                "--dataset_name and --dataset_mix are given",
                "name that source in the mixture too, or leave one of them out",
            )
        if not is_mix(self.dataset_mix):
            raise CompanionError(
                f"--dataset_mix {self.dataset_mix}: no YAML file", "give a file with sources"
            )
        self.dataset_name = self.dataset_mix


#: of kinds whose trainer is not TRL's
NO_OFFLOADING = (
    "activations are moved to the CPU by TRL's trainer alone, that of pairs; take "
    "activation_checkpointing, which saves memory too"
)
_LOADED_HERE = "models are loaded by companion.models.load_base, which chooses pad and EOS safely"


@dataclass
class HubArguments:
    """What of a run goes to the hub: the finished model, by :mod:`companion.models.hub`."""

    push_to_hub: bool = setting(
        False,
        "Upload the finished model to the hub (--hub_model_id, --hub_private_repo, …), with all"
        " that it needs and a card. The hub is asked before the run.",
    )
    hub_strategy: str = setting(
        "end", "Checkpoints have no manifest: the finished model alone.", choices=["end"]
    )


@dataclass
class CheckpointArguments:
    """Which checkpoint a run may go on from (:mod:`companion.training.checkpoints`)."""

    resume_from_checkpoint: str | None = setting(
        None,
        "Go on from a checkpoint of this run: a folder checkpoint-N, 'last' for the newest whole "
        "one, or 'auto', which begins anew where there is none. One of other rows, another base or "
        "other settings is refused.",
    )
    resume_other_run: bool = setting(
        False, "Go on from the checkpoint of another run too; the manifest says what differed."
    )


@dataclass
class PairwiseRewardConfig(CheckpointArguments, HubArguments, RewardConfig):
    """TRL's ``RewardConfig`` with the defaults of a reward model, and two fields more.

    What differs from TRL's defaults, and why:

    =============================  ===================  ==========================================
    field                          here (TRL)           why
    =============================  ===================  ==========================================
    learning_rate                  1e-4 with LoRA,      TRL's is a rate for LoRA;
                                   else 1e-5 (1e-4)     :func:`default_learning_rate`
    num_train_epochs               1 (3)                the safe default (chapter 4)
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
    ddp_broadcast_buffers          off (on)             buffers (positions) never change
    hub_strategy                   end (every_save)     a checkpoint has no manifest
    =============================  ===================  ==========================================

    ``label_smoothing_factor`` is the probability with which a label is taken to be flipped.
    Raises :class:`companion.errors.CompanionError` for settings that cannot be honoured.
    """

    learning_rate: float | None = setting(
        None, "Peak of the learning rate. Default: 1e-4 with LoRA, 1e-5 for all weights."
    )  # type: ignore[assignment]
    num_train_epochs: float = setting(
        1.0, "Passes over the data; more than one may learn pairs by heart."
    )
    center_rewards_coefficient: float | None = setting(
        0.01, "Weight of the penalty (chosen + rejected)^2 that keeps scores near 0."
    )
    gradient_checkpointing: bool | None = setting(
        None, "Former name of activation_checkpointing. Default: off."
    )  # type: ignore[assignment]
    bf16: bool | None = setting(
        None, "bf16 mixed precision. Default: on where the device is CUDA with bf16."
    )  # type: ignore[assignment]
    logging_steps: float = setting(0.02, "Log every N steps, or below 1: every share of the run.")
    eval_strategy: str = setting(
        "steps",
        "Evaluate on held-out pairs: by 'steps', by 'epoch', or 'no'.",
        choices=["no", "steps", "epoch"],
    )
    eval_steps: float | None = setting(0.2, "Evaluate every N steps, or below 1: share of the run.")
    save_total_limit: int | None = setting(2, "Keep this many checkpoints.")
    ddp_find_unused_parameters: bool | None = setting(
        False, "Look for parameters without a gradient at every step (mixtures)."
    )
    ddp_broadcast_buffers: bool | None = setting(
        False, "Send rank 0's buffers to all at every forward; those of a decoder never change."
    )
    micro_batch_tokens: int | None = setting(
        None,
        "Most tokens that go through the model at once: a micro-batch that holds more is cut into "
        "parts, with the same gradient. So a few long rows do not decide how many fit in.",
    )
    logging_nan_inf_filter: bool = setting(
        False, "Leave a loss that is not finite out of the log. Here it ends the run."
    )
    dataset_num_proc: int | None = setting(
        None,
        "Processes that tokenise. Default: one for 4,000 rows, at most one a core; ranks of one"
        " machine do not repeat each other's work.",
    )
    overlong: str = setting(
        "drop",
        "Pairs with a text above max_length: drop them, stop with an error, or cut the prompt "
        "from its left. Each is counted and shown.",
        choices=["drop", "error", "truncate_prompt"],
    )

    text: str = setting(
        "auto",
        "Rows with a prompt of text. chat: the prompt is the user's message, the completion the "
        "assistant's. plain: one behind the other, as they are. auto: chat if the rows hold "
        "messages, or the tokenizer has a chat template of its own. Saved with the model.",
        choices=["auto", "chat", "plain"],
    )
    split_special_tokens: bool = setting(
        False,
        "Special tokens within the rows' texts are spelt as letters. Off: they end turns and texts "
        "as in TRL and transformers, and are counted. Saved with the model.",
    )
    packing: str = setting(
        "auto",
        "auto: a step computes each prompt once and no padding, with the same gradient, where "
        "that is exact for the model. off: padded batches.",
        choices=["auto", "off"],
    )
    eos_token: str | None = not_offered(f"{_LOADED_HERE}; set it in the tokenizer's own files")
    pad_token: str | None = not_offered(f"{_LOADED_HERE}; set it in the tokenizer's own files")
    model_init_kwargs: dict[str, Any] | str | None = not_offered(
        f"{_LOADED_HERE}; take dtype, attn_implementation and model_revision"
    )
    average_tokens_across_devices: bool = not_offered(
        "it is always on: the mean of local means has another gradient whenever the ranks hold "
        "different numbers of items",
        default=True,
    )

    def __post_init__(self) -> None:
        for own in fields(self):
            value, known = getattr(self, own.name), own.metadata.get("choices", ())
            if known and value not in known and value is not None:
                raise CompanionError(
                    f"{own.name} is {value!r}", f"take one of: {', '.join(map(str, known))}"
                )
        if self.bf16 is None:
            self.bf16 = has_bf16() and not self.fp16 and not self.use_cpu
        check_numbers(self)
        check_libraries(self)
        settle_on_cpu(self)
        super().__post_init__()
        refuse_several_devices(self.n_gpu)
        settings: Any = self.accelerator_config
        settings.non_blocking = self.dataloader_pin_memory
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


def default_learning_rate(lora: bool) -> float:
    """The rate of a run that names none: 1e-4 for a LoRA adapter, 1e-5 for all weights.

    Llama 2's reward models were trained at 1e-5, the largest at 5e-6 (Touvron et al. 2023,
    arXiv 2307.09288, section 3.2.2), OpenRLHF's Llama-3-8b-rm-700k at 9e-6 (its card); an adapter
    wants about ten times the rate of all weights (Schulman et al. 2025, "LoRA Without Regret"). A
    very small model wants more: the tutor 1e-3.
    """
    return 1e-4 if lora else 1e-5


@dataclass
class ModelArguments(LoadArguments):
    """Which base, and whether to train all of it."""

    _argument_group_name = "model"

    keep_head: bool = setting(
        False, "Go on with the head of an earlier reward model, not a fresh one."
    )
    load_in_4bit: bool = setting(
        False,
        "QLoRA: the base in 4 bits (bitsandbytes), with use_peft. What is saved is the base as "
        "those bits have it, with the adapter merged, in full precision.",
    )
    use_rslora: bool = setting(False, "Scale by alpha/sqrt(r) in place of alpha/r.")

    @property
    def lora(self) -> dict[str, Any]:
        """The adapter, as :func:`companion.models.apply_lora` takes it."""
        return {
            "r": self.lora_r,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "target_modules": self.lora_target_modules or "all-linear",
            "use_rslora": self.use_rslora,
        }


@dataclass
class RowArguments(SourceArguments):
    """Which rows to train on, and which to hold out."""

    eval_fraction: float = setting(
        0.1, "Share of the rows to hold out, whole prompts, if nothing else is."
    )
    calibration_fraction: float = setting(
        0.5,
        "Share of the held-out rows that is looked at during training and sets temperature, "
        "threshold and reference; the others give the final figures. 1: all do both.",
    )


@dataclass
class DataArguments(RowArguments):
    """Which pairs to train on, and which to hold out."""

    margins: str = setting(
        "given",
        "A 'margin' column as given, made from ratings, or none.",
        choices=["given", "ratings", "none"],
    )


#: what a reporter of transformers needs, where its package has another name
_PACKAGES: Final = {
    "azure_ml": "azureml",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "tensorboard": "tensorboard",
}


def check_libraries(config: Any) -> None:
    """Refuse what a library would find out in the midst of the run.

    A reporter or a compiler that there is not, a package that is not installed, arguments that are
    none.

    Raises
    ------
    CompanionError
    """
    from accelerate.utils import DynamoBackend
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if config.output_dir == "":
        raise CompanionError("output_dir is empty", "name a folder")
    kwargs = config.lr_scheduler_kwargs
    if isinstance(kwargs, str) and not kwargs.lstrip().startswith("{"):
        raise CompanionError(
            f"lr_scheduler_kwargs is {kwargs!r}", """write JSON: '{"num_cycles": 1}'"""
        )
    for part in str(config.optim_args or "").replace(" ", "").split(","):
        if part and part.count("=") != 1:
            raise CompanionError(f"optim_args is {config.optim_args!r}", "write NAME=VALUE,…")
    backend = config.torch_compile_backend
    if backend is not None and backend.upper() not in DynamoBackend.__members__:
        known = ", ".join(name.lower() for name in DynamoBackend.__members__)
        raise CompanionError(f"torch_compile_backend is {backend!r}", f"take one of: {known}")
    if config.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise CompanionError(
            "use_liger_kernel is on, and the package liger-kernel is not installed",
            "pip install liger-kernel, or leave it off",
        )
    report_to = config.report_to
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise CompanionError(
                f"report_to is {name!r}",
                f"take none, all, or some of: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}",
            )
        package = _PACKAGES.get(name, name)
        if name not in ("codecarbon", "flyte") and importlib.util.find_spec(package) is None:
            if name == "tensorboard" and importlib.util.find_spec("tensorboardX"):
                continue
            raise CompanionError(
                f"report_to is {name!r}, and the package {package} is not installed",
                f"pip install {package}, or --report_to none",
            )


def check_optimizer(config: Any, model: Any) -> None:
    """Refuse an optimiser or a schedule that is not there or takes none of these arguments."""
    import torch
    from transformers import Trainer, get_scheduler

    try:
        Trainer.get_optimizer_cls_and_kwargs(config, model)
    except (ImportError, ValueError, TypeError) as error:
        name = getattr(config.optim, "value", config.optim)
        raise CompanionError(
            f"optim is {name}: {first_line(error)}", "install what it needs, or take adamw_torch"
        ) from error
    given = config.lr_scheduler_kwargs or None
    trial = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # a schedule is made of an optimiser alone
    try:
        get_scheduler(config.lr_scheduler_type, trial, 1, 10, scheduler_specific_kwargs=given)
    except (ValueError, TypeError, AttributeError) as error:
        raise CompanionError(
            f"lr_scheduler_type is {getattr(config.lr_scheduler_type, 'value', '')}, with "
            f"lr_scheduler_kwargs {given}: {first_line(error)}",
            "take the arguments that transformers.get_scheduler names for it",
        ) from error


def refuse_several_devices(number: int) -> None:
    """Refuse a single process with several GPUs: transformers would use ``DataParallel``.

    It cuts the batches behind the trainer's back, so the items of a step could not be counted, and
    it is slower than a process for each GPU.
    """
    if number > 1:
        raise CompanionError(
            f"one process sees {number} GPUs",
            f"start one for each: torchrun --nproc_per_node {number} -m companion …, or accelerate "
            "launch -m companion …; or show it one: CUDA_VISIBLE_DEVICES=0",
        )


def require(**flags: Any) -> None:
    """Refuse a run without the settings that it cannot do without."""
    for flag, value in flags.items():
        if not value:
            raise CompanionError(f"--{flag} is missing", "give it as a flag or in the YAML file")


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
        "lr_scheduler_kwargs",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "optim",
        "optim_args",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "neftune_noise_alpha",
        "disable_dropout",
        "load_best_model_at_end",
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
    for name in ("optim", "lr_scheduler_type"):
        settings[name] = str(getattr(settings[name], "value", settings[name]))
    if model.use_peft:
        settings["lora"] = model.lora
    return settings
