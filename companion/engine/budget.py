"""How many tokens a GPU's free memory holds in one forward without gradient. Chapter 2."""

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


def _widths(config: Any) -> tuple[int, int, int, int]:
    """Of the residual stream, of queries and of keys (all heads), and of the MLP."""
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or hidden // heads)
    grouped = int(getattr(text, "num_key_value_heads", None) or heads)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    return hidden, width * heads, width * grouped, inner
