"""The forward of a model while it trains: read out by the mask, head in fp32 (Chapter 2)."""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from companion.models.forward import reward_scores


def forward_scores(
    self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> SequenceClassifierOutputWithPast:
    """A model's ``forward`` while it trains: read out by the mask, head in fp32.

    It has to be the model's own ``forward``, since DDP, FSDP, DeepSpeed and peft do their work
    around that. Extra arguments that peft passes on (``labels=None`` and the like) are ignored.
    """
    scores = reward_scores(self, input_ids, attention_mask, check=False)
    return SequenceClassifierOutputWithPast(logits=scores[:, None])


def install_forward(model: Any) -> None:
    """Give the model (below a LoRA wrapper) :func:`forward_scores`."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.forward = types.MethodType(forward_scores, inner)


def remove_forward(model: Any) -> None:
    """Give the model its stock ``forward`` back, free of what accelerate put round it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for part in (model, inner):
        for name in ("forward", "_original_forward"):
            part.__dict__.pop(name, None)
