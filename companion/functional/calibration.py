"""Does a margin mean what it says? Calibration of sigmoid(chosen - rejected) (Chapter 7).

The trap: with p = sigmoid(margin) and the outcome 'chosen was preferred', which is always 1, the
calibration error is 1 - mean(p) whatever the model; a perfect one gets 0.3. So either ask whether
the *confidence* max(p, 1 - p) matches correctness (:func:`confidence_and_correctness`), or turn
each pair round by a coin (:func:`orient_at_random`).

All functions take torch tensors (any device, any float dtype) or NumPy arrays, 1-d, and compute in
NumPy float64: these are statistics over a whole set, never part of a gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.optimize import brentq, isotonic_regression, minimize_scalar
from scipy.special import xlogy
from scipy.stats import rankdata

from companion.errors import DataError, ShapeError
from companion.functional.resampling import (
    Array,
    Interval,
    Values,
    middle,
    vector,
)

Strategy = Literal["width", "mass"]


@dataclass(frozen=True)
class ReliabilityBins:
    """What a reliability diagram shows; arrays of one entry a bin, empty bins left out.

    Attributes
    ----------
    confidence : ndarray
        Mean confidence of the bin.
    outcome : ndarray
        Mean outcome of the bin.
    count : ndarray of int
        Items in the bin. They add up to the number of items.
    variance : ndarray
        Sample variance of the outcomes; NaN in a bin of one.
    low, high : ndarray
        Edges: those of the grid with ``strategy="width"``, the least and the greatest confidence
        with ``"mass"``.
    """

    confidence: Array
    outcome: Array
    count: npt.NDArray[np.int64]
    variance: Array
    low: Array
    high: Array


def _probabilities(name: str, values: Values) -> Array:
    array = vector(name, values)
    if (array < 0).any() or (array > 1).any():
        raise DataError(f"{name} holds a value outside [0, 1]", "pass probabilities, not logits")
    return array


def _two(confidence: Values, outcome: Values) -> tuple[Array, Array]:
    first, second = _probabilities("confidence", confidence), _probabilities("outcome", outcome)
    if first.shape != second.shape:
        raise ShapeError(f"confidence has {first.size} items, outcome {second.size}")
    return first, second


def _sigmoid(margins: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -margins))


def confidence_and_correctness(margins: Values) -> tuple[Array, Array]:
    """How sure the model is of its choice, and whether the choice is right.

    Parameters
    ----------
    margins : array ``[n]``
        ``(chosen - rejected) / T``.

    Returns
    -------
    confidence : ndarray ``[n]``
        ``max(p, 1 - p)`` with ``p = sigmoid(margin)``, in [0.5, 1].
    correct : ndarray ``[n]``
        1 where the margin is positive, 0 where negative, 0.5 at a tie.

    Raises
    ------
    DataError
        If a margin is NaN.
    ShapeError
        If there is none, or they are not 1-d.
    """
    array = vector("margins", margins)
    return _sigmoid(np.abs(array)), np.where(array == 0, 0.5, (array > 0).astype(np.float64))


def orient_at_random(margins: Values, generator: int | np.random.Generator) -> tuple[Array, Array]:
    """Turn each pair round by a coin: probability that the *first* wins, and whether it did.

    Parameters
    ----------
    margins : array ``[n]``
        ``(chosen - rejected) / T``.
    generator : int or numpy Generator
        A seed or a generator, so that the result can be had again.

    Returns
    -------
    probability, outcome : ndarray ``[n]``
        ``sigmoid(margin)`` and 1 where the chosen stands first, ``sigmoid(-margin)`` and 0 where
        it stands second.

    Raises
    ------
    DataError, ShapeError
        As in :func:`confidence_and_correctness`.
    """
    array = vector("margins", margins)
    first = np.random.default_rng(generator).random(array.size) < 0.5
    return _sigmoid(np.where(first, array, -array)), first.astype(np.float64)


def brier_score(probability: Values, outcome: Values) -> Array:
    """Squared error of each probability, ``(probability - outcome)**2``, ``[n]`` (Brier 1950).

    Unlike the calibration error it may be taken with the outcome always 1: turning a pair round
    changes neither the square nor the mean.

    Raises
    ------
    DataError, ShapeError
        If a value is outside [0, 1] or NaN, or the lengths differ.
    """
    first, second = _two(probability, outcome)
    return (first - second) ** 2


def _bin_index(confidence: Array, n_bins: int, strategy: str) -> npt.NDArray[np.int64]:
    if n_bins < 1:
        raise DataError(f"n_bins is {n_bins}; it must be at least 1")
    if strategy == "width":
        # [lo, hi), the last one closed. Bins (lo, hi] from 0 lose p = 0, which a float16 sigmoid
        # reaches at -18.
        position = confidence * n_bins
    elif strategy == "mass":
        # By the mean rank of equal values, so that the result hangs neither on the order of the
        # rows nor on how a run of equal confidences is cut.
        position = (rankdata(confidence, method="average") - 0.5) * n_bins / confidence.size
    else:
        raise DataError(f"strategy={strategy!r} is unknown", "there are 'width' and 'mass'")
    return np.clip(position.astype(np.int64), 0, n_bins - 1)


def reliability_bins(
    confidence: Values, outcome: Values, n_bins: int = 10, strategy: Strategy = "width"
) -> ReliabilityBins:
    """Mean confidence and mean outcome, bin by bin.

    Parameters
    ----------
    confidence, outcome : array ``[n]``
        Probabilities, and what came of them (0, 1, or between for ties).
    n_bins : int, default 10
        Bins of the grid.
    strategy : {"width", "mass"}
        Equal widths over [0, 1], or equal counts.

    Raises
    ------
    DataError, ShapeError
        If a value is outside [0, 1] or NaN, or the lengths differ.
    """
    first, second = _two(confidence, outcome)
    index = _bin_index(first, n_bins, strategy)
    used, compact, count = np.unique(index, return_inverse=True, return_counts=True)
    mean_confidence = np.bincount(compact, weights=first) / count
    mean_outcome = np.bincount(compact, weights=second) / count
    squares = np.bincount(compact, weights=(second - mean_outcome[compact]) ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.where(count > 1, squares / (count - 1), np.nan)
    if strategy == "width":
        low, high = used / n_bins, (used + 1) / n_bins
    else:
        low, high = np.full(used.size, np.inf), np.full(used.size, -np.inf)
        np.minimum.at(low, compact, first)
        np.maximum.at(high, compact, first)
    return ReliabilityBins(
        mean_confidence, mean_outcome, count.astype(np.int64), variance, low, high
    )


def _calibration_error(
    count: Array, confidence: Array, outcome: Array, variance: Array, debias: bool
) -> Array:
    """Error from bins on the last axis; leading axes are simulations."""
    weight = count / count.sum()
    gap = confidence - outcome
    if not debias:
        return np.asarray((weight * np.abs(gap)).sum(axis=-1))
    # A bin of one item shows no variance; what a calibrated model would have stands in for it.
    noise = np.where(count > 1, variance, confidence * (1 - confidence)) / count
    squared = (weight * (gap**2 - noise)).sum(axis=-1)
    return np.asarray(np.sqrt(np.maximum(squared, 0.0)))


def expected_calibration_error(
    confidence: Values,
    outcome: Values,
    n_bins: int = 10,
    strategy: Strategy = "width",
    debias: bool = False,
) -> float:
    """Gap between confidence and outcome, over bins weighted by their counts.

    Parameters
    ----------
    confidence, outcome : array ``[n]``
        Probabilities, and what came of them. Read the head of this module first.
    n_bins : int, default 10
    strategy : {"width", "mass"}
        Equal widths over [0, 1] (Naeini et al. 2015, Guo et al. 2017) or equal counts.
    debias : bool, default False
        The plain estimate, a weighted mean of ``|gap|``, is biased upwards: noise in a bin looks
        like error, 0.06 for a perfectly calibrated model on 200 pairs. With true: the debiased
        estimate of Kumar, Liang and Ma 2019 (Verified Uncertainty Calibration, arXiv 1909.10155,
        section 5; Bröcker 2012 and Ferro and Fricker 2012 have it in meteorology). It takes each
        bin's sampling variance off its *squared* gap,
        ``sqrt(max(0, sum_b w_b (gap_b**2 - var_b / n_b)))``, so it is a root mean square where the
        plain one is a mean: for the same true gaps at least as large. The square is unbiased; the
        cut at zero leaves a small rest. Use it with ``strategy="mass"``.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    DataError, ShapeError
        If a value is outside [0, 1] or NaN, or the lengths differ.
    """
    bins = reliability_bins(confidence, outcome, n_bins, strategy)
    count = bins.count.astype(np.float64)
    return float(_calibration_error(count, bins.confidence, bins.outcome, bins.variance, debias))


def calibrated_band(
    confidence: Values,
    n_bins: int = 10,
    strategy: Strategy = "width",
    debias: bool = False,
    *,
    level: float = 0.95,
    n_simulations: int = 1000,
    seed: int = 0,
) -> Interval:
    """Where the calibration error of a perfectly calibrated model with these confidences lies.

    Outcomes are drawn from the confidences themselves again and again (consistency resampling,
    Bröcker and Smith 2007); the band holds the middle `level` of the errors. An error inside it is
    no evidence of miscalibration.

    Parameters
    ----------
    confidence : array ``[n]``
        Probabilities.
    n_bins, strategy, debias
        As in :func:`expected_calibration_error`, of which this is the null distribution.
    level : float, default 0.95
    n_simulations : int, default 1000
    seed : int, default 0
        The band is the same each time.

    Raises
    ------
    DataError, ShapeError
        If a value is outside [0, 1] or NaN, or `level` is not inside (0, 1).
    """
    probabilities = _probabilities("confidence", confidence)
    index = _bin_index(probabilities, n_bins, strategy)
    order = np.argsort(index, kind="stable")
    ordered = probabilities[order]
    starts = np.flatnonzero(np.diff(index[order], prepend=-1))
    count = np.diff(np.append(starts, ordered.size)).astype(np.float64)
    mean_confidence = np.add.reduceat(ordered, starts) / count
    random = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // ordered.size)  # bounds the memory at 16 MB a chunk
    errors = []
    for begin in range(0, n_simulations, chunk):
        size = min(chunk, n_simulations - begin)
        outcomes = random.random((size, ordered.size)) < ordered
        mean = np.add.reduceat(outcomes, starts, axis=1, dtype=np.float64) / count
        # of 0 and 1 the sample variance is n m (1 - m) / (n - 1)
        variance = mean * (1 - mean) * count / np.maximum(count - 1, 1)
        errors.append(_calibration_error(count, mean_confidence, mean, variance, debias))
    return middle(np.concatenate(errors), level)


def fit_temperature(margins: Values, *, bounds: tuple[float, float] = (0.01, 100.0)) -> float:
    """Temperature T at which ``sigmoid(margin / T)`` fits best (Guo et al. 2017).

    Minimises the mean of ``-log sigmoid(margin / T)`` over ``log T``; it has one minimum, for the
    loss is convex in 1/T. Fit it on pairs that the model did not train on, and report on others.

    Parameters
    ----------
    margins : array ``[n]``
        ``chosen - rejected``.
    bounds : (float, float), default (0.01, 100)
        Where T may lie.

    Returns
    -------
    float
        T. At a bound a warning says why: no pair is wrong (T would go to 0), or the margins are
        worse than a coin or all zero (T would go to infinity).

    Raises
    ------
    DataError, ShapeError
        If a margin is NaN or infinite, or there is none.
    """
    array = vector("margins", margins)
    if np.isinf(array).any():
        raise DataError("margins hold an infinite value", "look for scores that overflowed")
    low, high = np.log(bounds[0]), np.log(bounds[1])
    found = minimize_scalar(
        lambda log_t: float(np.logaddexp(0.0, -array * np.exp(-log_t)).mean()),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-7},
    ).x

    # The slope in 1/T decides at the ends, where the minimiser only comes close.
    def slope(log_t: float) -> float:
        return float((-array * _sigmoid(-array * np.exp(-log_t))).mean())

    # (without a wrong pair the slope is negative, but may underflow to 0)
    if ((array >= 0).all() and (array > 0).any()) or slope(low) < 0:
        found, reason = low, "no pair that counts is ordered wrongly; more pairs would show some"
    elif slope(high) >= 0:
        found, reason = high, "the margins are no better than a coin"
    else:
        return float(np.exp(found))
    warnings.warn(f"the temperature stands at its bound {np.exp(found):g}: {reason}", stacklevel=2)
    return float(np.exp(found))


def inverse_temperature_limits(
    margins: Values,
    outcome: Values | None = None,
    groups: Sequence[Any] | None = None,
    *,
    alpha: float = 0.05,
) -> tuple[float, float, float]:
    """The inverse temperature 1/T that fits best, and how sure that is.

    Parameters
    ----------
    margins : array ``[n]``
        ``chosen - rejected``, raw.
    outcome : array ``[n]``, optional
        Whether the chosen was preferred: 1, or 0.5 for a tie; all 1 if absent.
    groups : sequence ``[n]``, optional
        The prompt of each pair; pairs of one prompt are not independent.
    alpha : float
        Chance, on each side, that the true 1/T lies outside.

    Returns
    -------
    (float, float, float)
        1/T, its lower and its upper limit: a normal interval in 1/T, in which the log loss is
        convex, with the standard error of the groups' sums of the score (White 1982, the
        'sandwich'). The lower one is at least 0.

    Raises
    ------
    DataError
        If the margins order no pair wrongly (1/T has no bound) or there are fewer than two
        groups.
    ShapeError
        If the lengths differ.
    """
    array = vector("margins", margins)
    won = np.ones_like(array) if outcome is None else _probabilities("outcome", outcome)
    if won.shape != array.shape or (groups is not None and len(groups) != array.size):
        raise ShapeError(f"{array.size} margins, {won.size} outcomes, and groups of another length")

    def score(inverse: float) -> Array:
        """Slope of the log likelihood, pair by pair."""
        return np.asarray(array * (won - _sigmoid(array * inverse)))

    # how much is ordered wrongly: the slope's limit for a large 1/T, as the slope itself underflows
    if not (np.abs(array) * np.where(array > 0, 1 - won, won)).sum() > 0:
        raise DataError(
            "no pair is ordered wrongly: the temperature has no bound",
            "take more pairs, some of which the model gets wrong",
        )
    if score(0.0).sum() <= 0:
        best = 0.0
    else:
        high = 1 / max(float(np.abs(array).max()), 1e-12)
        while score(high).sum() > 0:
            high *= 2
        best = float(brentq(lambda inverse: score(inverse).sum(), 0.0, high))
    names = range(array.size) if groups is None else groups
    index = np.unique(np.asarray([str(name) for name in names]), return_inverse=True)[1]
    sums = np.bincount(index, weights=score(best))
    if sums.size < 2:
        raise DataError("one prompt says nothing about other prompts", "give more of them")
    probability = _sigmoid(array * best)
    curvature = float((array**2 * probability * (1 - probability)).sum())
    spread = np.sqrt(float((sums**2).sum()) * sums.size / (sums.size - 1)) / max(curvature, 1e-300)
    wide = float(stats.t.isf(alpha, sums.size - 1)) * spread
    return best, max(best - wide, 0.0), best + wide


@dataclass(frozen=True)
class ScoreParts:
    """A proper score and its parts: ``score = miscalibration - discrimination + uncertainty``.

    Attributes
    ----------
    score : float
        Mean; less is better.
    miscalibration : float
        What the best monotone recalibration would save.
    discrimination : float
        What the recalibrated probabilities save over always saying the base rate.
    uncertainty : float
        The score of always saying the base rate.
    """

    score: float
    miscalibration: float
    discrimination: float
    uncertainty: float


def score_parts(
    probability: Values, outcome: Values, rule: Literal["brier", "log"] = "brier"
) -> ScoreParts:
    """Brier score or log loss, and its decomposition.

    The recalibration is the isotonic one, so that no bins have to be chosen (the CORP decomposition
    of Dimitriadis, Gneiting and Jordan 2021, *Stable reliability diagrams for probabilistic
    classifiers*, PNAS 118). All parts are non-negative. In small samples the isotonic fit follows
    the noise too: a calibrated model shows a miscalibration above 0.

    Parameters
    ----------
    probability, outcome : array ``[n]``
        Probabilities, and what came of them: 0, 1, or between for ties.
    rule : {"brier", "log"}
        The latter in nats; infinite where 0 or 1 was said of what came otherwise.

    Raises
    ------
    DataError, ShapeError
        If a value is outside [0, 1] or NaN, or the lengths differ, or the rule is unknown.
    """
    said, came = _two(probability, outcome)
    if rule not in ("brier", "log"):
        raise DataError(f"rule={rule!r} is unknown", "there are 'brier' and 'log'")

    def mean_score(p: Array) -> float:
        if rule == "brier":
            return float(((p - came) ** 2).mean())
        return float(-(xlogy(came, p) + xlogy(1 - came, 1 - p)).mean())

    # equal probabilities get one value, whatever the order of the rows
    _, index, count = np.unique(said, return_inverse=True, return_counts=True)
    means = np.bincount(index, weights=came) / count
    fitted = isotonic_regression(means, weights=count).x[index]
    score, best = mean_score(said), mean_score(np.clip(fitted, 0.0, 1.0))
    base = mean_score(np.full_like(said, came.mean()))
    return ScoreParts(score, score - best, base - best, base)
