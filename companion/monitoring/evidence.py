"""From labelled pairs to e-processes: has the model fallen, and since when? Chapter 7.

Three kinds of bet, on prompts, each of which counts once:

- accuracy: on the share of pairs that the model orders as people do, against what the reference
  leaves open;
- calibration: on the winner of each pair, against the probability that the margin stands for at
  the temperatures that the reference leaves open; over all pairs, and in bins of the confidence;
- slices: as accuracy, on a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from companion.functional.betting import (
    BET_SHARES,
    bets_of,
    by_group,
    likely_start,
    log_growth,
    mix,
    mix_starts,
)
from companion.functional.resampling import Array
from companion.monitoring.plan import Calibration, Level, Plan, rightness, shortfalls

#: weight of the bets on all pairs; the rest is shared by the bins
_WHOLE: Final = 0.5


@dataclass
class Labels:
    """Labelled pairs with their scores, in the order in which they came.

    Attributes
    ----------
    look : ndarray of int ``[n]``
        At which look each was seen first, counted from 1.
    margin : ndarray ``[n]``
        Raw score of the first minus that of the second.
    outcome : ndarray ``[n]``
        1 if the first was preferred, 0 if the second, 0.5 for a tie.
    prompt : list of str ``[n]``
    slice : list of (str or None) ``[n]``
    """

    look: Any
    margin: Array
    outcome: Array
    prompt: list[str]
    slice: list[str | None]

    def __len__(self) -> int:
        return len(self.prompt)

    def part(self, chosen: Any) -> Labels:
        """Those of a mask or of places."""
        places = np.arange(len(self))[chosen]
        return Labels(
            self.look[chosen],
            self.margin[chosen],
            self.outcome[chosen],
            [self.prompt[i] for i in places],
            [self.slice[i] for i in places],
        )


@dataclass
class Test:
    """One e-process.

    Attributes
    ----------
    name : str
        ``accuracy``, ``calibration``, or ``slice NAME``.
    log_e : list of float
        Of each look.
    threshold : float
        Log of what it may not reach.
    since : int or None
        The look at which the change most likely began; None without an alarm.
    alarm : int or None
        The first look at which it was reached. It stays: what has been shown is not unsaid.
    side : str or None
        Of the calibration: ``overconfident`` or ``underconfident``, whichever has more evidence.
    """

    name: str
    log_e: list[float]
    threshold: float
    since: int | None = None
    alarm: int | None = None
    side: str | None = None


@dataclass
class Evidence:
    """What all labels together say.

    Attributes
    ----------
    tests : list of Test
    looks : list of int
        Those that had labels to bet on.
    used : int
        Pairs that were bet on.
    again : int
        Pairs of a prompt that an earlier look had bet on: they are not independent of it, and are
        left out.
    """

    tests: list[Test]
    looks: list[int]
    used: int
    again: int = 0
    notes: list[str] = field(default_factory=list)


def worst_of(tolerance: float) -> tuple[float, float]:
    """The most that one prompt can speak for the model, in each of the shortfalls."""
    return 0.5 + tolerance, 1.0


def calibration_weights(bins: int) -> Array:
    """Of all pairs together, then of each bin, ``[1 + bins]``."""
    return np.array([_WHOLE, *[(1 - _WHOLE) / bins] * bins])


def measure(plan: Plan, labels: Labels) -> Evidence:
    """The e-processes of all labels so far; the same labels always give the same.

    Parameters
    ----------
    plan : Plan
    labels : Labels
        Chosen for labelling by the plan's rule alone, each pair once, and of other prompts than the
        reference's: its evidence and theirs are multiplied.
    """
    first: dict[str, int] = {}
    for look, prompt in zip(labels.look.tolist(), labels.prompt, strict=True):
        first[prompt] = min(look, first.get(prompt, look))
    fresh = np.array(
        [first[p] == look for look, p in zip(labels.look.tolist(), labels.prompt, strict=True)],
        dtype=bool,
    )
    kept = labels.part(fresh)
    looks = sorted(set(kept.look.tolist()))
    found = Evidence([], looks, len(kept), int((~fresh).sum()))
    if not looks or plan.accuracy is None:
        return found
    found.tests.append(_level_test("accuracy", plan.accuracy, kept, looks))
    if plan.calibration is not None:
        found.tests.append(_calibration_test(plan.calibration, kept, looks))
    for name, level in plan.slices.items():
        own = kept.part(np.array([each == name for each in kept.slice], dtype=bool))
        found.tests.append(_level_test(f"slice {name}", level, own, looks))
    return found


def _level_test(name: str, level: Level, labels: Labels, looks: Sequence[int]) -> Test:
    right = rightness(labels.margin, labels.outcome)
    growth = np.zeros((len(looks), len(level.nulls), len(BET_SHARES)))
    for i, look in enumerate(looks):
        own = np.flatnonzero(labels.look == look)
        if own.size:
            means = by_group(right[own], [labels.prompt[j] for j in own])
            for k, null in enumerate(level.nulls):
                growth[i, k] = log_growth(null - means, bets_of(1 - null))
    log_e = mix(mix_starts(growth)) + level.log_e
    least = log_e.min(axis=-1)
    test = Test(name, least.tolist(), float(-np.log(level.alpha)))
    return _judged(test, growth[:, log_e[-1].argmin()], looks)


def _calibration_test(calibration: Calibration, labels: Labels, looks: Sequence[int]) -> Test:
    right = rightness(labels.margin, labels.outcome)
    confidence = 1 / (1 + np.exp(-np.abs(labels.margin) / calibration.temperature))
    places = np.searchsorted(calibration.edges, confidence)
    bins = len(calibration.edges) + 1
    low, high = np.array(calibration.open)[..., None]
    both = shortfalls(labels.margin, right, low, high, calibration.tolerance)
    inside = np.concatenate([np.ones((1, len(labels))), places == np.arange(bins)[:, None]])
    growth = np.zeros((2, len(looks), len(low), 1 + bins, len(BET_SHARES)))
    for i, look in enumerate(looks):
        own = np.flatnonzero(labels.look == look)
        prompts = [labels.prompt[j] for j in own]
        for side, worst in enumerate(worst_of(calibration.tolerance)):
            short = both[side][:, None, own] * inside[:, own]
            growth[side, i] = log_growth(by_group(short, prompts), bets_of(worst))
    weights = calibration_weights(bins)
    each = [
        mix(mix(mix_starts(own)), weights) + log_e
        for own, log_e in zip(growth, calibration.log_e, strict=True)
    ]
    sides = np.stack([own.min(axis=-1) for own in each])
    test = Test("calibration", mix(sides.T).tolist(), float(-np.log(calibration.alpha)))
    more = int(np.argmax(sides[:, -1]))
    test.side = ("overconfident", "underconfident")[more]
    return _judged(test, growth[more][:, each[more][-1].argmin()], looks)


def _judged(test: Test, growth: Array, looks: Sequence[int]) -> Test:
    over = np.flatnonzero(np.asarray(test.log_e) >= test.threshold)
    if over.size:
        test.alarm = looks[int(over[0])]
        test.since = looks[likely_start(growth)]
    return test
