"""Write the unbiased estimate of best-of-n from one pool of samples."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, normal, number

ORACLE = (
    "The completions are ordered by their value. Nobody knows the value when a completion is "
    "chosen: the choice goes by the *score*, the value is what one gets for it."
)


def _pool(seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Scores, and values that go along with them in part."""
    scores = normal(seed, size, dtype=torch.float64, scale=1.0)
    return scores, 0.5 * scores + normal(seed + 7, size, dtype=torch.float64, scale=1.0)


def _by_hand(scores: Tensor, values: Tensor, n: int) -> float:
    """The mean over all ways to draw n."""
    total, ways = 0.0, 0
    for drawn in itertools.combinations(range(len(scores)), n):
        total += float(values[max(drawn, key=lambda i: float(scores[i]))])
        ways += 1
    return total / ways


def _weighted(scores: Tensor, values: Tensor, weights: list[float]) -> float:
    order = torch.argsort(scores)
    return float((values[order].double() * torch.tensor(weights, dtype=torch.float64)).sum())


def _weights(size: int, n: int) -> list[float]:
    return [math.comb(i, n - 1) / math.comb(size, n) for i in range(size)]


def _mean(best: Attempt) -> None:
    for seed in range(2):
        scores, values = _pool(seed, 9)
        close(number(best(scores, values, 1)), values.mean(), "n = 1: the mean of the values")


def _all(best: Attempt) -> None:
    for seed in range(2):
        scores, values = _pool(seed, 9)
        close(number(best(scores, values, 9)), values[scores.argmax()],
              "n = the whole pool of 9: the value of the best score")  # fmt: skip


def _subsets(best: Attempt) -> None:
    for seed in range(3):
        for size, n in ((3, 2), (5, 2), (7, 4), (8, 3)):
            scores, values = _pool(seed, size)
            close(number(best(scores, values, n)), _by_hand(scores, values, n),
                  f"n = {n} of a pool of {size}, against the mean over all subsets")  # fmt: skip


def _order(best: Attempt) -> None:
    scores, values = _pool(5, 8)
    want = number(best(scores, values, 3))
    for seed in range(3):
        shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        close(number(best(scores[shuffled], values[shuffled], 3)), want,
              "the same pool in another order")  # fmt: skip


def _nan(best: Attempt) -> None:
    for seed in range(2):
        scores, values = _pool(seed, 7)
        want = _by_hand(scores, values, 3)
        holes = torch.tensor([float("nan")], dtype=torch.float64)
        for place in (0, 3, 7):
            wide = torch.cat([scores[:place], holes, scores[place:]])
            paid = torch.cat([values[:place], 100.0 + 0 * holes.nan_to_num(), values[place:]])
            close(number(best(wide, paid, 3)), want,
                  f"a completion without a score (NaN) at place {place} of 8")  # fmt: skip


def _large(best: Attempt) -> None:
    scores, values = _pool(11, 1200)
    for n in (2, 600, 1199):
        got = number(best(scores, values, n))
        expect(math.isfinite(got), f"n = {n} of a pool of 1,200: {got}")
        close(got, _weighted(scores, values, _weights(1200, n)), f"n = {n} of a pool of 1,200",
              rtol=1e-4, atol=1e-5)  # fmt: skip


def _clean(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    kept = ~scores.isnan()
    return scores[kept], values[kept]


def first_n(scores: Tensor, values: Tensor, n: int) -> float:
    scores, values = _clean(scores, values)
    return float(values[scores[:n].argmax()])


def groups(scores: Tensor, values: Tensor, n: int) -> float:
    scores, values = _clean(scores, values)
    parts = zip(scores.split(n), values.split(n), strict=True)
    return float(torch.stack([v[s.argmax()] for s, v in parts if len(s) == n]).mean())


def with_replacement(scores: Tensor, values: Tensor, n: int) -> float:
    scores, values = _clean(scores, values)
    size = len(scores)
    weights = [((i + 1) / size) ** n - (i / size) ** n for i in range(size)]
    return _weighted(scores, values, weights)


def whole_pool(scores: Tensor, values: Tensor, n: int) -> float:
    scores, values = _clean(scores, values)
    return float(values[scores.argmax()])


def by_value(scores: Tensor, values: Tensor, n: int) -> float:
    scores, values = _clean(scores, values)
    return _weighted(values, values, _weights(len(values), n))


def score_of_best(scores: Tensor, values: Tensor, n: int) -> float:
    scores, _ = _clean(scores, values)
    return _weighted(scores, scores, _weights(len(scores), n))


def top_n(scores: Tensor, values: Tensor, n: int) -> float:
    scores, values = _clean(scores, values)
    return float(values[scores.topk(n).indices].mean())


def off_by_one(scores: Tensor, values: Tensor, n: int) -> float:
    scores, values = _clean(scores, values)
    size = len(scores)
    return _weighted(scores, values, [math.comb(i, n) / math.comb(size, n) for i in range(size)])


def nan_wins(scores: Tensor, values: Tensor, n: int) -> float:
    return _weighted(scores, values, _weights(len(scores), n))


def overflows(scores: Tensor, values: Tensor, n: int) -> float:
    scores, values = _clean(scores, values)
    size = len(scores)
    total = float(math.comb(size, n))
    return _weighted(scores, values, [float(math.comb(i, n - 1)) / total for i in range(size)])


def _probes() -> list[tuple[Any, ...]]:
    scores, values = _pool(3, 8)
    broken = scores.clone()
    broken[2] = float("nan")
    return [(scores, values, 3), (*_pool(4, 9), 2), (broken, values, 3), (*_pool(5, 1200), 600)]


EXERCISE = Exercise(
    id="ch05.expected_best",
    parameters=("scores", "values", "n"),
    properties=(
        Property("the best of 1 is the mean", "One draw has no choice: n = 1 is the mean.", _mean),
        Property(
            "the best of all has the best score",
            "With n as large as the pool there is one way to draw: all. The best score wins.",
            _all,
        ),
        Property(
            "the mean over all ways to draw n",
            "It should be the mean over all subsets of size n, drawn without replacement, of the "
            "value of the one with the best score.",
            _subsets,
        ),
        Property(
            "the order of the pool does not matter",
            "A pool has no order: the same samples, shuffled, must give the same number.",
            _order,
        ),
        Property(
            "a NaN score is never drawn",
            "A completion that could not be scored is left out of the pool, whatever its value.",
            _nan,
        ),
        Property(
            "exact for a pool of a thousand",
            "For a pool of a thousand completions the mean should be exact too, and no number on "
            "the way may overflow.",
            _large,
        ),
    ),
    mutants=(
        Mutant(
            "The first n are taken and the rest of the pool is thrown away. That is unbiased and "
            "as noisy as one draw; the pool holds many more.",
            first_n,
        ),
        Mutant(
            "The pool is cut into groups of n. Each sample is used once, in one of many ways to "
            "group; the mean over *all* subsets has less noise, and what does not fill a last "
            "group is lost.",
            groups,
        ),
        Mutant(
            "This draws with replacement: the same sample may come up twice, so the best of n "
            "different ones is underestimated. Count subsets.",
            with_replacement,
            "verl #7240",
        ),
        Mutant("The best of the whole pool is taken, whatever n is.", whole_pool),
        Mutant(ORACLE, by_value),
        Mutant(
            "The expected best *score* is returned. That is what the reward model thinks of its "
            "choice; what the choice is worth is in `values`.",
            score_of_best,
        ),
        Mutant(
            "The n best of the pool are averaged. Best-of-n draws n at random and keeps one.",
            top_n,
        ),
        Mutant(
            "The weights are shifted by one place: the i-th smallest (from 0) is the best of "
            "those subsets whose other n − 1 come from the i below it.",
            off_by_one,
        ),
        Mutant(
            "NaN takes part. A sort puts it at the end, where the largest score stands, so a "
            "completion that could not be scored wins whenever it is drawn.",
            nan_wins,
        ),
        Mutant(
            "The binomials are turned into floats before they are divided. C(1200, 600) has 360 "
            "digits; a float ends at 308. Divide the whole numbers.",
            overflows,
        ),
    ),
    probes=_probes,
    hints=(
        "Sort by score. In how many of the subsets of size n is the i-th smallest the best?",
        "Its n − 1 companions come from the i that lie below it: C(i, n − 1) out of C(M, n), "
        "with i from 0.",
        "Drop NaN, `order = torch.argsort(scores)`, weights `math.comb(i, n - 1) / math.comb(M, "
        "n)`, and sum weight times `values[order]`.",
    ),
    right="One pool gives the whole curve, n = 1 to M, proxy and gold alike: that is how the "
    "figures of over-optimisation are drawn. The companion has it as `expected_best_of_n`.",
)
