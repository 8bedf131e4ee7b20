"""How many labels a week catch a change in time: power by simulation. Chapter 7.

A run is simulated as it would be: a reference is drawn and limits are made of it, then labels come
week by week, and the e-processes look at each. So the promise holds for a reference of that size,
not only for the one at hand.
"""

from __future__ import annotations

import math
import warnings
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
from companion.monitoring.plan import Level, Plan, make_plan, shortfalls

#: most labels a week that the planner thinks of
MOST: Final = 20_000
#: so many different margins at most are counted in place of drawn
_COUNTED: Final = 128
#: runs that are held in memory at a time
_PART: Final = 50
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
        if usual - change.size <= 0.5:  # to a coin and beyond, where no margin means anything
            return np.asarray(p * (1 - change.size / usual))
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
    with warnings.catch_warnings():  # of a model that is hardly better than a coin
        warnings.simplefilter("ignore")
        temperature = fit_temperature(signed)
    return make_plan(
        signed,
        np.ones_like(signed),
        names,
        model="simulated",
        model_version="",
        temperature=temperature,
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
    plans = plans or [
        draw_plan(population, reference // population.pairs, rng, **settings) for _ in range(runs)
    ]
    parts = [plans[i : i + _PART] for i in range(0, len(plans), _PART)]
    found = [
        _simulate(population, part, a_week, weeks, change, tests, own)
        for part, own in zip(parts, rng.spawn(len(parts)), strict=True)
    ]
    return {name: np.concatenate([own[name] for own in found]) for name in found[0]}


def _simulate(
    population: Population,
    plans: Sequence[Plan],
    a_week: int,
    weeks: int,
    change: Change | None,
    tests: Sequence[str],
    rng: np.random.Generator,
) -> dict[str, Array]:
    """:func:`simulate` of a few runs."""
    pairs = population.pairs
    # (too small a reference has slices that are not bet on; all references are of one size)
    names = [name for name in plans[0].slices if "slices" in tests]
    sizes = _split(max(a_week // pairs, 1), population.slices or 1)
    draw = _draw_counts if pairs == 1 and population.margins.size <= _COUNTED else _draw_pairs
    right, grown = draw(population, plans, sizes, weeks, change, "calibration" in tests, rng)
    over = {}
    if "accuracy" in tests:
        log_e = _level_log_e([_accuracy(plan) for plan in plans], right.sum(axis=2))
        over["accuracy"] = log_e >= [-math.log(_alpha(plan, "accuracy")) for plan in plans]
    if names:
        each = []
        for name in names:
            levels = [plan.slices[name] for plan in plans]
            log_e = _level_log_e(levels, right[:, :, int(name[1:])])
            each.append(log_e >= [-math.log(level.alpha) for level in levels])
        over["slices"] = np.any(each, axis=0)
    if grown is not None:
        said = [plan.calibration.log_e for plan in plans if plan.calibration]
        log_e = mix(mix(mix_starts(grown)), calibration_weights(grown.shape[-2] - 1)) + said
        log_e = mix(log_e.min(axis=-1))
        over["calibration"] = log_e >= [-math.log(_alpha(plan, "calibration")) for plan in plans]
    return {
        name: np.where(own.any(axis=0), own.argmax(axis=0) + 1, 0) for name, own in over.items()
    }


def _split(prompts: int, slices: int) -> list[int]:
    """Prompts of each slice."""
    return [len(range(i, prompts, slices)) for i in range(slices)]


def _draw_pairs(
    population: Population,
    plans: Sequence[Plan],
    sizes: Sequence[int],
    weeks: int,
    change: Change | None,
    calibration: bool,
    rng: np.random.Generator,
) -> tuple[Array, Array | None]:
    """Every pair is drawn.

    Returns
    -------
    (ndarray ``[weeks, runs, slices, pairs + 1]``, ndarray or None)
        How many prompts have so many pairs that are ordered rightly; and the growth of the
        calibration's bets, ``[weeks, runs, sides, open, 1 + bins, bets]``.
    """
    pairs = population.pairs
    of_slice = np.arange(sum(sizes)) % len(sizes)
    counts, grown = [], []
    for week in range(weeks):
        now = change if change is not None and week >= change.week else None
        margins, right = population.draw(rng, (len(plans), sum(sizes)), now)
        alike = right.sum(axis=-1)[..., None] == np.arange(pairs + 1)
        parts = [alike[:, of_slice == s].sum(axis=1) for s in range(len(sizes))]
        counts.append(np.stack(parts, axis=1).astype(np.float64))
        if calibration:
            grown.append(_calibration_growth(plans, margins, right))
    return np.stack(counts), np.stack(grown) if calibration else None


def _draw_counts(
    population: Population,
    plans: Sequence[Plan],
    sizes: Sequence[int],
    weeks: int,
    change: Change | None,
    calibration: bool,
    rng: np.random.Generator,
) -> tuple[Array, Array | None]:
    """The same of few different margins: how often each comes is drawn, which is much faster."""
    atoms = population.margins.size
    drawn = []
    for week in range(weeks):
        now = change if change is not None and week >= change.week else None
        p = population.right(population.margins, now)
        each = np.concatenate([p, 1 - p]) / atoms
        drawn.append(np.stack([rng.multinomial(n, each, size=len(plans)) for n in sizes], axis=1))
    counts = np.stack(drawn).astype(np.float64)  # [weeks, runs, slices, 2 * atoms]
    right = np.stack([counts[..., atoms:].sum(-1), counts[..., :atoms].sum(-1)], axis=-1)
    if not calibration:
        return right, None
    # what one pair of each margin, first ordered rightly, then wrongly, adds: a run of its own each
    margins = np.tile(population.margins, 2 * len(plans))[:, None, None]
    ordered = np.tile(np.repeat([1.0, 0.0], atoms), len(plans))[:, None, None]
    again = [plan for plan in plans for _ in range(2 * atoms)]
    grown = _calibration_growth(again, margins, ordered)
    table = grown.reshape(len(plans), 2 * atoms, -1)
    total = counts.sum(axis=2).swapaxes(0, 1) @ table  # [runs, weeks, ...]
    return right, total.swapaxes(0, 1).reshape(weeks, len(plans), *grown.shape[1:])


def _level_log_e(levels: Sequence[Any], counts: Array) -> Array:
    """Log of the e-process, ``[weeks, runs]``, of counts ``[weeks, runs, pairs + 1]``."""
    values = np.arange(counts.shape[-1]) / (counts.shape[-1] - 1)
    null = np.array([level.nulls for level in levels])[:, None, :, None]
    table = log_growth((null - values[:, None, None]) / (1 - null), BET_SHARES)
    grown = np.einsum("wrv,rvkb->wrkb", counts, table)
    return (mix(mix_starts(grown)) + [level.log_e for level in levels]).min(axis=-1)


def _accuracy(plan: Plan) -> Level:
    assert plan.accuracy is not None
    return plan.accuracy


def _alpha(plan: Plan, name: str) -> float:
    if name == "accuracy":
        return _accuracy(plan).alpha
    assert plan.calibration is not None
    return plan.calibration.alpha


def _calibration_growth(plans: Sequence[Plan], margins: Array, right: Array) -> Array:
    """``[runs, sides, open, 1 + bins, bets]``."""
    own: list[Any] = [plan.calibration for plan in plans]
    facts = np.array([(c.temperature, c.tolerance) for c in own])
    temperature, tolerance = facts.T[:, :, None, None]
    # (per run its own: what one prompt can lose)
    worst = [side[..., 0] for side in np.broadcast_arrays(*worst_of(tolerance))]
    confidence = _sigmoid(margins / temperature)
    edges = np.array([c.edges for c in own])[:, None, None]
    places = (confidence[..., None] > edges).sum(axis=-1)
    inside = places[:, None] == np.arange(edges.shape[-1] + 1)[:, None, None]
    chosen = np.concatenate([np.ones((len(own), 1, *margins.shape[1:])), inside], axis=1)
    grown = []
    for limits in np.moveaxis(np.array([c.open for c in own]), -1, 0):  # [runs, sides] of each
        low, high = limits.T[:, :, None, None]
        both = shortfalls(margins, right, low, high, tolerance)
        for side, most in zip(both, worst, strict=True):
            if margins.shape[-1] == 1:  # each in one bin: a bet's growth is computed once
                each = log_growth(side / most[..., None], BET_SHARES)
                grown.append(chosen[..., 0] @ each)
            else:
                means = (chosen * side[:, None]).mean(axis=-1)
                grown.append(log_growth(means / most[..., None], BET_SHARES))
    runs, bins, bets = grown[0].shape
    return np.stack(grown, axis=1).reshape(runs, -1, 2, bins, bets).swapaxes(1, 2)


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

    def alarms(a_week: int, some: Sequence[Plan] = plans) -> Array:
        found = simulate(
            few,
            reference=reference,
            a_week=a_week,
            weeks=within,
            runs=len(some),
            seed=seed,
            change=change,
            plans=some,
            tests=(test,),
        )
        return found[test]

    def caught(a_week: int, some: Sequence[Plan] = plans) -> float:
        return float((alarms(a_week, some) > 0).mean())

    asked = {"change": change.kind, "size": change.size, "within": within, "power": power}
    asked |= {"reference": reference}
    usual = float(few.right(few.margins).mean())
    if change.kind == "accuracy" and usual - change.size < 0.5:  # there is no such fall: below it
        return {**asked, "labels_a_week": None, "median_weeks": None, "caught": 0.0}  # is a coin
    high = 16  # doubled until it is enough, first for few runs, as that is soon known
    while high < MOST and caught(high, plans[:_PART]) < power - 0.1:
        high = min(2 * high, MOST)
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
