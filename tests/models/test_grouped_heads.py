"""Attention of grouped heads on CUDA stays clear of PyTorch's 'math' kernel; by stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from companion import load_base
from companion.engine import (
    forward,
    pack,
    packed_scores,
    pad_batch,
    plan_trees,
    reward_scores,
    sdpa,
)

CUDA = torch.device("cuda")


def on_cuda(dtype: torch.dtype) -> Any:
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=CUDA)


@pytest.mark.parametrize(
    ("capability", "dtype", "autocast", "masked", "fused"),
    [
        ((8, 0), torch.bfloat16, None, False, True),
        ((9, 0), torch.float16, None, False, True),
        ((9, 0), torch.float32, torch.bfloat16, False, True),
        ((9, 0), torch.float32, None, False, False),
        ((9, 0), torch.bfloat16, None, True, False),  # FlashAttention takes no mask
        ((7, 5), torch.float16, None, False, False),  # nor is there one on a T4
    ],
)
def test_where_a_fused_kernel_knows_grouped_heads(
    capability: Any,
    dtype: Any,
    autocast: Any,
    masked: bool,
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: autocast is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: autocast)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    mask = torch.ones(1) if masked else None
    assert sdpa.takes_grouped_heads(on_cuda(dtype), mask) is fused


@pytest.fixture
def grouped(make_causal: Any, tiny_tokenizer: Any, tmp_path: Any) -> Any:
    folder = make_causal("qwen3", tiny_tokenizer, tmp_path, num_key_value_heads=1)
    return load_base(folder).model.eval()


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Of each call of attention: whether heads differed in number, and whether that was said."""
    seen: list[tuple[bool, bool]] = []
    attention: Callable[..., torch.Tensor] = F.scaled_dot_product_attention

    def spy(query: Any, key: Any, value: Any, **options: Any) -> torch.Tensor:
        seen.append((query.shape[1] != key.shape[1], bool(options.get("enable_gqa"))))
        return attention(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("way", ["packed", "padded", "padded left"])
def test_heads_are_repeated_where_no_kernel_knows_them(
    way: str, grouped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [[1, *range(20, 32), 40, 2], [1, *range(20, 32), 41, 42, 2], [1, 9, 10, 2]]

    def scores() -> torch.Tensor:
        with torch.no_grad():
            if way == "packed":
                return packed_scores(grouped, pack(ids, plan_trees(ids)))
            side = "left" if way == "padded left" else "right"
            return reward_scores(grouped, **pad_batch(ids, grouped.config.pad_token_id, side))

    seen = spied(monkeypatch)
    want = scores()
    assert way == "padded left" or (True, True) in seen  # as on a CPU
    seen.clear()
    repeated = sdpa.repeated_heads
    monkeypatch.setattr(sdpa, "takes_grouped_heads", lambda query, mask=None: False)
    monkeypatch.setattr(forward, "repeated_heads", lambda model, _: repeated(model, CUDA))
    found = scores()
    assert set(seen) == {(False, False)}
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    assert grouped.config._attn_implementation == "sdpa"


def test_checkpointing_keeps_the_attention_that_its_second_forward_will_have(grouped: Any) -> None:
    grouped.train().activation_checkpointing_enable()
    with sdpa.repeated_heads(grouped, CUDA):
        assert grouped.config._attn_implementation == "sdpa"
    with torch.no_grad(), sdpa.repeated_heads(grouped, CUDA):
        assert grouped.config._attn_implementation == sdpa.REPEATED
    assert grouped.config._attn_implementation == "sdpa"
