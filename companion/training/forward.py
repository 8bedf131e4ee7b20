"""The forwards of a model while it trains: read out by the mask, or at every token; head in fp32.

Each has to be the model's own ``forward``, since DDP, FSDP, DeepSpeed and peft do their work around
that. Extra arguments that peft passes on (``labels=None`` and the like) are ignored. Chapter 2.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput

from companion.engine.attention import restore_attention
from companion.engine.forward import packed_scores, packed_token_logits, reward_scores, token_logits
from companion.engine.packing import PackedBatch


def forward_scores(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    packed: PackedBatch | None = None,
    **kwargs: Any,
) -> SequenceClassifierOutputWithPast:
    """One score a text, read out by the mask, head in fp32.

    Parameters
    ----------
    input_ids, attention_mask : Tensor
        ``[B, T]``, of a padded batch.
    packed : PackedBatch, optional
        In place of a padded batch; `input_ids` is then its ``[1, T]``.

    Returns
    -------
    SequenceClassifierOutputWithPast
        Its ``logits`` are ``[B, 1]``, of a packed batch ``[N, 1]`` in the order of its rows.
    """
    if packed is not None:
        scores = packed_scores(self, packed)
    else:
        scores = reward_scores(self, input_ids, attention_mask, check=False)
    return SequenceClassifierOutputWithPast(logits=scores[:, None])


def forward_tokens(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    packed: PackedBatch | None = None,
    **kwargs: Any,
) -> TokenClassifierOutput:
    """Logits of every token, head in fp32, no dropout.

    ``[B, T, labels]`` of a padded batch, ``[1, T, labels]`` of a packed one.
    """
    if packed is not None:
        return TokenClassifierOutput(logits=packed_token_logits(self, packed)[None])
    return TokenClassifierOutput(logits=token_logits(self, input_ids, attention_mask, check=False))


def install_forward(model: Any, forward: Callable[..., Any] = forward_scores) -> None:
    """Give the model (below a LoRA wrapper) one of the forwards of this module."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.forward = types.MethodType(forward, inner)


def remove_forward(model: Any) -> None:
    """Give the model its stock ``forward`` and attention back, free of accelerate's wrappers."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    restore_attention(inner)
    for part in (model, inner):
        for name in ("forward", "_original_forward"):
            part.__dict__.pop(name, None)
