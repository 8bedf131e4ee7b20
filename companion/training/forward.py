"""The forward of a model while it trains: read out by the mask, head in fp32 (Chapter 2), rows
packed so that a pair's prompt is computed once (Chapter 6)."""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from companion.models.forward import reward_scores
from companion.models.packed import packed_scores


def forward_scores(
    self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> SequenceClassifierOutputWithPast:
    """A model's ``forward`` while it trains: read out by the mask, head in fp32.

    It has to be the model's own ``forward``, since DDP, FSDP, DeepSpeed and peft do their work
    around that. Extra arguments that peft passes on (``labels=None`` and the like) are ignored.
    """
    scores = reward_scores(self, input_ids, attention_mask, check=False)
    return SequenceClassifierOutputWithPast(logits=scores[:, None])


def forward_packed_scores(
    self: Any, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any
) -> SequenceClassifierOutputWithPast:
    """As :func:`forward_scores`, of the rows without their right padding, shared prompts once."""
    rows = zip(input_ids.tolist(), attention_mask.sum(dim=1).tolist(), strict=True)
    scores = packed_scores(self, [ids[:length] for ids, length in rows])
    return SequenceClassifierOutputWithPast(logits=scores[:, None])


def install_forward(model: Any, *, packed: bool = False) -> None:
    """Give the model (below a LoRA wrapper) one of the two forwards above."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = forward_packed_scores if packed else forward_scores
    inner.forward = types.MethodType(forward, inner)


def remove_forward(model: Any) -> None:
    """Give the model its stock ``forward`` back, free of what accelerate put round it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for part in (model, inner):
        for name in ("forward", "_original_forward"):
            part.__dict__.pop(name, None)
