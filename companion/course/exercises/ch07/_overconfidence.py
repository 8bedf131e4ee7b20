"""Write by how much a model is surer than it is right, bin by bin."""

from __future__ import annotations

from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, kind

Array = np.ndarray[Any, np.dtype[np.float64]]


def _pairs(seed: int, count: int = 400) -> tuple[Array, Array]:
    """Margins, and the label of a world in which the model is too sure."""
    rng = np.random.default_rng(seed)
    margin = rng.normal(0, 2, count)
    outcome = (rng.random(count) < 1 / (1 + np.exp(-margin / 2))).astype(float)
    return margin, outcome


def _core(
    margin: Array,
    outcome: Array,
    bins: int,
    *,
    low: float = 0.5,
    always_right: bool = False,
    probability: bool = False,
    lose_low: bool = False,
    empty: float = np.nan,
    weighted: bool = False,
    tie: float = 0.5,
) -> Array:
    p = 1 / (1 + np.exp(-margin))
    sure = p if probability else np.maximum(p, 1 - p)
    first = np.where(margin == 0, tie, (margin > 0).astype(float))
    right = first * outcome + (1 - first) * (1 - outcome)
    if always_right:
        right = first
    if probability:
        right = outcome
    place = np.clip(((sure - low) / (1 - low) * bins).astype(int), 0, bins - 1)
    if lose_low:
        place = np.where(sure == low, -1, place)
    gaps = np.full(bins, empty)
    for b in range(bins):
        inside = place == b
        if inside.any():
            gaps[b] = sure[inside].mean() - right[inside].mean()
            if weighted:
                gaps[b] *= inside.mean()
    return gaps


def _same(attempt: Attempt, margin: Any, outcome: Any, bins: int, setting: str) -> None:
    m, o = np.asarray(margin, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    got = attempt(m, o, bins)
    kind(got, np.ndarray, f"a NumPy array of shape [{bins}]")
    close(got, _core(m, o, bins), setting)


def _gaps(attempt: Attempt) -> None:
    for seed, bins in ((0, 5), (1, 10), (2, 3)):
        _same(attempt, *_pairs(seed), bins, f"400 pairs in {bins} bins")


def _label(attempt: Attempt) -> None:
    _same(attempt, [3.0, 3.0, -3.0, -3.0], [1, 0, 0, 0], 2,
          "margins 3, 3, −3, −3, and the first preferred in the first pair only")  # fmt: skip


def _tie(attempt: Attempt) -> None:
    _same(attempt, [0.0, 0.0, 0.0], [1, 1, 0], 5, "three margins of exactly 0")


def _labelled_tie(attempt: Attempt) -> None:
    _same(attempt, [1.0, 2.0], [0.5, 0.5], 4, "two pairs that people call a tie")


def _empty(attempt: Attempt) -> None:
    _same(attempt, [4.0, 5.0], [1, 1], 5, "two sure pairs, so that four of five bins are empty")


def _certain(attempt: Attempt) -> None:
    _same(attempt, [50.0, 60.0], [1, 0], 5, "margins of 50 and 60: a confidence of exactly 1")


def whole_width(margin: Array, outcome: Array, bins: int) -> Array:
    return _core(margin, outcome, bins, low=0.0)


def always_one(margin: Array, outcome: Array, bins: int) -> Array:
    return _core(margin, outcome, bins, always_right=True)


def of_first(margin: Array, outcome: Array, bins: int) -> Array:
    return _core(margin, outcome, bins, low=0.0, probability=True)


def without_ties(margin: Array, outcome: Array, bins: int) -> Array:
    return _core(margin, outcome, bins, lose_low=True)


def zero_if_empty(margin: Array, outcome: Array, bins: int) -> Array:
    return _core(margin, outcome, bins, empty=0.0)


def with_weights(margin: Array, outcome: Array, bins: int) -> Array:
    return _core(margin, outcome, bins, weighted=True)


def absolute(margin: Array, outcome: Array, bins: int) -> Array:
    return np.abs(_core(margin, outcome, bins))


def turned(margin: Array, outcome: Array, bins: int) -> Array:
    return -_core(margin, outcome, bins)


def tie_is_wrong(margin: Array, outcome: Array, bins: int) -> Array:
    made = _core(margin[outcome != 0.5], outcome[outcome != 0.5], bins)
    return made


def last_lost(margin: Array, outcome: Array, bins: int) -> Array:
    sure = 1 / (1 + np.exp(-np.abs(margin)))
    return _core(margin[sure < 1], outcome[sure < 1], bins)


def _probes() -> list[tuple[Any, ...]]:
    margin, outcome = _pairs(9, 60)
    mixed = np.array([0.0, 0.0, 1.0, 2.0, 40.0])
    return [
        (margin, outcome, 5),
        (mixed, np.array([1.0, 1.0, 0.5, 0.0, 1.0]), 5),
        (np.array([1.0, 1.5]), np.array([0.5, 1.0]), 2),
    ]


EXERCISE = Exercise(
    id="ch07.overconfidence",
    parameters=("margin", "outcome", "bins"),
    properties=(
        Property(
            "a bin's gap is confidence minus the share that is right",
            "Positive where the model is too sure, each bin by itself, bins of equal width "
            "from 0.5 to 1.",
            _gaps,
        ),
        Property(
            "right is what the label agrees with",
            "A pair is right if the label prefers the one with the higher score.",
            _label,
        ),
        Property(
            "a margin of 0 is in the first bin",
            "It has a confidence of 0.5, and is right by half.",
            _tie,
        ),
        Property(
            "a tie of the annotators is right by half",
            "An outcome of 0.5 counts one half.",
            _labelled_tie,
        ),
        Property("an empty bin is NaN", "A bin without pairs has no gap: NaN.", _empty),
        Property(
            "a confidence of exactly 1 is in the last bin", "The last bin is closed.", _certain
        ),
    ),
    mutants=(
        Mutant(
            "The bins begin at 0. A confidence is never below one half, so half of them stay "
            "empty.",
            whole_width,
        ),
        Mutant(
            "The label is not looked at: right is that the margin is positive. That is the "
            "outcome that is always 1.",
            always_one,
        ),
        Mutant(
            "The probability of the first is compared with its winning. That is calibration "
            "too, but of another number: asked for is the confidence in the choice.",
            of_first,
        ),
        Mutant("Bins (lo, hi] have no place for a confidence of exactly one half.", without_ties),
        Mutant(
            "An empty bin is given a gap of 0: it looks perfect, and holds nothing.", zero_if_empty
        ),
        Mutant(
            "The gap is multiplied by the bin's share of the pairs. That is a term of the ECE, "
            "and a full bin looks worse than a bad one.",
            with_weights,
        ),
        Mutant("The sign is dropped. Too sure and too shy are mended in opposite ways.", absolute),
        Mutant("Accuracy minus confidence: positive where the model is too shy.", turned),
        Mutant(
            "Pairs that people call a tie are left out. The model was sure of something there.",
            tie_is_wrong,
        ),
        Mutant(
            "A confidence of exactly 1 falls out of the last bin: the surest pairs, and the "
            "worst errors.",
            last_lost,
        ),
    ),
    probes=_probes,
    hints=(
        "Make three arrays first: the confidence, whether the pair is right, and the bin.",
        "Right is `outcome` where the margin is positive, `1 - outcome` where it is negative, "
        "0.5 where it is 0.",
        "The bin is `((sure - 0.5) * 2 * bins).astype(int)`, at most `bins - 1`; begin with "
        "`np.full(bins, np.nan)`.",
    ),
    right="Drawn over the bins, this is the reliability diagram seen from the diagonal. Its sign "
    "says which way the temperature has to go.",
)
