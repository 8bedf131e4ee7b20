"""The bootstrap over runs and items, against a two-level model whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from companion import CompanionError, bootstrap_interval
from companion.functional import bootstrap_runs


def two_level(
    rng: np.random.Generator, runs: int, items: int, by_run: float, by_item: float, rest: float
) -> np.ndarray:
    """``[runs, items]`` around 0: an effect of the run, one of the item, and what is left."""
    return (
        by_run * rng.normal(size=(runs, 1))
        + by_item * rng.normal(size=(1, items))
        + rest * rng.normal(size=(runs, items))
    )


def deviation(runs: int, items: int, by_run: float, by_item: float, rest: float) -> float:
    """The standard deviation of the mean in that model."""
    return float((by_run**2 / runs + by_item**2 / items + rest**2 / (runs * items)) ** 0.5)


@pytest.mark.parametrize(("by_run", "by_item"), [(0.5, 1.0), (1.0, 1.0), (0.1, 3.0)])
def test_with_many_runs_the_width_is_that_of_the_variance_of_the_mean(
    by_run: float, by_item: float
) -> None:
    rng = np.random.default_rng(0)
    widths = [
        np.diff(bootstrap_runs(two_level(rng, 60, 80, by_run, by_item, 0.5), n_resamples=1000))[0]
        for _ in range(20)
    ]
    want = 2 * 1.96 * deviation(60, 80, by_run, by_item, 0.5)
    assert np.mean(widths) == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize(("by_run", "by_item"), [(1.0, 0.5), (0.3, 2.0), (0.0, 2.0)])
def test_five_runs_are_covered_and_a_bootstrap_of_the_items_alone_is_not(
    by_run: float, by_item: float
) -> None:
    """Also where a run is like any other: then the items alone are right, and these no worse."""
    rng = np.random.default_rng(1)
    hits = np.zeros(2)
    n = 250
    for _ in range(n):
        values = two_level(rng, 5, 40, by_run, by_item, 0.7)
        both = bootstrap_runs(values, n_resamples=1000)
        only_items = bootstrap_interval(values.mean(0), n_resamples=1000)
        hits += [end.low <= 0 <= end.high for end in (both, only_items)]
    covered, too_little = hits / n
    print(f"by run {by_run}, by item {by_item}: {covered:.3f}, items alone {too_little:.3f}")
    assert covered > 0.9
    if by_run == 1.0:  # the wrong implementation
        assert too_little < 0.6


def test_plain_percentiles_of_five_runs_would_be_too_narrow() -> None:
    """What the wider percentiles are for."""
    rng = np.random.default_rng(2)
    hits = np.zeros(2)
    for _ in range(250):
        values = two_level(rng, 5, 40, 1.0, 0.1, 0.1)
        plain = bootstrap_interval(values.mean(1), n_resamples=1000)
        hits += [e.low <= 0 <= e.high for e in (bootstrap_runs(values, n_resamples=1000), plain)]
    wide, narrow = hits / 250
    print(f"{wide:.3f} against {narrow:.3f}")
    assert narrow < 0.88 < 0.9 < wide


def test_a_statistic_gives_what_the_mean_does_and_missing_values_are_left_out() -> None:
    rng = np.random.default_rng(3)
    values = two_level(rng, 5, 30, 1.0, 1.0, 1.0)
    fast, slow = bootstrap_runs(values), bootstrap_runs(values, statistic=np.mean)
    assert fast == pytest.approx(slow)
    assert bootstrap_runs(torch.tensor(values)) == fast
    values[2, 4] = np.nan
    assert bootstrap_runs(values) == pytest.approx(bootstrap_runs(values, statistic=np.nanmean))
    cube = np.stack([values, values + 1], axis=2)
    ends = bootstrap_runs(cube, statistic=lambda drawn: float(np.nanmean(drawn[..., 1])))
    assert ends == pytest.approx(np.add(bootstrap_runs(values), 1))


def test_of_two_runs_it_reaches_from_one_to_the_other() -> None:
    values = np.tile(np.array([[1.0], [3.0]]), (1, 6))
    assert bootstrap_runs(values) == (1.0, 3.0)


def test_alike_everywhere_there_is_no_width() -> None:
    assert bootstrap_runs(np.full((5, 7), 2.0)) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (np.zeros(4), r"\[runs, items\], not of shape \[4\]"),
        (np.zeros((2, 3, 4)), r"not of shape \[2, 3, 4\]"),
        (np.zeros((1, 4)), "1 runs on 4 items"),
        (np.array([[1.0, np.nan], [2.0, np.nan]]), "no value at all"),
    ],
)
def test_what_has_no_interval_over_runs(values: np.ndarray, word: str) -> None:
    with pytest.raises(CompanionError, match=word):
        bootstrap_runs(values)
