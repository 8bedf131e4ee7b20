"""How many labels a week catch a change in time: power by simulation. Chapter 7.

A run is simulated as it would be: a reference is drawn and limits are made of it, then labels come
week by week, and the e-processes look at each. So the promise holds for a reference of that size,
not only for the one at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from scipy.special import ndtr

from companion.errors import DataError
from companion.functional.betting import BET_SHARES, log_growth, mix, mix_starts
from companion.functional.calibration import fit_temperature
from companion.functional.resampling import Array
from companion.monitoring.evidence import calibration_weights, worst_of
from companion.monitoring.plan import Plan, make_plan, shortfalls

#: most labels a week that the planner thinks of
MOST: Final = 20_000
#: so many different margins at most are counted in place of drawn
_COUNTED: Final = 128
#: how alike the labels of two pairs of one prompt are, where a prompt has several
LIKENESS: Final = 0.5


@dataclass(frozen=True)
class Population:
    """Pairs as they come: margins, and what they mean.

    Attributes
    ----------
    margins : ndarray ``[n]``
        Absolute raw margins, drawn with replacement.
    inverse : float
        True 1/T.
    pairs : int
        Pairs of one prompt.
    slices : int
        How many slices of equal size there are; 0 for none.
    """

    margins: Array
    inverse: float
    pairs: int = 1
    slices: int = 0

    def coarse(self, atoms: int = 64) -> Population:
        """The same with few margins, which are then counted in place of drawn: much faster."""
        if self.margins.size <= atoms:
            return self
        middles = (np.arange(atoms) + 0.5) / atoms
        return replace(self, margins=np.quantile(self.margins, middles))

    def right(self, margins: Array, change: Change | None = None) -> Array:
        """Probability that pairs of these margins are ordered rightly."""
        p = _sigmoid(margins * self.inverse)
        if change is None:
            return p
        if change.kind == "temperature":
            return _sigmoid(margins * self.inverse / change.size)
        usual = float(_sigmoid(self.margins * self.inverse).mean())
        return np.asarray(p - change.size * (p - 0.5) / (usual - 0.5))

    def draw(
        self, rng: np.random.Generator, shape: tuple[int, ...], change: Change | None = None
    ) -> tuple[Array, Array]:
        """Margins, and whether each pair is ordered rightly, ``[*shape, pairs]``."""
        margins = rng.choice(self.margins, (*shape, self.pairs))
        p = self.right(margins, change)
        if self.pairs == 1:
            return margins, (rng.random(margins.shape) < p).astype(np.float64)
        # pairs of one prompt stand or fall together; each alone is as likely right as it says
        shared = math.sqrt(LIKENESS) * rng.standard_normal((*shape, 1))
        own = math.sqrt(1 - LIKENESS) * rng.standard_normal(margins.shape)
        return margins, (ndtr(shared + own) < p).astype(np.float64)


@dataclass(frozen=True)
class Change:
    """What is to be caught.

    Attributes
    ----------
    kind : {"accuracy", "temperature"}
    size : float
        A fall of the accuracy (0.05), or a factor on the true temperature (1.5: overconfident).
    week : int
        Quiet weeks before.
    """

    kind: str
    size: float
    week: int = 0


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def draw_plan(
    population: Population, prompts: int, rng: np.random.Generator, **settings: Any
) -> Plan:
    """A plan from a reference that is drawn; its temperature is fitted to it."""
    margins, right = population.draw(rng, (prompts,))
    names = [str(i) for i in range(prompts) for _ in range(population.pairs)]
    slices = None
    if population.slices:
        slices = [f"s{int(name) % population.slices}" for name in names]
    signed = np.where(right == 1, margins, -margins).ravel()
    return make_plan(
        signed,
        np.ones_like(signed),
        names,
        model="simulated",
        model_version="",
        temperature=fit_temperature(signed),
        slices=slices,
        **settings,
    )


def simulate(
    population: Population,
    *,
    reference: int,
    a_week: int,
    weeks: int,
    runs: int,
    seed: int,
    change: Change | None = None,
    plans: Sequence[Plan] = (),
    tests: Sequence[str] = ("accuracy", "calibration", "slices"),
    **settings: Any,
) -> dict[str, Array]:
    """Simulate monitors from their reference on.

    Parameters
    ----------
    population : Population
    reference, a_week : int
        Labelled pairs of the reference, and of each week.
    weeks, runs, seed : int
    change : Change, optional
    plans : sequence of Plan ``[runs]``, optional
        Those of :func:`draw_plan`, if they are at hand.
    tests : sequence of str
        Those that are wanted.
    **settings
        Of :func:`companion.monitoring.plan.make_plan`: alpha, tolerances.

    Returns
    -------
    dict of str to ndarray of int ``[runs]``
        For each test the week of its alarm, counted from 1; 0 for none. (``slices``: the first of
        all slices.)
    """
    rng = np.random.default_rng(seed)
    pairs = population.pairs
    plans = plans or [
        draw_plan(population, reference // pairs, rng, **settings) for _ in range(runs)
    ]
    prompts = max(a_week // pairs, 1)
    growth: dict[str, list[Array]] = {name: [] for name in tests}
    # (too small a reference has slices that are not bet on; all references are of one size)
    slices = [s for s in range(population.slices) if f"s{s}" in plans[0].slices]
    has_slices = "slices" in tests and bool(slices)
    counted = None
    if pairs == 1 and not has_slices and population.margins.size <= _COUNTED:
        counted = _tables(population, plans, tests)
    for week in range(weeks):
        now = change if change is not None and week >= change.week else None
        if counted is not None:
            p = population.right(population.margins, now)
            each = np.concatenate([p, 1 - p]) / p.size
            counts = rng.multinomial(prompts, each, size=runs).astype(np.float64)
            for name, table in counted.items():
                growth[name].append(np.einsum("ra,ra...->r...", counts, table))
            continue
        margins, right = population.draw(rng, (runs, prompts), now)
        means = right.mean(axis=-1)
        if "accuracy" in tests:
            levels = [plan.accuracy for plan in plans]
            growth["accuracy"].append(_level_growth(levels, means))
        if has_slices:
            of_slice = np.arange(prompts) % population.slices
            parts = [
                _level_growth([p.slices[f"s{s}"] for p in plans], means[:, of_slice == s])
                for s in slices
            ]
            growth["slices"].append(np.stack(parts, axis=1))
        if "calibration" in tests:
            growth["calibration"].append(_calibration_growth(plans, margins, right))
    alarms = {}
    for name, own in growth.items():
        if not own:
            continue
        log_e = mix(mix_starts(np.stack(own)))
        if name == "calibration":
            log_e = mix(mix(log_e, calibration_weights(log_e.shape[-1] - 1)))
        if name == "slices":
            limits = np.array([[-math.log(s.alpha) for s in p.slices.values()] for p in plans])
            over = (log_e >= limits).any(axis=-1)
        else:
            over = log_e >= np.array([-math.log(_alpha(plan, name)) for plan in plans])
        alarms[name] = np.where(over.any(axis=0), over.argmax(axis=0) + 1, 0)
    return alarms


def _tables(
    population: Population, plans: Sequence[Plan], tests: Sequence[str]
) -> dict[str, Array]:
    """What one pair of each margin, first ordered rightly, then wrongly, adds to the growth."""
    margins = np.tile(population.margins, 2)
    right = np.repeat([1.0, 0.0], population.margins.size)
    runs = len(plans)
    shape = (runs, margins.size, 1)
    alone = np.broadcast_to(margins[:, None], shape), np.broadcast_to(right[:, None], shape)
    tables = {}
    if "accuracy" in tests:
        null = np.array([p.accuracy.null for p in plans])[:, None, None]
        tables["accuracy"] = log_growth((null - alone[1]) / (1 - null), BET_SHARES)
    if "calibration" in tests:
        # [runs, atoms, sides, 1 + bins, bets]: each atom is a prompt, and a run of its own
        again = [plan for plan in plans for _ in range(margins.size)]
        flat = [one.reshape(-1, 1, 1) for one in alone]
        grown = _calibration_growth(again, *flat)
        tables["calibration"] = grown.reshape(runs, margins.size, *grown.shape[1:])
    return tables


def _alpha(plan: Plan, name: str) -> float:
    if name == "accuracy":
        return plan.accuracy.alpha
    assert plan.calibration is not None
    return plan.calibration.alpha


def _level_growth(levels: Sequence[Any], means: Array) -> Array:
    null = np.array([level.null for level in levels])[:, None]
    return log_growth((null - means) / (1 - null), BET_SHARES)


def _calibration_growth(plans: Sequence[Plan], margins: Array, right: Array) -> Array:
    """``[runs, sides, 1 + bins, bets]``."""
    own: list[Any] = [plan.calibration for plan in plans]
    facts = np.array([(*c.inverse[1:], c.temperature, c.tolerance) for c in own])
    low, high, temperature, tolerance = facts.T[:, :, None, None]
    # (per run its own: what one prompt can lose)
    worst = [side[..., 0] for side in np.broadcast_arrays(*worst_of(tolerance))]
    confidence = _sigmoid(margins / temperature)
    places = sum(
        (confidence > np.array([c.edges[i] for c in own])[:, None, None]).astype(int)
        for i in range(len(own[0].edges))
    )
    sides = []
    both = shortfalls(margins, right, low, high, tolerance)
    if margins.shape[-1] == 1:  # each in one bin, so that a bet's growth is computed once
        inside = places[..., 0] == np.arange(len(own[0].edges) + 1)[:, None, None]
        chosen = np.concatenate([np.ones((1, *inside.shape[1:])), inside]).swapaxes(0, 1)
        each = [
            log_growth(side / most[..., None], BET_SHARES)
            for side, most in zip(both, worst, strict=True)
        ]
        return np.stack([chosen @ grown for grown in each], axis=1)
    for side, most in zip(both, worst, strict=True):
        bins = [side.mean(axis=-1)]
        bins += [np.where(places == b, side, 0.0).mean(-1) for b in range(len(own[0].edges) + 1)]
        sides.append(np.stack([log_growth(d / most, BET_SHARES) for d in bins], axis=1))
    return np.stack(sides, axis=1)


# ---------------------------------------------------------------------- the promise


def promise(
    population: Population,
    change: Change,
    *,
    reference: int,
    within: int,
    power: float = 0.9,
    runs: int = 400,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """The labels a week that catch a change within some weeks, by simulation.

    Parameters
    ----------
    population : Population
    change : Change
        From the first week on; only its own test counts (a fall of accuracy may also show as an
        error of calibration, but need not).
    reference : int
        Prompts of the reference.
    within : int
        Weeks.
    power : float
        Chance of being caught.
    runs, seed, **settings
        As in :func:`simulate`.

    Returns
    -------
    dict
        ``labels_a_week`` (of prompts with one pair each: several pairs of a prompt help, but nobody
        knows how much before they are labelled), None where no number up to 20,000 does;
        ``median_weeks`` at that number; ``caught``, the share of runs; and what was asked.

    Raises
    ------
    DataError
        For a change that none can be.
    """
    if change.kind == "accuracy" and not 0 < change.size < 0.5:
        raise DataError(f"a fall of {change.size}", "give a share such as 0.05")
    if change.kind == "temperature" and not change.size > 1:
        raise DataError(f"a factor of {change.size}", "give one above 1, such as 1.5")
    test = "accuracy" if change.kind == "accuracy" else "calibration"

    few = replace(population, pairs=1, slices=0).coarse()
    rng = np.random.default_rng(seed)
    plans = [draw_plan(few, reference, rng, **settings) for _ in range(runs)]

    def alarms(a_week: int) -> Array:
        found = simulate(
            few,
            reference=reference,
            a_week=a_week,
            weeks=within,
            runs=runs,
            seed=seed,
            change=change,
            plans=plans,
            tests=(test,),
        )
        return found[test]

    def caught(a_week: int) -> float:
        return float((alarms(a_week) > 0).mean())

    asked = {"change": change.kind, "size": change.size, "within": within, "power": power}
    asked |= {"reference": reference}
    high = 16  # doubled until it is enough
    while (share := caught(high)) < power:
        if high >= MOST:
            return {**asked, "labels_a_week": None, "median_weeks": None, "caught": share}
        high = min(2 * high, MOST)
    low = high // 2
    while high - low > max(high // 50, 1):
        half = (low + high) // 2
        low, high = (low, half) if caught(half) >= power else (half, high)
    found = alarms(high)
    weeks = np.sort(np.where(found == 0, within + 1, found))
    return {
        **asked,
        "labels_a_week": high,
        "median_weeks": int(weeks[len(weeks) // 2]),
        "caught": float((found > 0).mean()),
    }
