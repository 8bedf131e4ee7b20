"""What outcome and process training share: a head for every token, and the forward that reads it.

Chapter 3.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import TokenClassifierOutput

from companion.batching.packing import PackedBatch
from companion.errors import CompanionError
from companion.models.forward import packed_token_logits, token_logits
from companion.models.guards import prepare_token_head
from companion.models.loading import load_base
from companion.models.reward_model import RewardModel
from companion.training.config import PairwiseRewardConfig
from companion.training.exact import forward_inputs
from companion.training.exact_trainer import ExactTrainer
from companion.training.kwise import refuse_offloading


@dataclass
class TokenRewardConfig(PairwiseRewardConfig):
    """Settings of a token-level run: those of a pairwise run without what belongs to pairs.

    ``center_rewards_coefficient`` and ``label_smoothing_factor`` are refused: a probability is not
    shifted, and soft labels belong into the data. Chapter 3.
    """

    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Not for this kind of training: leave it out."}
    )
    as_chat: bool = field(
        default=True,
        metadata={
            "help": "Write a prompt and completion of text as a user's question and the "
            "assistant's answer; false: one behind the other, as they are."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("center_rewards_coefficient", "label_smoothing_factor"):
            if getattr(self, name):
                raise CompanionError(
                    f"{name} is set, but it belongs to training on pairs", "leave it out"
                )
        refuse_offloading(self)


def forward_tokens(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    packed: PackedBatch | None = None,
    **kwargs: Any,
) -> TokenClassifierOutput:
    """A model's ``forward`` while it trains: logits of every token, head in fp32, no dropout.

    ``[B, T, labels]`` of a padded batch, ``[1, T, labels]`` of a packed one.

    It has to be the model's own ``forward``, as in :mod:`companion.training.forward`.
    """
    if packed is not None:
        return TokenClassifierOutput(logits=packed_token_logits(self, packed)[None])
    return TokenClassifierOutput(logits=token_logits(self, input_ids, attention_mask, check=False))


def text_logits(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Logits ``[B, T, labels]`` of a batch, padded or packed; beyond a text they mean nothing."""
    logits: Tensor = model(**forward_inputs(inputs)).logits
    if "packed" in inputs:
        return logits[0][inputs["packed"].text_places().to(logits.device)]
    return logits


class TokenTrainer(ExactTrainer):
    """Base of the outcome and the process trainer. Chapter 3."""

    args: TokenRewardConfig
    items: ClassVar[str] = "texts"
    # Where long texts are mostly wrong, a step of one length has its own share of right ones. In
    # the stock order, from long to short over and over (transformers #20810), the model follows
    # that share: an outcome model on 2,150 solutions of GSM8K ended at a training loss of 0.731
    # nats, at 0.681 with the steps shuffled, at 0.675 with rows at random. Pairs have none.
    _shuffle_steps = True

    @property
    def labels(self) -> int:
        """Outputs of the head."""
        return 1

    def load_base(self, name: str) -> RewardModel:
        """A base with a fresh head for every token."""
        return load_base(
            name,
            labels=self.labels,
            head_seed=self.args.seed,
            max_length=self.args.max_length,
            overlong=self.args.overlong,  # type: ignore[arg-type]
            trust_remote_code=self.args.trust_remote_code,
        )

    def prepare_model(self, model: Any) -> None:
        """Check the head, put it in fp32, take its dropout off."""
        prepare_token_head(model, self.labels)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.forward = types.MethodType(forward_tokens, inner)

    def padding_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One real token."""
        return {"input_ids": [int(row["input_ids"][-1])]}

    def _row_lengths(self, dataset: Any) -> list[int]:
        return [len(ids) for ids in dataset["input_ids"]]
