"""What outcome and process training share: a head for every token, and its logits by text.

Chapter 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Trainer

from companion.errors import CompanionError
from companion.training.batches import Collator, forward_inputs, text_lengths
from companion.training.config import NO_OFFLOADING, PairwiseRewardConfig, not_offered, setting
from companion.training.trainer import ExactTrainer


@dataclass
class TokenRewardConfig(PairwiseRewardConfig):
    """Settings of a token-level run: those of a pairwise run without what belongs to pairs.

    Chapter 3.
    """

    center_rewards_coefficient: float | None = not_offered(
        "it belongs to training on pairs: a probability is not shifted"
    )
    label_smoothing_factor: float = not_offered(
        "it belongs to training on pairs; soft labels belong into the data", default=0.0
    )
    activation_offloading: bool = not_offered(NO_OFFLOADING, default=False)
    as_chat: bool | None = setting(
        None, "Former name of --text: true is 'chat', false is 'plain'. Default: what --text says."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.as_chat is not None:
            text = "chat" if self.as_chat else "plain"
            if self.text not in ("auto", text):
                raise CompanionError(
                    f"as_chat is {self.as_chat} and text is {self.text!r}", "give text alone"
                )
            self.text = text


class TextCollator(Collator):
    """Rows of one text each."""

    def texts(self, examples: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """One a row."""
        return [list(e["input_ids"]) for e in examples]

    def width(self, batch: Mapping[str, Any]) -> int:
        """Columns of the labels: those of the padded batch; packed, tokens of the longest text."""
        return int(text_lengths(batch).max()) if self.packing else batch["input_ids"].shape[1]


def text_logits(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Logits ``[B, T, labels]`` of a batch, padded or packed; beyond a text they mean nothing."""
    logits: Tensor = model(**forward_inputs(inputs)).logits
    if "packed" in inputs:
        return logits[0][inputs["packed"].text_places().to(logits.device)]
    return logits


class TokenTrainer(ExactTrainer, Trainer):
    """Base of the outcome and the process trainer. Chapter 3."""

    args: TokenRewardConfig
    items = "texts"
    # Where long texts are mostly wrong, a step of one length has its own share of right ones. In
    # the stock order, from long to short over and over (transformers #20810), the model follows
    # that share: an outcome model on 2,150 solutions of GSM8K ended at a training loss of 0.731
    # nats, at 0.681 with the steps shuffled, at 0.675 with rows at random. Pairs have none.
    shuffle_steps = True

    def padding_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One real token."""
        return {"input_ids": [int(row["input_ids"][-1])]}
