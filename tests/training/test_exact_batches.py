"""Every pair once, the same number of batches on every rank, figures by sum and count."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, strategies as st
from torch.utils.data import BatchSampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from companion.errors import ReadoutError
from companion.training import PaddedSampler, PairCollator, PairwiseRewardTrainer
from companion.training.batches import PADDING, ItemTables, PaddedRows, epoch_order

SIZES = {
    "n": st.integers(1, 60),
    "batch": st.integers(1, 8),
    "ranks": st.integers(1, 5),
}


def shards(sampler: Any, batch: int, ranks: int) -> list[list[list[int]]]:
    """What accelerate deals to each rank."""
    return [
        list(BatchSamplerShard(BatchSampler(sampler, batch, False), ranks, rank))
        for rank in range(ranks)
    ]


@given(**SIZES)
def test_each_row_once_and_ranks_in_step(n: int, batch: int, ranks: int) -> None:
    sampler = PaddedSampler(epoch_order(n, "random", seed=3), n, batch_size=batch, ranks=ranks)
    dealt = shards(sampler, batch, ranks)
    rows = [i for rank in dealt for part in rank for i in part]
    assert sorted(i for i in rows if i != PADDING) == list(range(n))
    assert len({len(rank) for rank in dealt}) == 1
    assert len(sampler) == len(list(sampler))
    for step in zip(*dealt, strict=True):
        real = [sum(i != PADDING for i in part) for part in step]
        assert sum(real) > 0
        assert max(real) - min(real) <= 1
        assert {len(part) for part in step} == {batch}  # a plain gather needs equal shapes


@given(**SIZES)
def test_global_batches_do_not_depend_on_the_ranks(n: int, batch: int, ranks: int) -> None:
    order = epoch_order(n, "random", seed=0)

    def steps(batch: int, ranks: int) -> list[set[int]]:
        dealt = shards(PaddedSampler(order, n, batch_size=batch, ranks=ranks), batch, ranks)
        return [{i for part in step for i in part} - {PADDING} for step in zip(*dealt, strict=True)]

    assert steps(batch, ranks) == steps(batch * ranks, 1)


@given(**SIZES)
def test_drop_last_drops_the_short_round_only(n: int, batch: int, ranks: int) -> None:
    sampler = PaddedSampler(range_order(n), n, batch_size=batch, ranks=ranks, drop_last=True)
    assert list(sampler) == list(range(n // (batch * ranks) * batch * ranks))
    assert len(sampler) == len(list(sampler))


def range_order(n: int) -> Any:
    return epoch_order(n, "sequential", seed=0)


def test_accelerate_by_itself_repeats_rows() -> None:
    """The behaviour that the padded sampler is there for."""
    dealt = shards(SequentialSampler(range(9)), 4, 2)
    rows = sorted(i for rank in dealt for part in rank for i in part)
    assert len(rows) > 9
    assert rows.count(0) > 1


def test_order_depends_on_epoch_and_seed_alone() -> None:
    sampler = PaddedSampler(epoch_order(20, "random", seed=0), 20, batch_size=3)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sorted(sampler) == sorted(first)


@given(**SIZES, shuffle=st.booleans())
def test_grouped_by_length_each_row_once_by_seed_and_epoch(
    n: int, batch: int, ranks: int, shuffle: bool
) -> None:
    settings = {"lengths": [1 + (7 * i) % 13 for i in range(n)], "step": batch * ranks}

    def order(seed: int) -> Any:
        return epoch_order(n, "group_by_length", seed=seed, shuffle_steps=shuffle, **settings)

    sampler = PaddedSampler(order(3), n, batch_size=batch, ranks=ranks)
    dealt = shards(sampler, batch, ranks)
    rows = [i for rank in dealt for part in rank for i in part if i != PADDING]
    assert sorted(rows) == list(range(n))
    assert list(sampler) == list(sampler)
    assert order(3)(1) == order(4)(0)
    if n > max(10, 2 * batch * ranks):  # one step alone is sorted
        assert len({tuple(order(seed)(0)) for seed in range(6)}) > 1


def test_group_by_length_keeps_like_lengths_together() -> None:
    lengths = [1 + i % 10 for i in range(400)]
    order = list(epoch_order(400, "group_by_length", seed=0, lengths=lengths, step=8)(0))

    def spread(rows: list[int]) -> float:
        parts = [rows[i : i + 8] for i in range(0, 400, 8)]
        ranges = [max(lengths[i] for i in p) - min(lengths[i] for i in p) for p in parts]
        return sum(ranges) / len(ranges)

    assert spread(order) < 0.5 * spread(list(epoch_order(400, "random", seed=0)(0)))


@pytest.mark.parametrize("n_rows", [5, 8, 1000, 1003])
def test_the_steps_of_grouped_rows_come_at_random(n_rows: int) -> None:
    """The stock order runs from long to short over and over; the steps are the same, shuffled."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 500, (n_rows,), generator=generator).tolist()
    stock = list(
        LengthGroupedSampler(8, lengths=lengths, generator=torch.Generator().manual_seed(0))
    )
    settings = {"seed": 0, "lengths": lengths, "step": 8}
    assert list(epoch_order(n_rows, "group_by_length", **settings)(0)) == stock
    ours = list(epoch_order(n_rows, "group_by_length", **settings, shuffle_steps=True)(0))

    def steps(rows: list[int]) -> list[list[int]]:
        return [rows[begin : begin + 8] for begin in range(0, n_rows, 8)]

    assert sorted(steps(ours)) == sorted(steps(stock))
    assert steps(ours)[0] == steps(stock)[0]
    assert max(lengths) in [lengths[row] for row in steps(ours)[0]]
    assert steps(ours)[-1] == steps(stock)[-1] or n_rows % 8 == 0
    if n_rows < 1000:
        return

    def drift(rows: list[int]) -> float:
        means = [np.mean([lengths[row] for row in step]) for step in steps(rows)]
        return float(np.corrcoef(means[:-1], means[1:])[0, 1])

    assert drift(stock) > 0.6
    assert abs(drift(ours)) < 0.3


ROWS = [
    {"chosen_ids": [5, 6, 7], "rejected_ids": [8, 2], "margin": 0.5, "row": 4},
    {"chosen_ids": [9, 2], "rejected_ids": [3, 4, 6, 2], "margin": 1.5, "row": 7},
]


def test_collator_right_pads_and_marks_padding_pairs() -> None:
    rows = PaddedRows(ROWS, {"chosen_ids": [7], "rejected_ids": [7]})
    batch = PairCollator(pad_token_id=0)([rows[1], rows[PADDING]])
    assert batch["input_ids"].tolist() == [[9, 2, 0, 0], [7, 0, 0, 0], [3, 4, 6, 2], [7, 0, 0, 0]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [2, 1, 4, 1]
    assert batch["weight"].tolist() == [1.0, 0.0]
    assert batch["row"].tolist() == [7, -1]
    assert batch["margin"].tolist() == [1.5, 0.0]
    wide = PairCollator(0, pad_to_multiple_of=8)([rows[0]])
    assert wide["input_ids"].shape == (2, 8)


def test_collator_never_cuts(make_config: Any, tiny_tokenizer: Any) -> None:
    long = [{"chosen_ids": list(range(9, 30)) * 20, "rejected_ids": [9, 2]}]
    assert PairCollator(0)(long)["input_ids"].shape[1] == 420


def test_collator_refuses_rows_that_end_with_the_pad_id(
    make_config: Any, tiny_tokenizer: Any
) -> None:
    config = make_config("qwen3", tiny_tokenizer)
    pad = tiny_tokenizer.pad_token_id
    with pytest.raises(ReadoutError, match="last real token is the pad id"):
        PairCollator(pad, config=config)([{"chosen_ids": [9, pad], "rejected_ids": [9, 2]}])


def table(chosen: list[float], rejected: list[float], weight: list[float]) -> torch.Tensor:
    one = torch.ones(len(weight)).tolist()
    columns = [weight, weight, one, [4.0 * x for x in one], chosen, rejected, one]
    return torch.tensor(columns).T


def summarise(table: torch.Tensor) -> dict[str, float]:
    """As the trainer of pairs does it, which is not made for that."""
    return PairwiseRewardTrainer.summarise(object.__new__(PairwiseRewardTrainer), table)


def test_figures_are_those_of_all_pairs_and_leave_padding_out() -> None:
    metrics = ItemTables()
    metrics.add(table([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0] * 4))
    metrics.add(table([2.0, 99.0], [0.0, 0.0], [1.0, 0.0]))
    figures = summarise(metrics.pop())
    assert figures["accuracy"] == pytest.approx(3 / 5)  # the mean of batch means is 0.75
    assert figures["ties"] == pytest.approx(1 / 5)
    assert figures["margin"] == pytest.approx(3 / 5)
    assert (figures["min_reward"], figures["max_reward"]) == (0.0, 2.0)
    assert figures["num_pairs"] == 5
    assert figures["tokens"] == 20
    assert len(metrics.pop()) == 0


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_figures_do_not_depend_on_the_batches(cuts: list[int]) -> None:
    torch.manual_seed(1)
    whole = torch.randn(21, 7)
    whole[:, 0] = whole[:, 1] = (whole[:, 0] > -1).float()
    one, many = ItemTables(), ItemTables()
    one.add(whole)
    edges = [0, *sorted(cuts), 21]
    for begin, end in itertools.pairwise(edges):
        many.add(whole[begin:end])
    a, b = summarise(one.pop()), summarise(many.pop())
    assert a == pytest.approx(b)
