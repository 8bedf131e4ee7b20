"""The same numbers on a GPU as on a CPU. Run with ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from companion import (
    RewardScorer,
    bradley_terry_loss,
    last_token_readout,
    load_reward_model,
    outcome_loss,
    plackett_luce_loss,
    process_loss,
)
from companion.engine import pack, packed_attention, plan_trees, reward_scores
from companion.engine.last_layer import LastLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maths_agrees_with_the_cpu(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(16, 5, dtype=dtype, generator=generator) * 10
    logits = torch.randn(4, 7, 3, dtype=dtype, generator=generator)
    classes = torch.randint(0, 3, (4, 7), generator=generator)
    mask = torch.ones(16, 5, dtype=torch.long)
    mask[::3, 3:] = 0
    for function, arguments in (
        (bradley_terry_loss, (scores[:, 0], scores[:, 1])),
        (plackett_luce_loss, (scores, mask.bool())),
        (process_loss, (logits, classes)),
        (outcome_loss, (logits[..., 0], (classes > 1).long())),
        (last_token_readout, (scores, mask)),
    ):
        here = function(*arguments)
        there = function(*(a.cuda() for a in arguments))
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), here)


def test_scores_agree_with_the_cpu(tiny_reward, tiny_texts):
    here, there = (
        RewardScorer.from_pretrained(tiny_reward, device=d, dtype="float32")
        for d in ("cpu", "cuda")
    )
    assert there.device.type == "cuda"
    assert np.abs(here.score(tiny_texts).raw - there.score(tiny_texts).raw).max() < 1e-4


def test_the_head_stays_in_float32_under_bf16_autocast(tiny_reward, tiny_texts):
    loaded = load_reward_model(tiny_reward, device="cuda")
    ids = torch.tensor([loaded.tokenizer(tiny_texts[0])["input_ids"]]).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        scores = reward_scores(loaded.model, ids, torch.ones_like(ids))
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("window", [None, 7])
def test_the_varlen_kernel_is_attention_segment_by_segment(window):
    ids = [[*range(20), *range(50 + k, 60 + 3 * k)] for k in range(4)] + [[99] * 33]
    segments = pack(ids, plan_trees(ids)).segments
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, segments.total, 32, device="cuda", generator=generator)
        for heads in (4, 2, 2)
    )
    options = {"packed_segments": segments, "sliding_window": window}
    want, _ = packed_attention(torch.nn.Identity(), query, key, value, None, **options)
    halves = (x.bfloat16() for x in (query, key, value))
    found, _ = packed_attention(torch.nn.Identity(), *halves, None, **options)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), want, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("window", [None, 7])
def test_the_last_layer_by_the_varlen_kernel(window):
    ids = [[*range(20), *range(50 + k, 60 + 3 * k)] for k in range(4)] + [[99] * 33]
    batch = pack(ids, plan_trees(ids))
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, batch.computed, 32, device="cuda", generator=generator)
        for heads in (4, 2, 2)
    )
    places = batch.readout.cuda()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.to(dtype) for x in (query, key, value))
        read = (x[:, :, places] for x in (q, k, v))
        wanted = LastLayer(batch.segments, places, key=k, value=v)
        options = {"packed_segments": wanted, "sliding_window": window}
        found.append(packed_attention(torch.nn.Identity(), *read, None, **options)[0])
    whole, _ = packed_attention(
        *(torch.nn.Identity(), query, key, value, None),
        packed_segments=batch.segments,
        sliding_window=window,
    )
    torch.testing.assert_close(found[0], whole[:, places])
    torch.testing.assert_close(found[1].float(), found[0], atol=3e-2, rtol=3e-2)
