"""Find the bugs in a bettor who watches the accuracy week by week."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property, Unusable
from companion.course.exercises._tools import Attempt, a_kind, close

Weeks = Sequence[Sequence[float]]


def _weeks(seed: int, level: float = 0.7, count: int = 6) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [
        (rng.random(int(rng.integers(3, 30))) < level).astype(float).tolist() for _ in range(count)
    ]


def _right(right: Weeks, a0: float, stake: float) -> list[float]:
    total, out = 0.0, []
    for week in right:
        total += sum(math.log1p(stake * (a0 - one)) for one in week)
        out.append(total)
    return out


def _same(attempt: Attempt, weeks: Weeks, a0: float, stake: float, setting: str) -> None:
    got = attempt([list(week) for week in weeks], a0, stake)
    if isinstance(got, (str, dict)) or not hasattr(got, "__len__"):
        raise Unusable(f"the result: expected a list of numbers, got {a_kind(got)}")
    close(np.asarray(got, dtype=float), _right(weeks, a0, stake), setting)


def _one(attempt: Attempt) -> None:
    _same(attempt, [[0.0]], 0.8, 1.0, "one week with one pair, ordered wrongly; a0 0.8, stake 1")
    _same(attempt, [[1.0]], 0.8, 1.0, "one week with one pair, ordered rightly; a0 0.8, stake 1")


def _product(attempt: Attempt) -> None:
    _same(attempt, [[1.0, 0.0, 1.0, 0.0]], 0.8, 2.0, "one week with two right and two wrong pairs")


def _goes_on(attempt: Attempt) -> None:
    for seed in range(3):
        _same(attempt, _weeks(seed), 0.8, 1.0, "six weeks of 3 to 29 pairs")


def _falls(attempt: Attempt) -> None:
    weeks = [[0.0] * 6, [1.0] * 20, [1.0] * 20]
    _same(attempt, weeks, 0.8, 1.0, "a week of errors, then two without")


def _quiet(attempt: Attempt) -> None:
    _same(attempt, [[0.0, 1.0], [], [0.0]], 0.7, 1.0, "the second of three weeks has no labels")


def _ties(attempt: Attempt) -> None:
    _same(attempt, [[0.5, 0.5, 1.0]], 0.7, 1.0, "two ties (0.5) and a right pair")


def broken(right: Weeks, a0: float, stake: float) -> Any:
    out: list[float] = []
    for week in right:
        wealth = 1.0
        if not week:
            continue
        shortfall = sum(week) / len(week) - a0
        wealth *= 1 + stake * shortfall
        out.append(max(out[-1] if out else 0.0, math.log(wealth)))
    return out


def other_side(right: Weeks, a0: float, stake: float) -> Any:
    return _right([[2 * a0 - one for one in week] for week in right], a0, stake)


def new_money(right: Weeks, a0: float, stake: float) -> Any:
    return [_right([week], a0, stake)[0] for week in right]


def of_the_mean(right: Weeks, a0: float, stake: float) -> Any:
    total, out = 0.0, []
    for week in right:
        if week:
            total += math.log1p(stake * (a0 - sum(week) / len(week)))
        out.append(total)
    return out


def whole_mean(right: Weeks, a0: float, stake: float) -> Any:
    total, out = 0.0, []
    for week in right:
        if week:
            total += len(week) * math.log1p(stake * (a0 - sum(week) / len(week)))
        out.append(total)
    return out


def best_so_far(right: Weeks, a0: float, stake: float) -> Any:
    return np.maximum.accumulate(_right(right, a0, stake)).tolist()


def skips(right: Weeks, a0: float, stake: float) -> Any:
    return _right([week for week in right if week], a0, stake)


def no_ties(right: Weeks, a0: float, stake: float) -> Any:
    return _right([[one for one in week if one != 0.5] for week in right], a0, stake)


def not_logged(right: Weeks, a0: float, stake: float) -> Any:
    return [math.exp(one) for one in _right(right, a0, stake)]


def summed(right: Weeks, a0: float, stake: float) -> Any:
    total, out = 0.0, []
    for week in right:
        total += sum(stake * (a0 - one) for one in week)
        out.append(total)
    return out


def _probes() -> list[tuple[Any, ...]]:
    return [
        (_weeks(9, 0.6), 0.8, 1.0),
        ([[0.0] * 4, [1.0] * 9, [], [0.5, 0.0]], 0.75, 0.5),
    ]


EXERCISE = Exercise(
    id="ch07.weekly_evidence",
    parameters=("right", "a0", "stake"),
    properties=(
        Property(
            "an error makes him richer",
            "After one pair the wealth is 1 + stake · (a0 − right); its log is wanted.",
            _one,
        ),
        Property(
            "he bets on each pair", "Within a week the wealth is multiplied pair by pair.", _product
        ),
        Property(
            "he keeps his wealth from week to week",
            "The log of the wealth after a week holds all pairs until then.",
            _goes_on,
        ),
        Property(
            "he may lose", "The wealth of a week may be less than that of the week before.", _falls
        ),
        Property(
            "a week without labels has an entry",
            "There is one number a week; without labels the wealth stays.",
            _quiet,
        ),
        Property("a tie is half an error", "A pair with 0.5 is bet on as well.", _ties),
    ),
    mutants=(
        Mutant("The script is as it was: it still starts each week with new money.", broken),
        Mutant("The bet is on the other side: he gets richer when the model is right.", other_side),
        Mutant(
            "Each week begins with new money. Fifty-two bettors have fifty-two chances of a "
            "false alarm.",
            new_money,
        ),
        Mutant(
            "One bet a week, on its mean. That is fair, but 200 pairs are one piece of "
            "evidence then, and a week of 3 counts like a week of 300.",
            of_the_mean,
        ),
        Mutant(
            "The week's mean is bet on as often as the week has pairs. The product of the bets "
            "is another number: by the curve of the logarithm this one is larger, and no "
            "longer a fair bet.",
            whole_mean,
        ),
        Mutant(
            "The largest wealth so far is given. For the alarm that does no harm, but it is "
            "not his wealth: nobody sees that the evidence has gone.",
            best_so_far,
        ),
        Mutant(
            "Weeks without labels are left out, so that all later weeks have a wrong number.", skips
        ),
        Mutant(
            "Ties are left out. Where the model was right before, a tie now is half an error.",
            no_ties,
        ),
        Mutant(
            "The wealth itself is given, not its log: after some thousand pairs it overflows.",
            not_logged,
        ),
        Mutant(
            "Winnings are added as if each bet had the stake of the first. Such a bettor can "
            "owe money, and Ville's bound is for wealth that is never negative.",
            summed,
        ),
    ),
    probes=_probes,
    hints=(
        "There are five bugs. What should happen to the wealth between two weeks?",
        "The shortfall of a pair is a0 − right, and there is one factor for each pair. The log of "
        "a product is a sum of logs.",
        "`total += sum(math.log1p(stake * (a0 - one)) for one in week)`, with `total` made before "
        "the loop over weeks, and one `out.append(total)` a week.",
    ),
    right="With several stakes and several starts this is the companion's test. Neither needs to "
    "be known beforehand: a mean of such wealths is one too.",
    broken=broken,
)
