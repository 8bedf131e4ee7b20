"""Carry a raw threshold of an old version over to a new one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, expect, number

Array = np.ndarray[Any, np.dtype[np.float64]]


def _versions(seed: int, count: int = 40) -> tuple[Array, Array]:
    """Scores of one reference by two versions that differ in shift, scale, shape and noise."""
    rng = np.random.default_rng(seed)
    good = rng.normal(size=count)
    old = good + 0.3 * rng.normal(size=count)
    new = np.exp(0.8 * (good + 0.3 * rng.normal(size=count))) + 2
    return old, new


def _passing(scores: Array, threshold: float) -> int:
    return int((scores >= threshold).sum())


def _between(scores: Array, count: int) -> float:
    """The middle of the gap above which so many scores lie."""
    ordered = np.sort(scores)[::-1]
    if count == 0:
        return math.inf
    if count == len(ordered):
        return -math.inf
    return float(ordered[count - 1] + ordered[count]) / 2


def _ask(attempt: Attempt, threshold: float, old: Array, new: Array) -> float:
    got = number(attempt(threshold, old, new), "the new threshold")
    expect(not math.isnan(got), "the new threshold is NaN")
    return got


def _count(attempt: Attempt) -> None:
    for seed in range(4):
        old, new = _versions(seed)
        for kept in (1, 4, 13, 30):
            threshold = _between(old, kept)
            got = _passing(new, _ask(attempt, threshold, old, new))
            expect(got == kept, f"{kept} of 40 pass {threshold:.3f} with the old version, {got} "
                                "pass the new threshold with the new one")  # fmt: skip


def _at_a_score(attempt: Attempt) -> None:
    for seed in range(3):
        old, new = _versions(seed)
        threshold = float(np.sort(old)[-7])
        got = _passing(new, _ask(attempt, threshold, old, new))
        expect(got == 7, f"the old threshold is the score of a text, which passes (>=), as six "
                         f"better ones do: {got} pass the new threshold")  # fmt: skip


def _middle(attempt: Attempt) -> None:
    for seed in range(3):
        old, new = _versions(seed)
        for kept in (2, 11, 25):
            got, want = _ask(attempt, _between(old, kept), old, new), _between(new, kept)
            expect(math.isclose(got, want, rel_tol=1e-6), f"{kept} of 40 are to pass: the new "
                   f"threshold is {got:.4f}; the middle of the gap is {want:.4f}")  # fmt: skip


def _ends(attempt: Attempt) -> None:
    old, new = _versions(5)
    for threshold, want in ((old.max() + 1, math.inf), (old.min() - 1, -math.inf)):
        got = _ask(attempt, float(threshold), old, new)
        what = "no text passes" if want > 0 else "every text passes"
        expect(got == want, f"{what} the old threshold: the new one is {got:g}, not {want:g}")


def _ties(attempt: Attempt) -> None:
    old = np.arange(10.0)
    new = np.array([0.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 4.0, 5.0, 6.0])
    for kept, want in ((4, 3), (6, 7), (5, 3), (8, 8)):
        got = _passing(new, _ask(attempt, 10.0 - kept - 0.5, old, new))
        expect(got == want, f"the new version scores ten texts {new.tolist()}, and {kept} are to "
                            f"pass: {got} do, and {want} would be nearest (of two that are as "
                            "near, the fewer)")  # fmt: skip


def _shuffled(attempt: Attempt) -> None:
    old, new = _versions(6)
    threshold = _between(old, 9)
    want = _ask(attempt, threshold, old, new)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(old))
        got = _ask(attempt, threshold, old, new[order])
        expect(math.isclose(got, want, rel_tol=1e-9), "the same scores of the new version in "
               f"another order: {got:.4f}, before it was {want:.4f}")  # fmt: skip


def _nearest(threshold: float, old: Array, new: Array, prefer: int = 1) -> float:
    kept, values = _passing(old, threshold), np.unique(new)
    cuts = [-math.inf, *((values[1:] + values[:-1]) / 2).tolist(), math.inf]

    def cost(cut: float) -> tuple[int, float]:
        return abs(_passing(new, cut) - kept), prefer * _passing(new, cut)

    return float(min(cuts, key=cost))


def unchanged(threshold: float, old: Array, new: Array) -> float:
    return threshold


def shifted(threshold: float, old: Array, new: Array) -> float:
    return float(threshold - old.mean() + new.mean())


def by_z(threshold: float, old: Array, new: Array) -> float:
    z = (threshold - old.mean()) / old.std(ddof=1)
    return float(new.mean() + z * new.std(ddof=1))


def regression(threshold: float, old: Array, new: Array) -> float:
    slope, intercept = np.polyfit(old, new, 1)
    return float(slope * threshold + intercept)


def same_text(threshold: float, old: Array, new: Array) -> float:
    return float(new[np.abs(old - threshold).argmin()])


def worst_that_passed(threshold: float, old: Array, new: Array) -> float:
    passed = old >= threshold
    return float(new[passed].min()) if passed.any() else math.inf


def strict(threshold: float, old: Array, new: Array) -> float:
    kept = int((old > threshold).sum())
    return _nearest(_between(old, kept), old, new)


def turned(threshold: float, old: Array, new: Array) -> float:
    kept = len(old) - _passing(old, threshold)
    return _nearest(_between(old, kept), old, new)


def interpolated(threshold: float, old: Array, new: Array) -> float:
    return float(np.quantile(new, (old < threshold).mean()))


def edge(threshold: float, old: Array, new: Array) -> float:
    cut = _nearest(threshold, old, new)
    return cut if math.isinf(cut) else float(new[new >= cut].min())


def finite_ends(threshold: float, old: Array, new: Array) -> float:
    cut = _nearest(threshold, old, new)
    return float(np.clip(cut, new.min(), new.max()))


def more_at_ties(threshold: float, old: Array, new: Array) -> float:
    return _nearest(threshold, old, new, prefer=-1)


def cuts_a_tie(threshold: float, old: Array, new: Array) -> float:
    return _between(new, _passing(old, threshold))


def _probes() -> list[tuple[Any, ...]]:
    old, new = _versions(11)
    ties = np.array([0.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 4.0, 5.0, 6.0])
    return [
        (_between(old, 5), old, new),
        (_between(old, 21), old, new),
        (float(np.sort(old)[-7]), old, new),
        (float(old.max()) + 1, old, new),
        (4.5, np.arange(10.0), ties),
        (5.5, np.arange(10.0), ties),
    ]


EXERCISE = Exercise(
    id="ch06.new_threshold",
    parameters=("threshold", "old", "new"),
    properties=(
        Property(
            "as many texts pass as before",
            "As many texts of the reference should pass with the new version as did with the old.",
            _count,
        ),
        Property(
            "a text at the threshold passes",
            "A text passes if its score is at least the threshold.",
            _at_a_score,
        ),
        Property(
            "it lies in the middle of the gap",
            "The threshold should lie half-way between the last score that passes and the next.",
            _middle,
        ),
        Property(
            "infinite where all pass, or none",
            "If no text passes return inf, if every text does −inf.",
            _ends,
        ),
        Property(
            "at ties the nearest count, and the fewer of two",
            "Where ties make the count impossible take the nearest one; of two, the fewer texts.",
            _ties,
        ),
        Property(
            "only the two distributions matter",
            "The new threshold may depend on which scores the new version gave, not to which text.",
            _shuffled,
        ),
    ),
    mutants=(
        Mutant(
            "The raw threshold is carried over as it is. The loss leaves shift and scale of a "
            "model open; the same number is another place in the new version's scores.",
            unchanged,
        ),
        Mutant(
            "Only the means are made equal. Two versions differ in scale and shape as well.",
            shifted,
        ),
        Mutant(
            "The threshold is carried over in standard deviations. That keeps the share if both "
            "distributions have one shape; a skewed one keeps another share.",
            by_z,
        ),
        Mutant(
            "A line is fitted from old scores to new ones. It goes through the *mean* new score "
            "of such texts, which lies nearer to the middle: regression to the mean.",
            regression,
        ),
        Mutant(
            "The text nearest to the old threshold is looked up, and its new score taken. One "
            "text's two scores differ by noise; the share belongs to all texts.",
            same_text,
        ),
        Mutant(
            "All texts that passed are to pass again. So the one that the new version likes least "
            "sets the threshold, and many others come in with it.",
            worst_that_passed,
        ),
        Mutant(
            "A text at the threshold is left out: `>` in place of `>=`.",
            strict,
        ),
        Mutant(
            "The share is turned round: as many pass now as failed before.",
            turned,
        ),
        Mutant(
            "`np.quantile` interpolates between scores by their ranks, n − 1 steps for n texts: "
            "its value does not lie in the middle of the gap, and at the ends it stays finite.",
            interpolated,
        ),
        Mutant(
            "The threshold is a score itself. The next rounding, on another machine, puts that "
            "text on the other side: stay away from both neighbours.",
            edge,
            "reward-bench #137",
        ),
        Mutant(
            "At the ends it stays finite. Nothing of the reference passed; tomorrow's best text "
            "of the traffic would.",
            finite_ends,
        ),
        Mutant(
            "Of two counts that are as near the larger one is taken: a filter lets more through.",
            more_at_ties,
        ),
        Mutant(
            "Ties are cut in the middle: the threshold falls on their common score, and all of "
            "them pass, or what comes out is far from the nearest count.",
            cuts_a_tie,
        ),
    ),
    probes=_probes,
    hints=(
        "How many texts of the reference pass with the old version? The texts themselves do not "
        "matter any more.",
        "Between two neighbouring *different* scores of the new version lies a cut. Each cut lets "
        "a number of texts pass, and so do −inf and inf.",
        "Make the cuts from `np.unique(new)`, and take the one with the least `(abs(passing - "
        "kept), passing)`.",
    ),
    right="That is what a percentile threshold does for you, once and for all versions: each has "
    "the quantiles of the reference in its manifest, and the share stays.",
)
