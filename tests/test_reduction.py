"""Aggregation over tokens, and exact means over any split."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st

from companion.errors import DataError, ShapeError
from companion.functional import (
    SumCount,
    aggregate,
    all_reduce_metrics,
    mean_of_means,
    weighted_mean_of_means,
)

P = [0.9, 0.8, 0.95, 0.6]


def test_the_worked_example() -> None:
    # a prompt of three tokens, masked, in front of the four
    values = torch.tensor([[0.1, 0.2, 0.3, *P]], dtype=torch.float64)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    assert aggregate(values, mask, "mean").item() == pytest.approx(0.8125, abs=1e-12)
    assert aggregate(values, mask, "min").item() == 0.6
    product = 0.9 * 0.8 * 0.95 * 0.6
    assert aggregate(values, mask, "product").item() == pytest.approx(product, abs=1e-12)
    assert aggregate(values, mask, "log_product").item() == pytest.approx(math.log(product))
    assert aggregate(values, mask, "last").item() == 0.6
    # wrong: the prompt left unmasked
    for how in ("mean", "min", "product"):
        open_mask = torch.ones_like(mask)
        assert aggregate(values, open_mask, how) != aggregate(values, mask, how)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 4), st.integers(0, 4))
def test_order_and_padding(values: list[float], before: int, after: int) -> None:
    row = torch.tensor([[0.3] * before + values + [float("nan")] * after], dtype=torch.float64)
    mask = torch.tensor([[0] * before + [1] * len(values) + [0] * after])
    product = aggregate(row, mask, "product").item()
    least = aggregate(row, mask, "min").item()
    mean = aggregate(row, mask, "mean").item()
    assert product <= least + 1e-12 <= mean + 2e-12
    assert mean <= max(values) + 1e-12
    assert product == pytest.approx(math.prod(values), abs=1e-12)
    assert least == min(values)
    assert aggregate(row, mask, "last").item() == values[-1]


def test_a_long_product_keeps_its_logarithm() -> None:
    values = torch.full((2, 5000), 0.9)
    values[1] = 0.8
    mask = torch.ones(2, 5000, dtype=torch.bool)
    assert aggregate(values, mask, "product").tolist() == [0.0, 0.0]
    logs = aggregate(values, mask, "log_product")
    assert logs[0].item() == pytest.approx(5000 * math.log(0.9), rel=1e-5)
    assert logs[0] > logs[1]


def test_aggregate_refuses() -> None:
    ones = torch.ones(1, 2)
    with pytest.raises(DataError, match="row 0"):
        aggregate(ones, torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(DataError, match="sigmoid"):
        aggregate(ones * 3, ones.bool())
    with pytest.raises(DataError, match="median"):
        aggregate(ones, ones.bool(), "median")  # type: ignore[arg-type]
    with pytest.raises(ShapeError):
        aggregate(ones, torch.ones(2, dtype=torch.bool))


def test_gradient_of_aggregates() -> None:
    values = torch.rand(3, 4, dtype=torch.float64) * 0.8 + 0.1
    values.requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 1]])
    for how in ("mean", "min", "product", "log_product", "last"):
        assert torch.autograd.gradcheck(lambda v, h=how: aggregate(v, mask, h), (values,))


# --- means of shards --------------------------------------------------------------------------


def shards(sizes: list[int], seed: int = 0) -> tuple[list[float], float]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(sizes), generator=generator, dtype=torch.float64).sort().values
    return [float(part.mean()) for part in values.split(sizes)], float(values.mean())


def test_uneven_shards() -> None:
    means, true = shards([140, 70, 90])
    assert abs(weighted_mean_of_means(means, [140, 70, 90]) - true) < 1e-12
    assert abs(mean_of_means(means) - true) > 1e-2
    means, true = shards([100, 100, 100])
    assert abs(mean_of_means(means) - true) < 1e-12


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(0, 99))
def test_any_split_gives_the_same_mean(sizes: list[int], seed: int) -> None:
    means, true = shards(sizes, seed)  # the mean of an empty shard is NaN
    assert weighted_mean_of_means(means, sizes) == pytest.approx(true, abs=1e-12)


def test_five_pairs_in_batches_of_four() -> None:
    correct = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])  # 0.5 and 1.0: averaged 0.75 (trl #7010)
    total = SumCount()
    for batch in correct.split(4):
        total.add(batch)
    assert total.mean == pytest.approx(0.6)
    assert mean_of_means([0.5, 1.0]) == 0.75


def test_shards_refuse() -> None:
    with pytest.raises(ShapeError):
        weighted_mean_of_means([1.0], [1, 2])
    with pytest.raises(ShapeError):
        weighted_mean_of_means([1.0], [0])
    with pytest.raises(DataError):
        weighted_mean_of_means([1.0, 2.0], [2, -1])
    with pytest.raises(ShapeError):
        mean_of_means([])


def test_sum_count() -> None:
    total = SumCount().add(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([True, False, True]))
    assert (total.sum, total.count, total.mean) == (4.0, 2, 2.0)
    assert total.merge(SumCount(6.0, 1)).mean == pytest.approx(10 / 3)
    assert math.isnan(SumCount().mean)
    assert total.all_reduce().count == 3  # no process group: unchanged
    with pytest.raises(ShapeError):
        total.add(torch.zeros(2), torch.ones(3, dtype=torch.bool))
    half = SumCount().add(torch.full((4096,), 0.1, dtype=torch.bfloat16))
    assert half.mean == pytest.approx(float(torch.tensor(0.1, dtype=torch.bfloat16)), abs=1e-12)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    # rank 0 saw four pairs, rank 1 one; and met its metrics in another order
    metrics = {
        "accuracy": SumCount().add(torch.tensor([1.0, 1.0, 0.0, 0.0] if rank == 0 else [1.0])),
        "only_zero": SumCount().add(torch.ones(2)) if rank == 0 else SumCount(),
    }
    if rank:
        metrics = dict(reversed(metrics.items()))
    means = all_reduce_metrics(metrics)
    torch.save((means, metrics["accuracy"].count), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_agree_on_the_mean_over_all_items(tmp_path: Path) -> None:
    mp.start_processes(_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        means, count = torch.load(tmp_path / f"{rank}.pt")
        assert means == {"accuracy": pytest.approx(0.6), "only_zero": 1.0}
        assert count == 5
