"""How many tokens a GPU's free memory holds, in one forward or with a cache. Chapters 2 and 5."""

from __future__ import annotations

from typing import Any

#: A batch below this leaves a GPU idle; one above the other is no faster.
_LEAST, _MOST = 1024, 65_536
#: Share of the free memory to plan with: the allocator's blocks are never all filled.
_SHARE = 0.6


def cuda_token_budget(free_bytes: int, config: Any, bytes_per_value: int) -> int:
    """Tokens of a batch that fit into free memory, for a forward that keeps no activations.

    Without a gradient, what one layer holds at its widest point decides: the residual stream and
    its norm, queries, keys and values with their gathered copies, or the three products of the MLP.

    Parameters
    ----------
    free_bytes : int
        As ``torch.cuda.mem_get_info`` says it, the allocator's own free blocks included.
    config : transformers.PretrainedConfig
        Of the model.
    bytes_per_value : int
        4 for float32, 2 for half precision.

    Returns
    -------
    int
        A multiple of 256 between 1,024 and 65,536. Too large a figure is no harm: the scorer
        halves its budget where the memory ends.
    """
    hidden, queries, _, inner = _widths(config)
    # float32 copies of the residual stream are made by the norms whatever the dtype
    per_token = bytes_per_value * (2 * hidden + max(8 * queries, 3 * inner)) + 4 * 2 * hidden
    tokens = int(free_bytes * _SHARE) // per_token // 256 * 256
    return min(max(tokens, _LEAST), _MOST)


def keys_a_token(config: Any) -> int:
    """Keys and values that attention may gather for each token of a budget.

    Where a prefix is shared, each branch has a copy of its keys. So many fit into what
    :func:`cuda_token_budget` sets aside for the widest point of a layer.
    """
    _, queries, keys, inner = _widths(config)
    return max(1, (max(8 * queries, 3 * inner) - 2 * queries - 2 * keys) // (2 * keys))


#: Bytes that a step of sampling holds for each entry of the vocabulary, rounded up: the model's
#: logits, generate's float32 copy and their log-softmax (12), and beside them the sorting of top-p,
#: in which values and places stand twice (24), or what it leaves and two float64 tensors (20).
_STEP_BYTES = 40
#: Bytes of float32 copies that a log-probability holds for each entry, beside the model's logits.
_LOGPROB_BYTES = 8


def kv_cache_bytes(config: Any, bytes_per_value: int) -> int:
    """Bytes that one token takes up in the cache of keys and values, all layers together.

    Layers that keep a window take less, and are counted whole.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the model.
    bytes_per_value : int
        4 for float32, 2 for half precision.
    """
    layers = int(config.get_text_config().num_hidden_layers)
    return layers * 2 * _widths(config)[2] * bytes_per_value


def generation_budget(
    free_bytes: int, config: Any, bytes_per_value: int, longest: int
) -> tuple[int, int]:
    """Tokens of a batch of transformers' ``generate`` that fit into free memory.

    The cache is there once: it grows by ``torch.cat``, and a prompt's part of it is repeated for
    its completions, a layer at a time, so that the old and the new keys of one layer are alive
    together. The blocks that are too small for the grown ones are given back by the allocator
    before it reports the end of the memory. Beside it stands what one layer computes for the
    prompts, with a mask that keeps SDPA from grouped heads (it repeats keys and values), and for
    each row the logits of a step. Chapter 5.

    Parameters
    ----------
    free_bytes, config, bytes_per_value
        As in :func:`cuda_token_budget`.
    longest : int
        Tokens of the longest row, those that are to be generated included.

    Returns
    -------
    tokens : int
        Budget for rows × (longest row + ``row``), between 1,024 and 65,536.
    row : int
        What a row costs beside its tokens, in tokens: the logits of a step.
    """
    text = config.get_text_config()
    # bool, turned into the dtype of the queries, and copied once more to be aligned
    mask = longest * (1 + 2 * bytes_per_value)
    per_token = (
        kv_cache_bytes(config, bytes_per_value) + _layer_bytes(config, bytes_per_value) + mask
    )
    row = -(-int(text.vocab_size) * _STEP_BYTES // per_token)
    return min(max(int(free_bytes * _SHARE) // per_token, _LEAST), _MOST), row


def logprob_budget(free_bytes: int, config: Any, bytes_per_value: int) -> int:
    """Padded tokens of a batch of log-probabilities that fit into free memory. Chapter 5.

    The logits decide: all of a batch in the model's dtype, and two float32 copies of one row's,
    which may be all there is.

    Parameters
    ----------
    free_bytes, config, bytes_per_value
        As in :func:`cuda_token_budget`.

    Returns
    -------
    int
        Between 1,024 and 65,536.
    """
    text = config.get_text_config()
    logits = int(text.vocab_size) * (bytes_per_value + _LOGPROB_BYTES)
    per_token = logits + _layer_bytes(config, bytes_per_value)
    return min(max(int(free_bytes * _SHARE) // per_token, _LEAST), _MOST)


def _widths(config: Any) -> tuple[int, int, int, int]:
    """Of the residual stream, of queries and of keys (all heads), and of the MLP."""
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    heads = int(getattr(text, "num_attention_heads", None) or 1)  # Mamba has none
    width = int(getattr(text, "head_dim", None) or hidden // heads)
    grouped = int(getattr(text, "num_key_value_heads", None) or heads)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    return hidden, width * heads, width * grouped, inner


def _layer_bytes(config: Any, bytes_per_value: int) -> int:
    """Bytes a token that transformers' own forward holds in one layer, at its widest."""
    hidden, queries, keys, inner = _widths(config)
    # queries, attended values, and keys and values as they are and repeated for all heads
    attention = 4 * queries + 2 * keys
    return bytes_per_value * (2 * hidden + max(attention, 3 * inner)) + 4 * 2 * hidden
