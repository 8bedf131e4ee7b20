"""Derive how many labels the best bettor needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property, Unusable
from companion.course.exercises._tools import Attempt, a_kind, close

CASES = ((0.8, 0.7, 0.01), (0.75, 0.72, 0.05), (0.9, 0.6, 0.001), (0.6, 0.59, 0.01))


def _right(a0: float, a1: float, alpha: float) -> tuple[float, float]:
    if a1 >= a0:
        return 0.0, math.inf
    stake = (a0 - a1) / (a0 * (1 - a0))
    return stake, math.log(1 / alpha) / _growth(stake, a0, a1)


def _growth(stake: float, a0: float, a1: float) -> float:
    win = (1 - a1) * math.log1p(stake * a0)
    return win + a1 * math.log1p(-min(stake * (1 - a0), 0.999999))


def _ask(attempt: Attempt, a0: float, a1: float, alpha: float) -> tuple[float, float]:
    got = attempt(a0, a1, alpha)
    if not isinstance(got, (tuple, list, np.ndarray)) or len(got) != 2:
        raise Unusable(f"the result: expected (stake, labels), got {a_kind(got)}")
    return float(got[0]), float(got[1])


def _words(a0: float, a1: float, alpha: float) -> str:
    return f"accuracy {a0} at release, {a1} now, alpha {alpha}"


def _stake(attempt: Attempt) -> None:
    for case in CASES:
        close(_ask(attempt, *case)[0], _right(*case)[0], f"{_words(*case)}: the stake")


def _labels(attempt: Attempt) -> None:
    for case in CASES:
        close(_ask(attempt, *case)[1], _right(*case)[1], f"{_words(*case)}: the labels")


def _never(attempt: Attempt) -> None:
    for a1 in (0.8, 0.9):
        close(_ask(attempt, 0.8, a1, 0.01), (0.0, math.inf),
              f"{_words(0.8, a1, 0.01)}: there is no fall")  # fmt: skip


def no_variance(a0: float, a1: float, alpha: float) -> Any:
    stake = max(a0 - a1, 0.0)
    return stake, math.log(1 / alpha) / _growth(stake, a0, a1) if stake else math.inf


def variance_now(a0: float, a1: float, alpha: float) -> Any:
    stake = max(a0 - a1, 0.0) / (a1 * (1 - a1))
    return stake, math.log(1 / alpha) / _growth(stake, a0, a1) if stake else math.inf


def all_in(a0: float, a1: float, alpha: float) -> Any:
    stake = 0.99 / (1 - a0) if a1 < a0 else 0.0
    return stake, math.inf


def straight(a0: float, a1: float, alpha: float) -> Any:
    stake = _right(a0, a1, alpha)[0]
    return stake, math.log(1 / alpha) / (stake * (a0 - a1)) if stake else math.inf


def no_log(a0: float, a1: float, alpha: float) -> Any:
    stake = _right(a0, a1, alpha)[0]
    return stake, 1 / alpha / _growth(stake, a0, a1) if stake else math.inf


def turned_kl(a0: float, a1: float, alpha: float) -> Any:
    stake = _right(a0, a1, alpha)[0]
    kl = a0 * math.log(a0 / a1) + (1 - a0) * math.log((1 - a0) / (1 - a1))
    return stake, math.log(1 / alpha) / kl if stake else math.inf


def negative(a0: float, a1: float, alpha: float) -> Any:
    if a1 == a0:
        return 0.0, math.inf
    stake = (a0 - a1) / (a0 * (1 - a0))
    return stake, math.log(1 / alpha) / _growth(stake, a0, a1)


def _probes() -> list[tuple[Any, ...]]:
    return [(0.8, 0.6, 0.01), (0.7, 0.68, 0.02), (0.8, 0.85, 0.01)]


EXERCISE = Exercise(
    id="ch07.labels_to_alarm",
    parameters=("a0", "a1", "alpha"),
    properties=(
        Property(
            "the stake is the one that grows fastest",
            "Set the derivative of the mean growth of the log wealth to 0.",
            _stake,
        ),
        Property(
            "labels times growth reach the alarm",
            "The log of 1/alpha, over the mean growth at that stake.",
            _labels,
        ),
        Property(
            "without a fall nobody bets",
            "If the accuracy has not fallen, the stake is 0 and the labels are infinite.",
            _never,
        ),
    ),
    mutants=(
        Mutant(
            "The stake is the size of the fall. It has to be measured by the variance of a "
            "pair under the null.",
            no_variance,
        ),
        Mutant(
            "The variance is taken at the accuracy of now. The odds are made at the null's.",
            variance_now,
        ),
        Mutant(
            "The largest stake is taken for the best. One right pair then takes nearly all.", all_in
        ),
        Mutant(
            "The growth is taken to be stake times shortfall. The logarithm bends: at the best "
            "stake about half of that is left.",
            straight,
        ),
        Mutant(
            "The wealth is taken to grow in a straight line to 1/alpha. It is multiplied at "
            "each pair, so its *log* grows in one.",
            no_log,
        ),
        Mutant(
            "The divergence is turned round. Pairs are drawn from what is true now, so the "
            "mean is over a1.",
            turned_kl,
        ),
        Mutant(
            "For an accuracy that has risen the stake is negative. That bets on a rise, and "
            "would raise the alarm of a fall.",
            negative,
        ),
    ),
    probes=_probes,
    hints=(
        "With chance 1 − a1 the pair is wrong and the wealth is multiplied by 1 + stake · a0. By "
        "what else, with chance a1?",
        "The growth is (1 − a1) log(1 + s·a0) + a1 log(1 − s·(1 − a0)). Its derivative is 0 where "
        "a0 − a1 = s · a0 · (1 − a0).",
        "At that stake the growth is the divergence of a coin of a1 from one of a0: "
        "a1 log(a1/a0) + (1 − a1) log((1 − a1)/(1 − a0)).",
    ),
    right="This is the best that anybody can do who knows a1 and when it began (Wald's bound). "
    "Mixing stakes and starts, and a reference that is an estimate, cost more.",
)
