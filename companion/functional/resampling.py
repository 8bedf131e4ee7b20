"""Resampling: intervals for figures that were measured once.

Arrays may be torch tensors (any device, any float dtype), NumPy arrays or lists; the arithmetic is
NumPy float64. Chapter 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

from companion.errors import DataError, ShapeError

if TYPE_CHECKING:
    import torch

Array: TypeAlias = npt.NDArray[np.float64]
# (a string: this file is read where torch is not, by the monitor)
Values: TypeAlias = "torch.Tensor | npt.NDArray[Any] | Sequence[float]"


class Interval(NamedTuple):
    """Two ends of an interval."""

    low: float
    high: float


def _as_float64(values: Any) -> Array:
    """As NumPy; a tensor is known by ``detach``, so that nobody pays for torch who has none."""
    if hasattr(values, "detach"):  # (first to the CPU: some devices have no float64)
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def vector(name: str, values: Values) -> Array:
    """Return a non-empty 1-d float64 array without NaN, or raise an error that says the place."""
    array = _as_float64(values)
    if array.ndim != 1:
        raise ShapeError(f"{name} must be one-dimensional, not of shape {list(array.shape)}")
    if array.size == 0:
        raise ShapeError(f"{name} is empty")
    if np.isnan(array).any():
        raise DataError(
            f"{name} holds NaN, first at position {int(np.isnan(array).argmax())}",
            "leave out the rows that could not be scored, and count them",
        )
    return array


def middle(values: Array, level: float) -> Interval:
    """Return the quantiles that hold the middle `level` of the values."""
    if not 0 < level < 1:
        raise DataError(f"level is {level}; it must lie inside (0, 1)")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _codes(groups: Sequence[Any] | npt.NDArray[Any] | None, size: int) -> npt.NDArray[np.intp]:
    """The groups of `size` items as numbers from 0; each item its own if there are none."""
    if groups is None:
        return np.arange(size)
    if len(groups) != size:
        raise ShapeError(f"{size} values but {len(groups)} groups")
    return np.unique(np.asarray([str(item) for item in groups]), return_inverse=True)[1]


def resamples(
    size: int,
    groups: Sequence[Any] | npt.NDArray[Any] | None = None,
    n_resamples: int = 500,
    seed: int = 0,
) -> Iterator[npt.NDArray[np.intp]]:
    """Places of the items of each resample of the bootstrap: whole groups are drawn.

    Parameters
    ----------
    size : int
        Number of items.
    groups : sequence ``[size]``, optional
        The group (prompt) of each item; each item its own if absent.
    n_resamples, seed
        How many, the same each time.

    Yields
    ------
    ndarray of int
        As many groups as there are, some of them several times, each with all of its items.
    """
    group = _codes(groups, size)
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    random = np.random.default_rng(seed)
    for _ in range(n_resamples):
        drawn = random.integers(0, len(members), len(members))
        yield np.concatenate([members[g] for g in drawn])


def bootstrap_interval(
    values: Values | npt.NDArray[Any],
    groups: Sequence[Any] | npt.NDArray[Any] | None = None,
    *,
    statistic: Callable[[npt.NDArray[Any]], float] | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the bootstrap, resampling whole groups.

    Pairs of one prompt stand or fall together: taken as independent they make the interval too
    narrow. With groups the prompts are drawn, each with all of its pairs.

    Parameters
    ----------
    values : array ``[n]`` (``[n, ...]`` with a statistic)
        One value per item.
    groups : sequence ``[n]``, optional
        The group (prompt) of each item; each item its own if absent.
    statistic : callable, optional
        From the drawn values to a number; the mean if absent (fast).
    level, n_resamples, seed
        The interval is the same each time. If all groups are alike it has no width, which says
        that the bootstrap has nothing to go by, not that the figure is certain.

    Raises
    ------
    DataError, ShapeError
        If a value is NaN, or the lengths differ.
    """
    if statistic is None or np.ndim(values) == 1:
        array: npt.NDArray[Any] = vector("values", values)
    else:
        array = np.asarray(values)
    size = len(array)
    group = _codes(groups, size)
    n_groups = int(group.max()) + 1
    results = np.empty(n_resamples)
    if statistic is None:
        random = np.random.default_rng(seed)
        sums, counts = np.bincount(group, weights=array), np.bincount(group)
        chunk = max(1, 2_000_000 // n_groups)
        for begin in range(0, n_resamples, chunk):
            stop = min(begin + chunk, n_resamples)
            drawn = random.integers(0, n_groups, (stop - begin, n_groups))
            results[begin:stop] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    else:
        for number, places in enumerate(resamples(size, groups, n_resamples, seed)):
            results[number] = statistic(array[places])
    return middle(results, level)


def accuracy_interval(
    correct: Array, groups: Sequence[Any] | npt.NDArray[Any] | None, seed: int = 0
) -> Interval:
    """95% interval of a share: bootstrap over prompts, or Wilson's where all items are alike.

    The bootstrap has nothing to go by if nothing is wrong, and would answer [1, 1].

    Parameters
    ----------
    correct : array ``[n]``
        1 or 0.
    groups : sequence ``[n]``, optional
        Prompt of each item.
    """
    if correct.min() == correct.max():
        n = correct.size if groups is None else len(set(groups))
        low, high = stats.binomtest(round(n * correct[0]), n).proportion_ci(method="wilson")
        return Interval(float(low), float(high))
    return bootstrap_interval(correct, groups, seed=seed)


def bootstrap_runs(
    values: Values | npt.NDArray[Any],
    *,
    statistic: Callable[[npt.NDArray[Any]], float] | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of the bootstrap over runs and items, for runs that were measured on the same items.

    A method is its runs: with other seeds its figures are others. An interval over the items alone
    says what would be seen with other items *in these runs*. Here the runs are drawn, and the
    items, the same ones for all drawn runs (the 'pigeonhole bootstrap' of Owen, Annals of Applied
    Statistics 1, 2007, which is on the safe side). To compare two methods, give the differences of
    what they share. Methods are ranked with five runs each or more.

    Parameters
    ----------
    values : array ``[runs, items]`` (``[runs, items, ...]`` with a statistic)
        One value for each run and item; NaN where it is missing.
    statistic : callable, optional
        From the drawn values, of the same shape, to a number; the mean of what is there if absent.
    level, n_resamples, seed
        The interval is the same each time. Plain percentiles of few runs lie too close together,
        so wider ones are taken: the 'expanded percentiles' of Hesterberg (2015, arXiv 1411.5279),
        with the degrees of freedom of Satterthwaite (1946), which are those of the
        runs where the runs differ most, and of the items where the items do.

    Raises
    ------
    DataError, ShapeError
        If there are fewer than two runs or items, or a run or an item has no value at all.
    """
    array = _as_float64(values)
    if array.ndim < 2 or (statistic is None and array.ndim > 2):
        raise ShapeError(f"values must be [runs, items], not of shape {list(array.shape)}")
    runs, items = array.shape[:2]
    if runs < 2 or items < 2:
        raise DataError(
            f"{runs} runs on {items} items: at least two of each are needed",
            "bootstrap_interval takes items of one run",
        )
    if statistic is None:
        there = np.isfinite(array)
        if not (there.any(0).all() and there.any(1).all()):
            raise DataError("a run or an item has no value at all", "leave it out, and count it")
    random = np.random.default_rng(seed)

    def resample(n: int, of_runs: bool, of_items: bool) -> Array:
        """``[n]`` statistics; what is not drawn stays whole."""
        chosen_runs, chosen_items = (
            random.integers(0, size, (n, size)) if drawn else np.tile(np.arange(size), (n, 1))
            for size, drawn in ((runs, of_runs), (items, of_items))
        )
        if statistic is not None:
            pairs = zip(chosen_runs, chosen_items, strict=True)
            return np.array([statistic(array[r][:, i]) for r, i in pairs])
        # the mean needs only how often each was drawn
        weights = [
            np.stack([np.bincount(row, minlength=size) for row in chosen]).astype(np.float64)
            for chosen, size in ((chosen_runs, runs), (chosen_items, items))
        ]
        total, count = (
            ((weights[0] @ part) * weights[1]).sum(1)
            for part in (np.where(there, array, 0.0), there.astype(np.float64))
        )
        return np.asarray(total / count)

    few = max(200, n_resamples // 5)
    parts = [float(np.var(resample(few, *which))) for which in ((True, False), (False, True))]
    scale = sum(part**2 / (size - 1) for part, size in zip(parts, (runs, items), strict=True))
    freedom = min(max(sum(parts) ** 2 / scale, runs - 1), items - 1) if scale else items - 1
    wider = math.sqrt((freedom + 1) / freedom) * stats.t.ppf((1 + level) / 2, freedom)
    # (of two or three runs it is the whole range)
    inner = min(1 - 2 * float(stats.norm.sf(wider)), math.nextafter(1, 0))
    return middle(resample(n_resamples, True, True), inner)
