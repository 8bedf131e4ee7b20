"""Write the percentile of a score when only the quantiles of the reference were kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, kind

Array = np.ndarray[Any, np.dtype[np.float64]]


def _quantiles(seed: int, size: int = 101) -> Array:
    """Quantiles of skewed reference scores, no two equal."""
    scores = np.random.default_rng(seed).gamma(2.0, size=400) - 1.5
    made: Array = np.quantile(scores, np.linspace(0, 1, size))
    return made


def _tied() -> Array:
    """Eleven quantiles; those from 30 to 60 per cent are equal, as are the last two."""
    return np.array([-4.0, -3.0, -2.5, 0.0, 0.0, 0.0, 0.0, 1.0, 1.5, 2.0, 2.0])


def _ask(percentile: Attempt, scores: Any, quantiles: Array) -> Array:
    scores = np.asarray(scores, dtype=np.float64)
    got = percentile(scores, quantiles)
    kind(got, np.ndarray, f"a NumPy array of shape {list(scores.shape)}")
    made: Array = got
    return made


def _at(percentile: Attempt) -> None:
    for seed, size in ((0, 101), (1, 11), (2, 5)):
        quantiles = _quantiles(seed, size)
        want = np.linspace(0, 100, size)
        inner = slice(1, -1)
        close(_ask(percentile, quantiles[inner], quantiles), want[inner],
              f"the scores are the {size} quantiles themselves, without the ends")  # fmt: skip


def _between(percentile: Attempt) -> None:
    for seed, size in ((3, 101), (4, 11), (5, 5)):
        quantiles = _quantiles(seed, size)
        for part in (0.5, 0.2):
            scores = (1 - part) * quantiles[:-1] + part * quantiles[1:]
            want = np.linspace(0, 100, size)[:-1] + part * 100 / (size - 1)
            close(_ask(percentile, scores, quantiles), want,
                  f"{size} quantiles, scores {part:g} of the way to the next one")  # fmt: skip


def _outside(percentile: Attempt) -> None:
    quantiles = _quantiles(6, 11)
    low, high = float(quantiles[0]), float(quantiles[-1])
    close(_ask(percentile, [low - 5, low - 0.01, high + 0.01, high + 5], quantiles),
          [0, 0, 100, 100], "scores below and above all of the reference")  # fmt: skip


def _ties(percentile: Attempt) -> None:
    close(_ask(percentile, [0.0], _tied()), [45],
          "a score that a third of the reference has: the quantiles of 30, 40, 50 and 60 per "
          "cent are equal to it")  # fmt: skip
    close(_ask(percentile, [2.0], _tied()), [95],
          "a score that the quantiles of 90 and of 100 per cent are equal to")  # fmt: skip


def _nan(percentile: Attempt) -> None:
    quantiles = _quantiles(7, 11)
    got = _ask(percentile, [np.nan, float(quantiles[5])], quantiles)
    close(got, [np.nan, 50], "a text without a score (NaN), and one in the middle")


def _alone(percentile: Attempt) -> None:
    quantiles = _quantiles(8, 101)
    scores = np.random.default_rng(8).normal(size=6)
    together = _ask(percentile, scores, quantiles)
    apart = [float(_ask(percentile, [s], quantiles)[0]) for s in scores]
    close(together, apart, "six scores in one call, and each in a call of its own")


def _both(scores: Array, quantiles: Array) -> tuple[Array, Array]:
    """Percentiles by the first and by the last of equal quantiles."""
    percent = np.linspace(0, 100, len(quantiles))
    values, first = np.unique(quantiles, return_index=True)
    last = np.searchsorted(quantiles, values, side="right") - 1
    ends: dict[str, float] = {"left": 0.0, "right": 100.0}
    return (
        np.interp(scores, values, percent[first], **ends),
        np.interp(scores, values, percent[last], **ends),
    )


def steps(scores: Array, quantiles: Array) -> Array:
    below = np.searchsorted(quantiles, scores, side="left")
    up_to = np.searchsorted(quantiles, scores, side="right")
    made: Array = 50.0 * (below + up_to) / len(quantiles)
    return np.where(np.isnan(scores), np.nan, made)


def counts_below(scores: Array, quantiles: Array) -> Array:
    return _both(scores, quantiles)[0]


def counts_up_to(scores: Array, quantiles: Array) -> Array:
    return _both(scores, quantiles)[1]


def fraction(scores: Array, quantiles: Array) -> Array:
    made: Array = sum(_both(scores, quantiles)) / 200  # type: ignore[assignment]
    return made


def bell(scores: Array, quantiles: Array) -> Array:
    z = (scores - quantiles.mean()) / quantiles.std(ddof=1)
    made: Array = 100 * stats.norm.cdf(z)
    return made


def beyond(scores: Array, quantiles: Array) -> Array:
    low, high = _both(scores, quantiles)
    step = 100 / (len(quantiles) - 1)
    under, over = scores - quantiles[0], scores - quantiles[-1]
    first = max(quantiles[1] - quantiles[0], 1e-9)
    last = max(quantiles[-1] - quantiles[-2], 1e-9)
    made: Array = (low + high) / 2
    made = made + np.where(under < 0, step * under / first, 0)
    return made + np.where(over > 0, step * over / last, 0)


def nowhere(scores: Array, quantiles: Array) -> Array:
    low, high = _both(scores, quantiles)
    inside = (scores >= quantiles[0]) & (scores <= quantiles[-1])
    return np.where(inside, (low + high) / 2, np.nan)


def nan_is_last(scores: Array, quantiles: Array) -> Array:
    low, high = _both(scores, quantiles)
    return np.where(np.isnan(scores), 100.0, (low + high) / 2)


def nan_is_zero(scores: Array, quantiles: Array) -> Array:
    low, high = _both(np.nan_to_num(scores), quantiles)
    made: Array = (low + high) / 2
    return made


def from_above(scores: Array, quantiles: Array) -> Array:
    low, high = _both(scores, quantiles)
    made: Array = 100 - (low + high) / 2
    return made


def among_themselves(scores: Array, quantiles: Array) -> Array:
    below = (scores[:, None] > scores[None, :]).sum(1)
    equal = (scores[:, None] == scores[None, :]).sum(1)
    made: Array = 100 * (below + equal / 2) / len(scores)
    return made


def share_of_range(scores: Array, quantiles: Array) -> Array:
    low, high = quantiles[0], quantiles[-1]
    made: Array = np.clip(100 * (scores - low) / (high - low), 0, 100)
    return made


def _probes() -> list[tuple[Any, ...]]:
    quantiles = _quantiles(9, 11)
    mixed = np.array([quantiles[0] - 1, quantiles[2], quantiles[3] + 0.01, quantiles[-1] + 1])
    return [
        (mixed, quantiles),
        (np.array([0.0, 2.0]), _tied()),
        (np.array([np.nan, 0.1]), quantiles),
    ]


EXERCISE = Exercise(
    id="ch06.percentile_of",
    parameters=("scores", "quantiles"),
    properties=(
        Property(
            "a quantile has its own percentile",
            "The k-th of the quantiles is k steps of 100 / (K − 1) per cent up.",
            _at,
        ),
        Property(
            "between two quantiles it goes in a straight line",
            "Half-way between two neighbouring quantiles the percentile is half-way too.",
            _between,
        ),
        Property(
            "0 below the reference, 100 above it",
            "A score below all of the reference has percentile 0, one above all of it 100.",
            _outside,
        ),
        Property(
            "a tie is put in the middle",
            "If several quantiles equal the score, the percentile is the middle of theirs.",
            _ties,
        ),
        Property("NaN stays NaN", "A text without a score has no percentile: NaN.", _nan),
        Property(
            "a text's percentile does not depend on the other texts",
            "A score has the same percentile alone and beside other scores.",
            _alone,
        ),
    ),
    mutants=(
        Mutant(
            "The quantiles are counted as if they were the reference. They are 101 points of its "
            "curve: the k-th of K stands for k/(K − 1), and between two of them it goes on rising.",
            steps,
        ),
        Mutant(
            "A tie counts as not below. Where many texts have the same score, all of them would "
            "get the percentile of the worst of them.",
            counts_below,
        ),
        Mutant(
            "A tie counts as below. The plain `np.interp` does that: of equal quantiles it takes "
            "the last, and all tied texts get the percentile of the best of them.",
            counts_up_to,
        ),
        Mutant("It is a share from 0 to 1. A percentile goes from 0 to 100.", fraction),
        Mutant(
            "The scores are taken to be normal. Rewards are skewed: right answers pile up at the "
            "top. The quantiles are kept so that nobody has to assume a shape.",
            bell,
        ),
        Mutant(
            "The line goes on beyond the reference. No share of it can lie below 0 or above 100 "
            "per cent.",
            beyond,
        ),
        Mutant(
            "A score beyond the reference has no percentile. The best text of the day is better "
            "than all of the reference: that is 100, and no missing value.",
            nowhere,
        ),
        Mutant(
            "A text without a score gets percentile 100: searching puts NaN behind the largest "
            "number. A failure would pass every filter.",
            nan_is_last,
        ),
        Mutant(
            "A text without a score is taken to have the score 0, which is a percentile like any "
            "other. A failure must stay visible.",
            nan_is_zero,
            "verl-omni #366",
        ),
        Mutant(
            "The share *above* the score is returned: the best text would have percentile 0.",
            from_above,
        ),
        Mutant(
            "The scores are ranked among themselves. Then a text's percentile depends on what "
            "else was asked for in the same request; the reference is what stays.",
            among_themselves,
        ),
        Mutant(
            "It is the place within the range from the smallest to the largest score. One outlier "
            "moves all of them; a percentile counts texts.",
            share_of_range,
        ),
    ),
    probes=_probes,
    hints=(
        "You have points of a curve: quantile k of K lies at 100·k/(K − 1) per cent. What lies "
        "between two points?",
        "`np.interp` draws the line, and has `left` and `right` for what lies outside. It needs "
        "quantiles that differ: what becomes of equal ones?",
        "Take `values, first = np.unique(quantiles, return_index=True)` and the index of the last "
        "of each; interpolate once with the percents of the first and once with those of the "
        "last, and take the mean.",
    ),
    right="101 numbers in the manifest stand for a reference of any size, and a score gets its "
    "percentile without the reference's texts. The companion has it as "
    "`ReferenceStats.percentile`.",
)
