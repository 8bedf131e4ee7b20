"""A stand-in for the varlen kernel of CUDA, so that the path of CUDA runs on a CPU.

It checks what FlashAttention-2 checks of its input, and aligns queries and keys at their last. For
the tests and for ``python -m benchmarks.probe --device cpu``; what it takes of time says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def varlen_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    *longest: int,
    **options: Any,
) -> Tensor:
    """``varlen_attn`` by its documentation: causal, aligned at the last query and key.

    With what FlashAttention checks of its input, but for the dtype.
    """
    assert query.dtype == key.dtype == value.dtype
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    assert query_offsets[-1] == len(query)
    assert key_offsets[-1] == len(key) == len(value)
    assert min(*query_offsets.diff(), *key_offsets.diff()) > 0
    assert longest == (query_offsets.diff().max(), key_offsets.diff().max())
    assert all(x.dim() == 3 and x.stride(-1) == 1 for x in (query, key, value))
    assert query.shape[2] % 8 == 0
    assert query.shape[2] <= 256
    assert options["window_size"][1] == 0
    left = options["window_size"][0]
    if key.shape[1] != query.shape[1]:
        assert options["enable_gqa"]
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    parts = []
    for s in range(len(query_offsets) - 1):
        q = query[query_offsets[s] : query_offsets[s + 1]].transpose(0, 1).float()
        k, v = (
            x[key_offsets[s] : key_offsets[s + 1]].transpose(0, 1).float() for x in (key, value)
        )
        last = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        at = torch.arange(k.shape[1])
        seen = (at <= last) & ((at >= last - left) if left >= 0 else torch.tensor(True))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=options["scale"]
            ).transpose(0, 1)
        )
    return torch.cat(parts).to(query.dtype)


def take_cudas_path(patch: Callable[[Any, str, Any], Any]) -> list[torch.dtype]:
    """Let packed attention take the path of CUDA on this CPU.

    Parameters
    ----------
    patch : callable
        ``patch(module, name, value)`` sets an attribute until whoever gave it sets it back, such as
        ``monkeypatch.setattr``.

    Returns
    -------
    list of torch.dtype
        Grows by the dtype of each call of the kernel.
    """
    seen: list[torch.dtype] = []

    def kernel(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Tensor:
        seen.append(query.dtype)
        return varlen_on_cpu(query, key, value, *rest, **options)

    patch(import_module("torch.nn.attention.varlen"), "varlen_attn", kernel)
    attention, last_layer = (
        import_module(f"companion.engine.{name}") for name in ("attention", "last_layer")
    )
    for module in (attention, last_layer):
        patch(module, "fits_varlen", lambda query: True)
    patch(attention, "_half_is_slow", lambda device: False)
    return seen
