"""Tests that stay valid however often one looks: betting against a null. Chapter 7.

Somebody who bets, at odds that are fair if the null holds, gets rich only if it does not hold. The
wealth is an *e-process*: whatever the number of looks and whoever decides when to stop, the chance
that it ever reaches ``1 / alpha`` under the null is at most ``alpha`` (Ville 1939). A p-value has
no such property: one that is looked at each week crosses its level almost surely.

The bets are those on a bounded mean (Waudby-Smith and Ramdas 2024, *Estimating means of bounded
random variables by betting*, arXiv 2010.09686): a null says that the mean of a *shortfall* D, at
least -1, is at most 0, and the wealth grows by ``1 + bet * D``. Averages of e-processes are
e-processes too, so that nobody has to know the best bet, nor when the change begins: bets of
several sizes, and starts at all looks, are mixed.

Arrays are NumPy float64; nothing here imports torch. (``confseq`` has such tests in C++, without
mixtures over starts; ``expectation`` is under another licence; ``ville`` is the oracle of the
tests.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import stats

from companion.errors import DataError, ShapeError
from companion.functional.resampling import Array, Values, vector

#: sizes of the bets, as shares of the largest one that cannot lose all: each doubles the one before
BET_SHARES: Final[tuple[float, ...]] = tuple(0.64 * 2.0**-i for i in reversed(range(7)))

#: at how many standard errors the evidence of a sample of known size is greatest
TUNED: Final = 2.4


def bets_of(worst: float) -> Array:
    """The bets that are mixed, ``[7]``, for a shortfall that is never below ``-worst``.

    Raises
    ------
    DataError
        If `worst` is not positive.
    """
    if not worst > 0:
        raise DataError(f"worst is {worst}; a shortfall that cannot be negative is no bet")
    return np.asarray(BET_SHARES) / worst


def log_growth(shortfall: npt.ArrayLike, bets: npt.ArrayLike) -> Array:
    """By how much each bet's wealth grows over one look, in nats.

    Parameters
    ----------
    shortfall : array ``[..., n]``
        Of each prompt (or whatever is independent of the others) its D, whose mean is at most 0
        under the null.
    bets : array ``[bets]``
        See :func:`bets_of`.

    Returns
    -------
    ndarray ``[..., bets]``
        Sum over n of ``log(1 + bet * D)``.

    Raises
    ------
    DataError
        If a bet could have lost everything: it was too large for this shortfall.
    """
    values = np.asarray(shortfall, dtype=np.float64)
    grown = np.empty((*values.shape[:-1], len(np.atleast_1d(bets))))
    for i, bet in enumerate(np.atleast_1d(bets)):
        if values.size and bet * values.min() <= -1:
            raise DataError(
                f"a shortfall of {values.min():g} with a bet of {bet:g} loses everything",
                "take smaller bets",
            )
        grown[..., i] = np.log1p(bet * values).sum(axis=-1)
    return grown


def start_prior(looks: int) -> Array:
    """Weight of each look as the start of a change, ``1 / (k (k + 1))``, ``[looks]``.

    They add up to ``1 - 1 / (looks + 1)``; the rest waits for starts to come.
    """
    k = np.arange(1, looks + 1, dtype=np.float64)
    return 1 / (k * (k + 1))


def mix_starts(growth: npt.ArrayLike) -> Array:
    """Log of the e-process at each look, mixed over the look at which the betting begins.

    A bettor who began at look 1 has lost by the time when a change comes late. Here a part of the
    stake waits for each look. The mixture is an e-process, since each part is one.

    Parameters
    ----------
    growth : array ``[looks, ...]``
        Of each look, what :func:`log_growth` gives.

    Returns
    -------
    ndarray ``[looks, ...]``
    """
    grown = np.asarray(growth, dtype=np.float64)
    out = np.empty_like(grown)
    # sum over starts k <= look of prior(k) * wealth since k: each look adds one start, then grows
    running: Any = np.full(grown.shape[1:], -np.inf)
    for look, (weight, own) in enumerate(zip(start_prior(len(grown)), grown, strict=True), 1):
        running = np.logaddexp(running, np.log(weight)) + own
        out[look - 1] = np.logaddexp(running, -np.log(look + 1))
    return out


def mix(log_e: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Array:
    """Log of a weighted mean of e-values, over the last axis.

    Parameters
    ----------
    log_e : array ``[..., n]``
    weights : array ``[n]``, optional
        They add up to 1; equal ones if absent.

    Raises
    ------
    DataError
        If the weights do not add up to 1.
    """
    values = np.asarray(log_e, dtype=np.float64)
    share = np.full(values.shape[-1], 1 / values.shape[-1]) if weights is None else weights
    share = np.asarray(share, dtype=np.float64)
    if (share < 0).any() or abs(share.sum() - 1) > 1e-9:
        raise DataError(f"the weights add up to {share.sum():g}", "let them add up to 1")
    with np.errstate(divide="ignore"):
        return np.asarray(np.logaddexp.reduce(values + np.log(share), axis=-1))


def likely_start(growth: npt.ArrayLike) -> int:
    """The look at which a change most likely began, counted from 0.

    Parameters
    ----------
    growth : array ``[looks, ...]``
        As in :func:`mix_starts`; what follows the first axis is mixed with equal weights.

    Returns
    -------
    int
        Where the prior times the wealth since then is greatest.
    """
    grown = np.asarray(growth, dtype=np.float64).reshape(len(np.asarray(growth)), -1)
    since = np.cumsum(grown[::-1], axis=0)[::-1]
    return int(np.argmax(mix(since) + np.log(start_prior(len(grown)))))


def by_group(values: npt.ArrayLike, groups: Sequence[Any] | npt.NDArray[Any]) -> Array:
    """Mean of the values of each group, ``[..., groups]``, in the order of the groups' first items.

    Pairs of one prompt stand or fall together: a bet on each of them would count one piece of
    evidence several times. The mean of a prompt is one bet.

    Parameters
    ----------
    values : array ``[..., n]``
    groups : sequence ``[n]``

    Raises
    ------
    DataError, ShapeError
        If a value is NaN, there is none, or the lengths differ.
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise ShapeError("values is empty")
    if np.isnan(array).any():
        raise DataError("values hold NaN", "leave out what could not be scored, and count it")
    if len(groups) != array.shape[-1]:
        raise ShapeError(f"{array.shape[-1]} values but {len(groups)} groups")
    numbers: dict[Any, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    order = np.argsort(index, kind="stable")
    counts = np.bincount(index)
    starts = np.cumsum(counts) - counts
    return np.asarray(np.add.reduceat(array[..., order], starts, axis=-1) / counts)


def mean_lower_limit(values: Values, alpha: float, *, seed: int = 0) -> float:
    """Lower confidence limit of a mean of independent values in [0, 1].

    Holds with probability ``1 - alpha`` at every sample size: of zeros and ones the exact limit of
    Clopper and Pearson (1934), else by betting (Waudby-Smith and Ramdas 2024, section 4, one-sided,
    with bets for a fixed n), which needs no normal distribution.

    Parameters
    ----------
    values : array ``[n]``
        In [0, 1]; of dependent ones the means of the groups, see :func:`by_group`.
    alpha : float
    seed : int
        Of the order in which they are bet on.

    Raises
    ------
    DataError, ShapeError
        If a value is outside [0, 1] or NaN, or alpha is not inside (0, 1).
    """
    array = vector("values", values)
    if (array < 0).any() or (array > 1).any():
        raise DataError("values hold one outside [0, 1]")
    if not 0 < alpha < 1:
        raise DataError(f"alpha is {alpha}", "use a probability inside (0, 1)")
    n = array.size
    if np.isin(array, (0.0, 1.0)).all():
        ones = float(array.sum())
        return 0.0 if ones == 0 else float(stats.beta.ppf(alpha, ones, n - ones + 1))
    array, wanted = _in_turn(array, alpha, seed)

    def rejected(limit: float) -> bool:
        """Whether betting against means up to `limit` has won 1 / alpha at some time."""
        return bool(np.cumsum(_won(array, wanted, limit)).max() >= np.log(1 / alpha))

    low, high = 0.0, 1.0  # low is rejected (or 0), high is not
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def evidence_above(values: Values, levels: npt.ArrayLike, *, seed: int = 0) -> Array:
    """Log of an e-value against each level, ``[levels]``: that the mean is that, or less.

    By one betting, tuned to a mean that is 2.4 standard errors above the level, where a reference
    and the labels that are held against it have about equal parts in an alarm.

    Parameters
    ----------
    values : array ``[n]``
        As in :func:`mean_lower_limit`.
    levels : array ``[levels]``
        In (0, 1].
    seed : int
        Of the order in which they are bet on.

    Raises
    ------
    DataError, ShapeError
        If a value is outside [0, 1] or NaN.
    """
    array = vector("values", values)
    if (array < 0).any() or (array > 1).any():
        raise DataError("values hold one outside [0, 1]")
    array, wanted = _in_turn(array, float(np.exp(-(TUNED**2) / 2)), seed)
    return np.array([_won(array, wanted, level).sum() for level in np.atleast_1d(levels)])


def _in_turn(values: Array, alpha: float, seed: int) -> tuple[Array, Array]:
    """Values in an order, and the bet on each that what came before it asks for."""
    array = np.random.default_rng(seed).permutation(values)
    seen = np.arange(1, array.size + 1)
    # what was known before each value: a mean and a variance, begun with one imagined value
    mean = (0.5 + np.cumsum(array)) / (seen + 1)
    variance = (0.25 + np.cumsum((array - mean) ** 2)) / (seen + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    return array, np.sqrt(2 * np.log(1 / alpha) / (array.size * before))


def _won(values: Array, wanted: Array, level: float) -> Array:
    """Log of what each bet against a mean up to `level` multiplies the wealth by."""
    bets = np.minimum(wanted, 0.75 / max(level, 1e-12))
    return np.asarray(np.log1p(bets * (values - level)))
