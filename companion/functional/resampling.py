"""Resampling: intervals for figures that were measured once.

Arrays may be torch tensors (any device, any float dtype), NumPy arrays or lists; the arithmetic is
NumPy float64. Chapter 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from companion.errors import DataError, ShapeError

Array: TypeAlias = npt.NDArray[np.float64]
Values: TypeAlias = torch.Tensor | npt.NDArray[Any] | Sequence[float]


class Interval(NamedTuple):
    """Two ends of an interval."""

    low: float
    high: float


def vector(name: str, values: Values) -> Array:
    """Return a non-empty 1-d float64 array without NaN, or raise an error that says the place."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
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
    if groups is None:
        group = np.arange(size)
    else:
        if len(groups) != size:
            raise ShapeError(f"{size} values but {len(groups)} groups")
        group = np.unique(np.asarray([str(item) for item in groups]), return_inverse=True)[1]
    n_groups = int(group.max()) + 1
    random = np.random.default_rng(seed)
    results = np.empty(n_resamples)
    if statistic is None:
        sums, counts = np.bincount(group, weights=array), np.bincount(group)
        chunk = max(1, 2_000_000 // n_groups)
        for begin in range(0, n_resamples, chunk):
            stop = min(begin + chunk, n_resamples)
            drawn = random.integers(0, n_groups, (stop - begin, n_groups))
            results[begin:stop] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    else:
        members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
        for number in range(n_resamples):
            drawn = random.integers(0, n_groups, n_groups)
            results[number] = statistic(array[np.concatenate([members[g] for g in drawn])])
    return middle(results, level)
