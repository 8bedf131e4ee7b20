"""Settings of ``companion train grpo``: every field is a flag, or a line of a YAML file.

Chapter 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from trl import GRPOConfig

from companion.engine.devices import has_bf16
from companion.errors import CompanionError
from companion.training.config import (
    CheckpointArguments,
    HubArguments,
    LoadArguments,
    SourceArguments,
    check_libraries,
    check_numbers,
    refuse_several_devices,
    setting,
)
from companion.training.launching import settle_on_cpu

#: what TRL takes, and says in the midst of the first step only
_CHOICES: Final = {
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none"),
    "loss_type": ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
}


@dataclass
class GRPORunConfig(CheckpointArguments, HubArguments, GRPOConfig):
    """TRL's ``GRPOConfig`` with the rewards, the watch on them, and the budget.

    What differs from TRL's defaults: ``bf16`` is on only where the device is CUDA with bf16;
    without a GPU ``use_cpu`` is set, so that several processes talk over gloo;
    ``activation_checkpointing`` is off (TRL switches it on by its former name); ``logging_steps``
    is a share of the run; ``save_total_limit`` is 2; ``hub_strategy`` is end.

    Raises :class:`companion.errors.CompanionError` for settings that cannot be honoured.
    """

    reward_model: list[str] = setting(
        default_factory=list,
        help="One or more rewards: a reward model's folder or hub id, http://host:port#MODEL for a "
        "server that runs MODEL, or module:function. --reward_weights says what each counts; a "
        "completion that lacks one has none.",
    )
    reward_transform: str = setting(
        "raw",
        "What becomes of a reward model's score; other than raw needs a manifest.",
        choices=["raw", "centered", "z", "sigmoid"],
    )
    reward_clip: float | None = setting(None, "Bound on its absolute value, after the transform.")
    reward_truncated: str = setting(
        "score",
        "Reward of a completion that was cut off: 'score' of the text as it stands, 'none', "
        "which leaves it out, or a number.",
    )
    reward_protocol: str = setting(
        "classify",
        "What servers speak: classify, vLLM's /classify, which the companion's server knows too, "
        "or companion, its own /v1/rewards and /v1/steps, which also say which model answered.",
        choices=["classify", "companion"],
    )
    reward_text: str | None = setting(
        None,
        "How reward models read prompts of text, in place of what each says: chat, as a question "
        "and its answer in the chat template, or plain, as they are.",
        choices=["chat", "plain"],
    )
    reward_readout: Literal["mask", "transformers"] | None = setting(
        None,
        "Where a published reward model whose pad token is its EOS is read: mask, at the last "
        "token; or transformers, at the last that is not the pad. What 'companion adopt' wrote "
        "needs none.",
        choices=["mask", "transformers"],
    )
    reward_dtype: str = setting(
        "auto",
        "Number format of the reward models and scorers that every rank loads; auto is bfloat16 "
        "where the GPU computes in it, and float32 elsewhere. It says nothing to a server, nor to "
        "module:function.",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    held_out_scorer: str | None = setting(
        None,
        "A scorer that the policy is not trained on, named as a reward is; the run stops when "
        "it falls, and keeps the policy at its best.",
    )
    also_measure: list[str] = setting(
        default_factory=list, help="Further scorers to report, named as a reward is."
    )
    monitor_steps: float = setting(
        0.1, "Look at the held-out prompts every N steps, or below 1: share of the run."
    )
    monitor_completions: int = setting(4, "Completions of each held-out prompt at each look.")
    fall_alpha: float = setting(
        0.05, "Chance of stopping, by mistake, a run whose held-out score never falls."
    )
    kl_budget: float | None = setting(
        None, "Nats a completion that the policy may move from where it began."
    )
    on_budget: str = setting(
        "stop",
        "When the KL budget is spent: stop, or raise beta until the KL is back.",
        choices=["stop", "raise_beta"],
    )
    kl_estimator: str = setting("k1", "Estimator of the KL at a look.", choices=["k1", "k3"])
    gradient_checkpointing: bool | None = setting(
        None, "Former name of activation_checkpointing. Default: off."
    )  # type: ignore[assignment]
    logging_steps: float = setting(0.02, "Log every N steps, or below 1: every share of the run.")
    save_total_limit: int | None = setting(2, "Keep this many training checkpoints.")

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = has_bf16() and not self.fp16 and not self.use_cpu
        check_numbers(self)
        check_libraries(self)
        settle_on_cpu(self)
        super().__post_init__()
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise CompanionError(
                    f"{name} is {getattr(self, name)!r}", f"take one of: {', '.join(known)}"
                )
        refuse_several_devices(self.n_gpu)
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_model):
            raise CompanionError(
                f"{len(self.reward_weights)} reward_weights for {len(self.reward_model)} rewards",
                "give one weight for each, in their order",
            )
        if self.on_budget == "raise_beta" and not (self.beta > 0 and self.kl_budget is not None):
            raise CompanionError(
                "on_budget is 'raise_beta', without a kl_budget or with a beta of 0",
                "set kl_budget, and beta (0.01, say)",
            )
        _ = self.truncated  # refuses what it cannot read

    @property
    def scorer_dtype(self) -> str:
        """``reward_dtype``, with the format that auto stands for."""
        if self.reward_dtype != "auto":
            return self.reward_dtype
        return "bfloat16" if has_bf16() else "float32"

    @property
    def truncated(self) -> Any:
        """``reward_truncated`` as :class:`companion.scoring.RewardFunction` takes it."""
        if self.reward_truncated == "score":
            return "score"
        if self.reward_truncated.lower() in ("none", "null"):
            return None
        try:
            return float(self.reward_truncated)
        except ValueError as error:
            raise CompanionError(
                f"reward_truncated is {self.reward_truncated!r}", "use score, none or a number"
            ) from error


@dataclass
class PolicyArguments(LoadArguments):
    """Which policy, and whether to train all of it."""

    _argument_group_name = "policy"


@dataclass
class PromptArguments(SourceArguments):
    """Which prompts to train on, and which to hold out."""

    monitor_prompts: int = setting(
        128, "Held-out prompts that are looked at during training, to stop by."
    )
    test_prompts: int = setting(
        256, "Further held-out prompts, for the figures at the end of the run."
    )
