"""The plan and the layout: each row once, what is shared once, and every key where it belongs."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from companion.engine import (
    Segment,
    Segments,
    Tree,
    cuda_token_budget,
    pack,
    plan_batches,
    plan_trees,
    shared_length,
)
from companion.engine.budget import keys_a_token
from companion.errors import DataError

# few token ids and a few roots: prefixes are shared at every depth, rows repeat
ROW = st.builds(
    lambda root, rest: [7, 7, 8, 8, 7][:root] + rest,
    st.integers(0, 5),
    st.lists(st.integers(7, 8), min_size=1, max_size=6),
)
ROWS = st.lists(ROW, min_size=1, max_size=16)
SHARED = st.integers(1, 4)


def texts_of(batch: Any) -> dict[int, list[int]]:
    """Each row's token ids, read back from the layout."""
    tokens = batch.input_ids[0].tolist()
    found = {}
    for row, end in zip(batch.rows, batch.readout.tolist(), strict=True):
        (item,) = [s for s in batch.segments.items if s.start <= end < s.start + s.length]
        assert end == item.start + item.length - 1
        prefix = tokens[item.prefix_start : item.prefix_start + item.prefix]
        found[row] = prefix + tokens[item.start : item.start + item.length]
    return found


@given(ROWS, SHARED, st.integers(1, 30), st.one_of(st.none(), st.integers(1, 4)))
def test_batches_hold_every_row_once_within_the_budget(
    ids: list[list[int]], min_shared: int, budget: int, max_rows: int | None
) -> None:
    batches = plan_batches(ids, budget, max_rows, min_shared=min_shared)
    assert sorted(r for b in batches for t in b for r in t.rows) == list(range(len(ids)))
    for trees in batches:
        rows = [r for tree in trees for r in tree.rows]
        batch = pack(ids, trees)
        assert batch.computed == sum(tree.size for tree in trees)
        assert batch.computed <= budget or len(rows) == 1
        assert max_rows is None or len(rows) <= max_rows
        assert texts_of(batch) == {r: ids[r] for r in rows}
        for row, places in zip(batch.rows, batch.text_places(), strict=True):
            text = batch.input_ids[0, places].tolist()
            assert text[: len(ids[row])] == ids[row]
            assert set(places[len(ids[row]) :].tolist()) <= {int(places[len(ids[row]) - 1])}
        assert batch.needed == sum(len(ids[r]) for r in rows)


@given(ROWS, SHARED)
def test_positions_go_on_from_the_prefix(ids: list[list[int]], min_shared: int) -> None:
    batch = pack(ids, plan_trees(ids, min_shared=min_shared))
    assert batch.rows == tuple(range(len(ids)))
    end = 0
    for item in batch.segments.items:
        assert item.start == end
        end += item.length
        positions = batch.position_ids[0, item.start : end].tolist()
        assert positions == list(range(item.prefix, item.prefix + item.length))
    assert end == batch.computed == batch.segments.total
    ends = batch.position_ids[0, batch.readout].tolist()
    assert ends == [len(item) - 1 for item in ids]


@given(ROWS, SHARED)
def test_trees_save_at_least_what_plain_rules_save(ids: list[list[int]], min_shared: int) -> None:
    """The rules: cut the sorted rows wherever neighbours share less than some length."""
    trees = plan_trees(ids, min_shared=min_shared)
    assert sorted(r for t in trees for r in t.rows) == list(range(len(ids)))
    assert all(t.shared >= min_shared or (t.shared == 0 and len(t.rows) == 1) for t in trees)
    saved = sum(map(len, ids)) - sum(t.size for t in trees)
    rows = sorted(ids)
    near = [shared_length(a, b) for a, b in itertools.pairwise(rows)]
    for least in range(min_shared, 12):
        groups: list[list[int]] = [[]]
        for value in near:
            groups[-1].append(value) if value >= least else groups.append([])
        assert saved >= sum(len(g) * min(g) for g in groups if g)


def test_clusters_within_clusters() -> None:
    """A system prompt for all, prompts within it: each row joins where that saves most."""
    system = list(range(100, 110))
    first, second = [*range(200, 230)], [*range(300, 302)]
    ids = [[*system, *first, i, 2] for i in range(3)]
    ids += [[*system, *second, i, 2] for i in range(2)] + [[*system, 400, 2]]
    trees = sorted(plan_trees(ids), key=lambda t: t.rows)
    assert [(t.rows, t.shared) for t in trees] == [((0, 1, 2), 40), ((3, 4, 5), 10)]


def test_prompts_are_found_among_rows_in_any_order() -> None:
    generator = random.Random(0)
    prompts = [[1, 5, *(generator.randrange(10, 99) for _ in range(20))] for _ in range(6)]
    ids = [p + [generator.randrange(10, 99) for _ in range(5)] for p in prompts for _ in range(4)]
    order = generator.sample(range(24), 24)
    trees = plan_trees([ids[i] for i in order])
    groups = sorted(tuple(sorted(order[r] for r in tree.rows)) for tree in trees)
    assert groups == [tuple(range(i, i + 4)) for i in range(0, 24, 4)]
    assert all(tree.shared >= 22 for tree in trees)


def test_a_tree_above_the_budget_is_cut_and_a_bos_is_not_shared() -> None:
    prompt = list(range(10, 30))
    trees = plan_trees([[*prompt, 100 + i, 2] for i in range(9)], max_tokens=26)
    assert [len(t.rows) for t in trees] == [3, 3, 3]
    assert all((t.shared, t.size) == (20, 26) for t in trees)
    assert [t.shared for t in plan_trees([[1, 5, 2], [1, 6, 2]])] == [0, 0]


@given(ROWS, SHARED, st.integers(1, 60))
def test_keys_of_a_batch_are_within_their_budget(
    ids: list[list[int]], min_shared: int, budget: int
) -> None:
    """A branch's keys are its prefix and itself: copies, of which there can be many."""
    batches = plan_batches(ids, 10_000, min_shared=min_shared, max_keys=budget)
    rows = sorted(row for trees in batches for tree in trees for row in tree.rows)
    assert rows == list(range(len(ids)))
    for trees in batches:
        packed = pack(ids, trees)
        keys = sum(item.prefix + item.length for item in packed.segments.items)
        assert keys == sum(tree.keys for tree in trees)
        assert keys <= budget or len(packed.rows) == 1
    with pytest.raises(DataError, match="max_keys=0"):
        plan_trees(ids, max_keys=0)


def test_a_tree_may_stay_whole_above_the_budget() -> None:
    prompt = list(range(10, 30))
    ids = [[*prompt, 100 + i, 2] for i in range(9)] + [[1, 2, 3]] * 2
    batches = plan_batches(ids, 26, tree_tokens=38)
    assert [[len(t.rows) for t in trees] for trees in batches] == [[9], [1, 1]]
    assert [len(trees[0].rows) for trees in plan_batches(ids, 26, tree_tokens=37)] == [8, 1, 1]
    with pytest.raises(DataError, match="max_tokens=0"):
        plan_batches(ids, 0, tree_tokens=37)


def test_each_branch_keeps_a_token() -> None:
    assert shared_length([1, 2, 3], [1, 2, 3]) == 2
    assert shared_length([1, 2], [1, 2, 3]) == 1
    assert shared_length([1], [1, 2]) == 0
    assert shared_length([1, 2, 3], [4, 2, 3]) == 0
    (tree,) = plan_trees([[1, 2, 3]] * 3, min_shared=1)
    assert (tree.shared, tree.size) == (2, 5)


def test_bad_input() -> None:
    with pytest.raises(DataError, match="row 1 has no token"):
        plan_trees([[1], []])
    for bad in ({"max_tokens": 0}, {"min_shared": 0}):
        with pytest.raises(DataError, match="positive"):
            plan_trees([[1]], **bad)
    with pytest.raises(DataError, match="max_rows"):
        plan_batches([[1]], 5, 0)
    with pytest.raises(DataError, match="nothing to pack"):
        pack([], [])
    with pytest.raises(DataError, match="row 1 does not begin"):
        pack([[1, 2, 3], [1, 9, 3]], [Tree((0, 1), 2, 4)])


# ---------------------------------------------------------------------- who sees whom


def truth(batch: Any, window: int | None) -> torch.Tensor:
    """``[T, T]``: which tokens each token sees, from the meaning of a tree alone."""
    size = batch.computed
    seen = torch.zeros(size, size, dtype=torch.bool)
    position = batch.position_ids[0]
    for item in batch.segments.items:
        trunk = range(item.prefix_start, item.prefix_start + item.prefix)
        for query in range(item.start, item.start + item.length):
            for key in (*trunk, *range(item.start, query + 1)):
                seen[query, key] = window is None or position[query] - position[key] < window
    return seen


@given(ROWS, SHARED, st.one_of(st.none(), st.integers(1, 6)))
def test_masks_of_the_segments(ids: list[list[int]], min_shared: int, window: int | None) -> None:
    batch = pack(ids, plan_trees(ids, min_shared=min_shared))
    found = torch.zeros(batch.computed, batch.computed, dtype=torch.bool)
    for item in batch.segments.items:
        mask = batch.segments.mask(item, window, torch.device("cpu"))
        if mask is None:
            assert item.prefix == 0
            mask = torch.ones(item.length, item.length, dtype=torch.bool).tril()
        own = range(item.start, item.start + item.length)
        keys = [*range(item.prefix_start, item.prefix_start + item.prefix), *own]
        for query, row in zip(own, mask, strict=True):
            found[query, keys] = row
    assert torch.equal(found, truth(batch, window))


@given(ROWS, SHARED, st.one_of(st.none(), st.integers(1, 6)))
def test_offsets_and_gather_of_the_varlen_kernel(
    ids: list[list[int]], min_shared: int, window: int | None
) -> None:
    """The kernel runs on CUDA alone: here its rule is applied by hand.

    Causal attention of unequal lengths is aligned at the last query and key: query ``i`` of ``q``
    sees keys up to ``i + k - q``, and at most ``left`` before that (``window_size=(left, 0)``).
    """
    batch = pack(ids, plan_trees(ids, min_shared=min_shared))
    index = batch.segments.varlen_index()
    shared = any(item.prefix for item in batch.segments.items)
    assert (index.gather is not None) is shared  # else nothing is copied
    gather = index.gather if shared else torch.arange(batch.computed)
    found = torch.zeros(batch.computed, batch.computed, dtype=torch.bool)
    sizes = []
    for s in range(len(batch.segments.items)):
        queries = range(int(index.query_offsets[s]), int(index.query_offsets[s + 1]))
        keys = gather[index.key_offsets[s] : index.key_offsets[s + 1]]
        sizes.append((len(queries), len(keys)))
        for i, query in enumerate(queries):
            last = i + len(keys) - len(queries)
            first = 0 if window is None else max(0, last - (window - 1))
            found[query, keys[first : last + 1]] = True
    assert torch.equal(found, truth(batch, window))
    assert (index.max_query, index.max_key) == tuple(map(max, zip(*sizes, strict=True)))
    assert index.query_offsets.dtype == index.key_offsets.dtype == torch.int32
    assert batch.segments.varlen_index() is index  # made once for all layers


def test_masks_are_made_once_for_all_layers() -> None:
    segments = Segments((Segment(0, 3, 0, 0), Segment(3, 2, 0, 3)))
    cpu = torch.device("cpu")
    mask = segments.mask(segments.items[1], None, cpu)
    assert mask is segments.mask(segments.items[1], 99, cpu)
    assert mask is not segments.mask(segments.items[1], 2, cpu)


# ---------------------------------------------------------------------- the budget on a GPU


@pytest.mark.parametrize(
    ("shape", "keys"),
    [
        ((1024, 3072, 16, 8, 128), 5),  # Qwen3-0.6B
        ((4096, 14336, 32, 8, 128), 16),  # Llama-3-8B
        ((768, 3072, 12, 12, 64), 4),  # GPT-2
    ],
)
def test_keys_for_each_token_of_the_budget(shape: tuple[int, ...], keys: int) -> None:
    """Gathered keys and values beside queries and outputs, within the widest point of a layer."""
    hidden, inner, heads, grouped, width = shape
    text = SimpleNamespace(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=grouped,
        head_dim=width,
    )
    config = SimpleNamespace(get_text_config=lambda: text)
    assert keys_a_token(config) == keys
    widest = max(8 * heads * width, 3 * inner)
    used = 2 * heads * width + 2 * grouped * width * (1 + keys)
    assert used <= widest < used + 2 * grouped * width


def test_the_budget_follows_memory_and_shape() -> None:
    def config(hidden: int, inner: int) -> Any:
        text = SimpleNamespace(
            hidden_size=hidden, num_attention_heads=hidden // 64, intermediate_size=inner
        )
        return SimpleNamespace(get_text_config=lambda: text)

    small, large = config(1024, 3072), config(4096, 14336)
    gib = 1 << 30
    budgets = [cuda_token_budget(free * gib, large, 2) for free in (1, 4, 8, 1000)]
    assert budgets == sorted(budgets)
    assert budgets[0] < budgets[1] < budgets[2]
    assert all(b % 256 == 0 for b in budgets)
    assert cuda_token_budget(2 * gib, small, 2) > cuda_token_budget(2 * gib, large, 2)
    assert cuda_token_budget(2 * gib, large, 2) > cuda_token_budget(2 * gib, large, 4)
    assert cuda_token_budget(0, large, 2) == 1024
    assert budgets[-1] == 65_536
