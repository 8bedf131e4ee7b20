"""PyTorch's attention for grouped heads, where its fused kernels take none. Chapter 2.

On CUDA only FlashAttention knows grouped heads (``enable_gqa``): half precision, from Ampere on, no
mask. Elsewhere PyTorch falls back to its 'math' kernel without a word, which holds the products of
all queries and keys (pytorch #139586 and #191085; transformers #46960 mended one case of it, wide
heads). Keys and values of repeated heads cost less by far.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from companion.engine.devices import has_flash
from companion.models.locking import lock_of

#: The name of transformers' ``sdpa`` with repeated heads.
REPEATED = "companion_sdpa"
HALF = (torch.bfloat16, torch.float16)


def compute_dtype(query: Tensor) -> torch.dtype:
    """What attention computes in: the autocast's dtype, if one is on."""
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return query.dtype


def takes_grouped_heads(query: Tensor, mask: Tensor | None = None) -> bool:
    """Whether a fused kernel attends with fewer key and value heads than queries."""
    if not query.is_cuda:  # the CPU's kernel does
        return True
    return mask is None and compute_dtype(query) in HALF and has_flash(query.device)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Causal attention, or that of a mask; heads may be grouped.

    Parameters
    ----------
    query, key, value : Tensor
        ``[B, H, Lq, D]`` and ``[B, H_kv, Lk, D]``.
    mask : Tensor or None
        Bool or additive, broadcast to ``[B, H, Lq, Lk]``; None for causal attention, Lq = Lk.
    scale : float, optional
        Default 1/sqrt(D).

    Returns
    -------
    Tensor
        ``[B, H, Lq, D]``.
    """
    grouped = query.shape[1] != key.shape[1]
    if grouped and not takes_grouped_heads(query, mask):
        key, value = repeat_heads(query, key, value)
        grouped = False
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=grouped,
    )


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as the queries have."""
    times = query.shape[1] // key.shape[1]
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


def sdpa_of_repeated_heads(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """transformers' ``sdpa``, given keys and values of all heads."""
    if not takes_grouped_heads(query, attention_mask):
        key, value = repeat_heads(query, key, value)
        # what transformers asks its module; without a number of groups it repeats nothing itself
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # type: ignore[assignment]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(REPEATED, sdpa_of_repeated_heads)
AttentionMaskInterface.register(REPEATED, sdpa_mask)


@contextlib.contextmanager
def repeated_heads(model: Any, device: torch.device) -> Iterator[None]:
    """Let a model's padded batches on CUDA stay clear of the 'math' kernel inside the block.

    Not while activation checkpointing will compute the forward again after the block: both forwards
    have to keep the same tensors.
    """
    again = torch.is_grad_enabled() and bool(model.is_activation_checkpointing)
    if device.type != "cuda" or again or model.config._attn_implementation != "sdpa":
        yield
        return
    with lock_of(model):
        model.set_attn_implementation(REPEATED)
        try:
            yield
        finally:
            model.set_attn_implementation("sdpa")
