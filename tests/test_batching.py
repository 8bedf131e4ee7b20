"""Batches: every index once, within the budget, with little padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from companion.engine import pad_batch, token_budget_batches
from companion.errors import DataError


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of the padded tokens that is padding, 0 to 1."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1.0 - sum(lengths[i] for batch in batches for i in batch) / padded


@given(
    st.lists(st.integers(1, 60), max_size=60),
    st.integers(1, 200),
    st.one_of(st.none(), st.integers(1, 7)),
)
def test_batches_cover_each_index_once_within_the_budget(
    lengths: list[int], max_tokens: int, max_rows: int | None
) -> None:
    batches = token_budget_batches(lengths, max_tokens, max_rows)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= max_tokens or len(batch) == 1
        assert max_rows is None or len(batch) <= max_rows
    # sorted: no text of a later batch is longer than one of an earlier batch
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)


def test_sorting_saves_the_padding() -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(500), 1.0, 5000), 1, 8192).astype(int).tolist()
    arrival = [list(range(i, min(i + 32, 5000))) for i in range(0, 5000, 32)]
    assert padding_share(lengths, arrival) > 0.6
    assert padding_share(lengths, token_budget_batches(lengths, 16_384)) < 0.05


@pytest.mark.parametrize("bad", [([3], 0, None), ([3], 5, 0), ([3, 0], 5, None)])
def test_bad_budgets_and_lengths(bad: tuple[list[int], int, int | None]) -> None:
    with pytest.raises(DataError):
        token_budget_batches(*bad)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=9), min_size=1, max_size=6))
def test_padding_hides_nothing(rows: list[list[int]]) -> None:
    for side in ("right", "left"):
        batch = pad_batch(rows, 0, side, pad_to_multiple_of=4)
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].shape[1] % 4 == 0
        for row, ids in enumerate(rows):
            mask = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][mask].tolist() == ids
            assert (batch["input_ids"][row][~mask] == 0).all()
            assert bool(mask[0 if side == "right" else -1])


def test_padding_exactly() -> None:
    batch = pad_batch([[5, 6], [7]], 9, "left")
    assert batch["input_ids"].tolist() == [[5, 6], [9, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert batch["input_ids"].dtype == torch.int64


def test_padding_refuses_empty_input() -> None:
    with pytest.raises(DataError, match="no sequence"):
        pad_batch([], 0)
    with pytest.raises(DataError, match="sequence 1 is empty"):
        pad_batch([[1], []], 0)
    with pytest.raises(DataError, match="side"):
        pad_batch([[1]], 0, "both")  # type: ignore[arg-type]
