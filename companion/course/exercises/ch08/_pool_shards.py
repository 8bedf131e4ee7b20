"""Write the mean and the spread of all items from what each rank knows of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property, Unusable
from companion.course.exercises._tools import Attempt, a_kind, close

Array = np.ndarray[Any, np.dtype[np.float64]]
Case = tuple[Array, Array, Array]


def _shards(sizes: tuple[int, ...], seed: int, offset: float = 0.0, scale: float = 1.0) -> Any:
    """Items of shards that differ, and all items."""
    rng = np.random.default_rng(seed)
    own = [rng.normal(offset + scale * i, scale * (1 + i), n) for i, n in enumerate(sizes)]
    return own, np.concatenate(own)


def _known(own: list[Array]) -> Case:
    """What the ranks know: counts, means, standard deviations; NaN where a shard is empty."""
    return (
        np.array([len(x) for x in own]),
        np.array([x.mean() if len(x) else np.nan for x in own]),
        np.array([x.std() if len(x) else np.nan for x in own]),
    )


def _ask(attempt: Attempt, case: Case) -> tuple[float, float]:
    got = attempt(*case)
    if not isinstance(got, (tuple, list, np.ndarray)) or len(got) != 2:
        raise Unusable(f"the result: expected (mean, standard deviation), got {a_kind(got)}")
    return float(got[0]), float(got[1])


def _mean(attempt: Attempt) -> None:
    for seed, sizes in enumerate(((140, 70, 90), (5, 1), (3, 40, 7, 11))):
        own, whole = _shards(sizes, seed)
        close(_ask(attempt, _known(own))[0], whole.mean(), f"shards of {sizes}: the mean")


def _spread(attempt: Attempt) -> None:
    for seed, sizes in enumerate(((140, 70, 90), (50, 50), (3, 40, 7, 11))):
        own, whole = _shards(sizes, seed)
        close(_ask(attempt, _known(own))[1], whole.std(), f"shards of {sizes}: the spread")


def _single(attempt: Attempt) -> None:
    own = [np.array([1.0]), np.array([4.0]), np.array([4.0])]
    close(_ask(attempt, _known(own)), (3.0, np.sqrt(2.0)), "shards of one item: 1, 4 and 4")


def _empty(attempt: Attempt) -> None:
    own, whole = _shards((6, 0, 9), 5)
    close(_ask(attempt, _known(own)), (whole.mean(), whole.std()),
          "shards of 6, 0 and 9 items, so that the second has a mean of NaN")  # fmt: skip


def _far(attempt: Attempt) -> None:
    own, whole = _shards((30, 20), 6, offset=1e7, scale=1e-2)
    close(_ask(attempt, _known(own))[1], whole.std(),
          "shards of 30 and 20 items near ten million that differ by hundredths: the spread",
          rtol=1e-3)  # fmt: skip


def _core(
    counts: Array,
    means: Array,
    stds: Array,
    *,
    plain_mean: bool = False,
    between: bool = True,
    of_stds: bool = False,
    weighted: bool = True,
    sample: bool = False,
    empty: str = "left out",
    by_squares: bool = False,
) -> tuple[float, float]:
    n, m, s = (np.asarray(x, dtype=np.float64) for x in (counts, means, stds))
    if empty == "left out":
        n, m, s = (x[np.asarray(counts) > 0] for x in (n, m, s))
    elif empty == "zero":
        m, s = np.nan_to_num(m), np.nan_to_num(s)
        n = np.maximum(n, 1)
    share = n / n.sum()
    mean = float(m.mean() if plain_mean else (share * m).sum())
    weights = share if weighted else np.full(len(n), 1 / len(n))
    if of_stds:
        return mean, float((weights * s).sum())
    if by_squares:
        return mean, float(np.sqrt(max((weights * (s**2 + m**2)).sum() - mean**2, 0.0)))
    gap = (m - (share * m).sum()) ** 2 if between else 0.0
    variance = float((weights * (s**2 + gap)).sum())
    if sample:
        variance *= n.sum() / (n.sum() - 1)
    return mean, float(np.sqrt(variance))


def mean_of_means(counts: Array, means: Array, stds: Array) -> Any:
    return _core(counts, means, stds, plain_mean=True)


def within_only(counts: Array, means: Array, stds: Array) -> Any:
    return _core(counts, means, stds, between=False)


def mean_of_stds(counts: Array, means: Array, stds: Array) -> Any:
    return _core(counts, means, stds, of_stds=True)


def equal_variances(counts: Array, means: Array, stds: Array) -> Any:
    return _core(counts, means, stds, weighted=False)


def one_less(counts: Array, means: Array, stds: Array) -> Any:
    return _core(counts, means, stds, sample=True)


def nan_spreads(counts: Array, means: Array, stds: Array) -> Any:
    return _core(counts, means, stds, empty="kept")


def counted_empty(counts: Array, means: Array, stds: Array) -> Any:
    return _core(counts, means, stds, empty="zero")


def squares(counts: Array, means: Array, stds: Array) -> Any:
    return _core(counts, means, stds, by_squares=True)


def _probes() -> list[tuple[Any, ...]]:
    return [
        _known(_shards((4, 12), 8)[0]),
        _known(_shards((3, 0, 5), 9)[0]),
        _known(_shards((8, 3), 10, offset=1e7, scale=1e-2)[0]),
    ]


EXERCISE = Exercise(
    id="ch08.pool_shards",
    parameters=("counts", "means", "stds"),
    properties=(
        Property(
            "the mean is that of all items",
            "A shard counts by its items, not as one.",
            _mean,
        ),
        Property(
            "the spread is that of all items",
            "It is the root of the mean squared distance from the mean of *all* items.",
            _spread,
        ),
        Property(
            "shards of one item have a spread together",
            "Each has a standard deviation of 0, and they differ from one another.",
            _single,
        ),
        Property("an empty shard counts nowhere", "Its mean is NaN and its count 0.", _empty),
        Property(
            "large numbers with a small spread",
            "Subtract means from one another before you square.",
            _far,
        ),
    ),
    mutants=(
        Mutant(
            "The mean of the means is taken, so an item of a short shard counts for more.",
            mean_of_means,
            "trl #7010",
        ),
        Mutant(
            "The spread within the shards is taken for that of all. That the shards' means differ "
            "is left out: two shards of one item each would have no spread.",
            within_only,
        ),
        Mutant(
            "Standard deviations are averaged. Squares add up, roots do not.",
            mean_of_stds,
        ),
        Mutant(
            "The variances are averaged with the same weight for every shard.",
            equal_variances,
            "trl #7012",
        ),
        Mutant(
            "It is divided by one item less. The ranks' standard deviations divide by all of "
            "their items, and so does what is asked for.",
            one_less,
        ),
        Mutant(
            "The NaN of an empty shard spreads: 0 times NaN is NaN. One rank without items, and "
            "all ranks lose the figure.",
            nan_spreads,
        ),
        Mutant(
            "An empty shard counts as one item of 0.",
            counted_empty,
        ),
        Mutant(
            "The mean of the squares minus the square of the mean. On paper that is the same; far "
            "from 0 both are huge, and their difference is rounding.",
            squares,
        ),
    ),
    probes=_probes,
    hints=(
        "First leave out the empty shards; then the mean. What has a shard's spread to do with "
        "the spread about the mean of all?",
        "Items of a shard are off the whole mean by their own spread and by the distance of the "
        "two means: std² + (mean − whole)².",
        "`mean = (n * m).sum() / n.sum()`, and the variance is "
        "`(n * (s**2 + (m - mean)**2)).sum() / n.sum()`.",
    ),
    right="This is how running statistics are merged everywhere, after Chan, Golub and LeVeque. "
    "Whitening a reward over ranks needs it.",
)
