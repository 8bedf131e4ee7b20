"""Scores of packed rows: no padding, a shared prompt once, every score as if alone (Chapter 6).

The rows of a :class:`companion.models.trees.Layout` go through the backbone as one long row. All
but attention works token by token and needs the right positions only. Attention is replaced,
through transformers' own interface for attention functions, by one in which a token of a branch
sees the tree's prefix and its own branch and nothing else.

On a CPU that is a loop of scaled dot-product attention over views; on a GPU in half precision
PyTorch's variable-length kernel (``torch.nn.attention.varlen``), with keys and values gathered by
one index. In float32 on a GPU the loop serves too, since the kernel knows half precision only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from companion.errors import ModelError
from companion.models.forward import apply_head
from companion.models.head import find_head
from companion.models.trees import Layout, Tree, lay_out, shared_prefix_trees

NAME: Final = "companion_packed"

#: Architectures for which the tests show that packed scores and gradients equal those of single
#: texts. Others take the padded way.
PROVED: Final = ("gemma", "gpt2", "llama", "mistral", "qwen2", "qwen3")

Segments = Sequence[tuple[int, Sequence[int]]]

# The attention function is chosen by a field of the model's configuration, which all threads share.
_LOCK = threading.RLock()


def packing_obstacle(model: Any) -> str | None:
    """Why the rows of a model cannot be packed, or None if they can.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        In the mode (training or not) in which it will be used.

    Returns
    -------
    str or None
        One clause, such as ``"its attention scores are soft-capped"``.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config()
    if config.model_type not in PROVED:
        return f"packing is not proved for the architecture {config.model_type!r}"
    if not getattr(inner, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of the kind {', '.join(sorted(kinds))}"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention scores are soft-capped"
    if getattr(config, "use_bidirectional_attention", False) or (
        getattr(config, "is_causal", True) is False
    ):
        return "its tokens see those behind them"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        return "its positions depend on the longest text of a batch"
    if model.training:
        if getattr(inner, "is_activation_checkpointing", False):
            return "gradient checkpointing computes its layers again, out of reach of packing"
        rates = [part.p for part in inner.modules() if isinstance(part, nn.Dropout)]
        if any(rate > 0 for rate in [*rates, getattr(config, "attention_dropout", 0.0)]):
            return "dropout would give the branches of a prompt one draw"
    return None


def packed_scores(
    model: Any, sequences: Sequence[Sequence[int]], trees: Sequence[Tree] | None = None
) -> Tensor:
    """Score token ids without padding; gradients flow.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        One for which :func:`packing_obstacle` gives None.
    sequences : sequence of sequences of int
        Token ids of ``B`` texts, none of them empty.
    trees : sequence of Tree, optional
        Which rows share a prefix; found if not given. Rows that no tree names are not scored.

    Returns
    -------
    Tensor
        ``[B]`` in float32 (float64 for a float64 model), in the order of `sequences`; with `trees`
        in the order in which these name the rows.
    """
    found = shared_prefix_trees(sequences) if trees is None else trees
    layout = lay_out(sequences, found)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = find_head(inner)
    scores = apply_head(head, packed_hidden(inner, layout))
    if trees is not None:
        return scores
    order = torch.tensor([row for tree in found for row in tree.rows], device=scores.device)
    return torch.zeros_like(scores).index_copy(0, order, scores)


def packed_hidden(inner: Any, layout: Layout) -> Tensor:
    """Last hidden states ``[B, D]`` at the last token of each row of a layout."""
    backbone = getattr(inner, inner.base_model_prefix)
    device = backbone.get_input_embeddings().weight.device
    # A mask of four dimensions is handed through as it is. This one is for the case that another
    # attention function than ours is called in spite of all: it makes every score NaN, which is
    # refused, where a missing mask would mix the texts without a word.
    poison = torch.full((1, 1, 1, 1), float("nan"), device=device, dtype=backbone.dtype)
    with _attention(inner):
        output = backbone(
            input_ids=layout.input_ids.to(device),
            position_ids=layout.position_ids.to(device),
            attention_mask=poison,
            use_cache=False,
            segments=layout.segments,
        )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden.index_select(0, layout.last.to(device))


@contextmanager
def _attention(inner: Any) -> Iterator[None]:
    config = inner.config.get_text_config()
    with _LOCK:
        before = config._attn_implementation
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = before


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention in which each branch sees its prefix and itself.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    query, key, value : Tensor
        ``[1, H, P, D]``; key and value may have fewer heads.
    attention_mask : Tensor
        Not used.
    segments : sequence of (int, sequence of int)
        As in :class:`companion.models.trees.Layout`.
    scaling, dropout, sliding_window
        As transformers hands them over.

    Returns
    -------
    tuple
        ``[1, P, H, D]`` and None.

    Raises
    ------
    ModelError
        Without segments, for several rows, with dropout, or with an argument whose meaning is not
        known here (sinks and the like).
    """
    if segments is None or query.shape[0] != 1:
        raise ModelError(
            "packed attention was called without the segments of one packed row",
            "score through companion.models.packed_scores",
        )
    unknown = [name for name in ("softcap", "s_aux", "head_mask") if others.get(name) is not None]
    if unknown or dropout:
        raise ModelError(
            f"packed attention knows no {', '.join(unknown) or 'dropout'}", "use packing='off'"
        )
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        out = _varlen(query, key, value, segments, scaling, sliding_window)
    else:
        out = _loop(query, key, value, segments, scaling, sliding_window)
    return out, None


AttentionInterface.register(NAME, packed_attention)


def _loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One scaled dot-product attention for each branch. ``[1, P, H, D]``.

    The first branch follows its prefix in the row, so both are one causal text; every other branch
    has keys of the prefix put before its own.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    sizes: list[int] = []
    for prefix, branches in segments:
        sizes += [prefix + branches[0], *branches[1:]]
    # views of one split: slices one by one would each cost a whole tensor of zeros in the backward
    pieces = zip(*(part.split(sizes, dim=2) for part in (query, key, value)), strict=True)
    out: list[Tensor] = []
    for prefix, branches in segments:
        shared_key = shared_value = None
        for number in range(len(branches)):
            q, k, v = next(pieces)
            if number == 0:
                shared_key, shared_value = k[:, :, :prefix], v[:, :, :prefix]
            elif shared_key is not None and shared_value is not None:
                k, v = torch.cat([shared_key, k], 2), torch.cat([shared_value, v], 2)
            n_query, n_key = q.shape[2], k.shape[2]
            if n_query == n_key and (window is None or n_key <= window):
                out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
            else:
                mask = _mask(n_query, n_key, window, q.device)
                out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling))
    return torch.cat(out, dim=2).transpose(1, 2)


@lru_cache(maxsize=512)
def _mask(n_query: int, n_key: int, window: int | None, device: torch.device) -> Tensor:
    """``[n_query, n_key]`` bool: the last query sees all keys, or the last ``window`` of them."""
    with torch.inference_mode(False):
        mask = torch.ones(n_query, n_key, dtype=torch.bool, device=device)
        mask = mask.tril(n_key - n_query)
        if window is not None and n_key > window:
            mask = mask.triu(n_key - n_query - window + 1)
        return mask


def varlen_indices(segments: Segments) -> tuple[list[int], list[int], list[int]]:
    """Where queries and keys of each text lie, for a kernel of variable lengths.

    A prefix is a text of its own; a branch has its own queries, and the prefix's keys before its
    own.

    Returns
    -------
    tuple of lists of int
        Cumulative lengths of the queries and of the keys (each beginning with 0), and for each key
        its place in the packed row.
    """
    queries, keys, index = [0], [0], list[int]()
    start = 0
    for prefix, branches in segments:
        shared = range(start, start + prefix)
        start += prefix
        if prefix:
            queries.append(queries[-1] + prefix)
            keys.append(keys[-1] + prefix)
            index += shared
        for branch in branches:
            queries.append(queries[-1] + branch)
            keys.append(keys[-1] + prefix + branch)
            index += [*shared, *range(start, start + branch)]
            start += branch
    return queries, keys, index


@lru_cache(maxsize=8)
def _varlen_tensors(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, index = varlen_indices(segments)
    with torch.inference_mode(False):
        return (
            torch.tensor(queries, dtype=torch.int32, device=device),
            torch.tensor(keys, dtype=torch.int32, device=device),
            torch.tensor(index, dtype=torch.int64, device=device),
        )


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """PyTorch's kernel of variable lengths; its causal mask is aligned with the last key."""
    from torch.nn.attention.varlen import varlen_attn

    cu_queries, cu_keys, index = _varlen_tensors(tuple(segments), query.device)
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # [P, H, D]
    longest_query = max(max(prefix, *branches) for prefix, branches in segments)
    longest_key = max(prefix + max(branches) for prefix, branches in segments)
    out = varlen_attn(
        q.contiguous(),
        k.index_select(0, index),
        v.index_select(0, index),
        cu_queries,
        cu_keys,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]
