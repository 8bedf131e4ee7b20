"""Segments that attend together: each once, the same attention, no more padding than pays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from companion.engine import attention as packing, pack, plan_trees
from companion.engine.grouping import attention_groups, group_places

ROW = st.builds(
    lambda root, rest: [7, 7, 8, 8, 7][:root] + rest,
    st.integers(0, 5),
    st.lists(st.integers(7, 8), min_size=1, max_size=6),
)
ROWS = st.lists(ROW, min_size=1, max_size=12)
WINDOW = st.one_of(st.none(), st.integers(1, 6))


@given(ROWS, st.sampled_from([0.0, 5.0, 40.0, 1e9]))
def test_every_segment_stands_in_one_group(ids: list[list[int]], cost: float) -> None:
    items = pack(ids, plan_trees(ids, min_shared=1)).segments.items
    groups = group_places(items, cost)
    assert sorted(i for members in groups for i in members) == list(range(len(items)))
    padded = 0
    for members in groups:
        held = [items[i] for i in members]
        assert len({item.prefix > 0 for item in held}) == 1
        queries = max(item.length for item in held)
        keys = max(item.prefix + item.length for item in held)
        needed = sum(item.length * (item.prefix + item.length) for item in held)
        padded += len(held) * queries * keys - needed
    assert padded <= cost * (len(items) - len(groups))


def test_a_dear_call_takes_all_and_a_free_one_takes_its_like_alone() -> None:
    ids = [[7] * n for n in (3, 3, 9)]
    items = pack(ids, plan_trees(ids, min_shared=99)).segments.items
    assert group_places(items, 0.0) == [[0, 1], [2]]
    assert group_places(items, 1e9) == [[0, 1, 2]]


@given(ROWS, WINDOW, st.sampled_from([4.0, 1e9]))
def test_attention_and_its_gradient_are_those_segment_by_segment(
    ids: list[list[int]], window: int | None, cost: float
) -> None:
    segments = pack(ids, plan_trees(ids, min_shared=1)).segments
    generator = torch.Generator().manual_seed(len(ids))
    found, grads = [], []
    start = [
        torch.randn(1, heads, segments.total, 4, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    ]
    weight = torch.randn(1, segments.total, 4, 4, generator=generator, dtype=torch.float64)
    for price in (cost, None):
        inputs = [x.clone().requires_grad_() for x in start]
        with pytest.MonkeyPatch.context() as patch:
            if price is None:
                patch.setattr(packing, "attention_groups", lambda *_: None)
            else:
                patch.setitem(packing._CALL_COST, "cpu", price * 16)
            out = packing._by_segment(*inputs, segments, None, window)
        (out * weight).sum().backward()
        found.append(out.detach())
        grads.append([x.grad for x in inputs])
    torch.testing.assert_close(found[0], found[1])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b)


def test_groups_are_made_once_for_all_layers() -> None:
    ids = [[7] * 3] * 4
    segments = pack(ids, plan_trees(ids, min_shared=99)).segments
    assert attention_groups(segments, 1e9) is attention_groups(segments, 1e9)
    assert attention_groups(segments, 1e9) is not attention_groups(segments, 1e9, 2)
    assert attention_groups(pack(ids[:1], plan_trees(ids[:1])).segments, 1e9) is None
