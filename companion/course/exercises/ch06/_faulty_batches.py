"""Find the bugs in the monitor that compares served scores with the scores alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property, Unusable
from companion.course.exercises._tools import Attempt, a_kind, expect, show

Array = np.ndarray[Any, np.dtype[np.float64]]
Batches = np.ndarray[Any, np.dtype[np.int64]]
LARGE = 100.0


def _clean(seed: int, count: int = 24) -> tuple[Array, Array, Batches]:
    """Served and alone, equal up to rounding, in six batches whose numbers lie mixed."""
    rng = np.random.default_rng(seed)
    alone = rng.normal(size=count)
    served = alone + 2e-6 * rng.uniform(-1, 1, size=count)
    return served, alone, rng.permutation(np.arange(count) % 6 + 10)


def _right(served: Array, alone: Array, batch: Batches, tolerance: float) -> list[int]:
    with np.errstate(invalid="ignore"):
        apart = ~((np.abs(served - alone) <= tolerance) | (served == alone))
    apart &= ~(np.isnan(served) & np.isnan(alone))
    return [int(b) for b in np.unique(batch[apart])]


def _ask(attempt: Attempt, served: Array, alone: Array, batch: Batches, tol: float) -> list[int]:
    got = attempt(served, alone, batch, tol)
    if isinstance(got, (str, dict)) or not hasattr(got, "__iter__"):
        raise Unusable(f"the result: expected a list of batch numbers, got {a_kind(got)}")
    try:
        return [int(one) for one in got]
    except (TypeError, ValueError):
        raise Unusable(f"the result: expected whole numbers, got {show(got)}") from None


def _same(attempt: Attempt, case: tuple[Array, Array, Batches], tol: float, setting: str) -> None:
    got, want = _ask(attempt, *case, tol), _right(*case, tol)
    expect(got == want, f"{setting}: {show(got)}; it should be {show(want)}")


def _nothing(attempt: Attempt) -> None:
    for seed in range(3):
        _same(attempt, _clean(seed), 1e-5, "24 texts, all within 2e-6 of their scores alone")


def _both_ways(attempt: Attempt) -> None:
    for seed in range(3):
        for gap in (0.3, -0.3, 2e-4, -2e-4):
            served, alone, batch = _clean(seed)
            served[7] += gap
            _same(attempt, (served, alone, batch), 1e-5,
                  f"text 7, of batch {batch[7]}, is served {gap:+g} away")  # fmt: skip


def _absolute(attempt: Attempt) -> None:
    served, alone, batch = _clean(4)
    served[3], alone[3] = LARGE + 5e-4, LARGE
    _same(attempt, (served, alone, batch), 1e-5,
          f"text 3, of batch {batch[3]}, scores 100 alone and 100.0005 served")  # fmt: skip
    served, alone, batch = _clean(5)
    served[3], alone[3] = 4e-7, 1e-9
    _same(attempt, (served, alone, batch), 1e-5, "text 3 scores 1e-9 alone and 4e-7 served")


def _nan(attempt: Attempt) -> None:
    for one, other, setting in (
        (np.nan, 0.5, "text 9 is served NaN, and scores 0.5 alone"),
        (0.5, np.nan, "text 9 is served 0.5, and has no score alone (NaN)"),
        (np.inf, 0.5, "text 9 is served inf, and scores 0.5 alone"),
        (np.nan, 3e-6, "text 9 is served NaN, and scores 3e-6 alone"),
    ):
        served, alone, batch = _clean(6)
        served[9], alone[9] = one, other
        _same(attempt, (served, alone, batch), 1e-5, f"{setting}; its batch is {batch[9]}")


def _no_score(attempt: Attempt) -> None:
    served, alone, batch = _clean(7)
    served[9] = alone[9] = np.nan
    _same(attempt, (served, alone, batch), 1e-5, "text 9 has no score (NaN), served and alone")


def _once(attempt: Attempt) -> None:
    served, alone, batch = _clean(8)
    for text in range(24):
        if batch[text] in (14, 11):
            served[text] += 0.1 * (-1) ** text
    _same(attempt, (served, alone, batch), 1e-5, "all texts of the batches 14 and 11 deviate")


def _cancel(attempt: Attempt) -> None:
    served, alone, batch = _clean(9)
    one, other = np.flatnonzero(batch == 12)[:2]
    served[one], served[other] = alone[other], alone[one]
    _same(attempt, (served, alone, batch), 1e-5,
          "two texts of batch 12 were served each other's score")  # fmt: skip


def broken(served: Array, alone: Array, batch: Batches, tolerance: float) -> Any:
    faulty = []
    for number in batch:
        inside = batch == number
        gap = served[inside].mean() - alone[inside].mean()
        if gap > tolerance * abs(alone[inside].mean()):
            faulty.append(int(number))
    return faulty


def _numbers(apart: Any, batch: Batches) -> list[int]:
    return [int(b) for b in np.unique(batch[apart])]


def signed(served: Array, alone: Array, batch: Batches, tolerance: float) -> Any:
    with np.errstate(invalid="ignore"):
        apart = ~(served - alone <= tolerance) & ~(np.isnan(served) & np.isnan(alone))
    return _numbers(apart, batch)


def relative(served: Array, alone: Array, batch: Batches, tolerance: float) -> Any:
    with np.errstate(invalid="ignore"):
        near = np.abs(served - alone) <= tolerance * np.abs(alone)
    return _numbers(~near & ~(np.isnan(served) & np.isnan(alone)), batch)


def close_by_numpy(served: Array, alone: Array, batch: Batches, tolerance: float) -> Any:
    near = np.isclose(served, alone, atol=tolerance, equal_nan=True)  # rtol stays at 1e-5
    return _numbers(~near, batch)


def nan_passes(served: Array, alone: Array, batch: Batches, tolerance: float) -> Any:
    with np.errstate(invalid="ignore"):
        return _numbers(np.abs(served - alone) > tolerance, batch)


def nan_never_equal(served: Array, alone: Array, batch: Batches, tolerance: float) -> Any:
    with np.errstate(invalid="ignore"):
        return _numbers(~(np.abs(served - alone) <= tolerance), batch)


def nan_is_zero(served: Array, alone: Array, batch: Batches, tolerance: float) -> Any:
    gap = np.nan_to_num(np.abs(np.nan_to_num(served) - np.nan_to_num(alone)))
    return _numbers(gap > tolerance, batch)


def texts_not_batches(served: Array, alone: Array, batch: Batches, tolerance: float) -> Any:
    with np.errstate(invalid="ignore"):
        apart = ~(np.abs(served - alone) <= tolerance) & ~(np.isnan(served) & np.isnan(alone))
    return np.flatnonzero(apart).tolist()


def with_repeats(served: Array, alone: Array, batch: Batches, tolerance: float) -> Any:
    with np.errstate(invalid="ignore"):
        apart = ~(np.abs(served - alone) <= tolerance) & ~(np.isnan(served) & np.isnan(alone))
    return sorted(batch[apart].tolist())


def batch_means(served: Array, alone: Array, batch: Batches, tolerance: float) -> Any:
    found = []
    for number in np.unique(batch):
        inside = batch == number
        one, other = served[inside], alone[inside]
        blank = np.isnan(one) & np.isnan(other)
        gap = abs(one[~blank].mean() - other[~blank].mean())
        if not gap <= tolerance:
            found.append(int(number))
    return found


def sorted_scores(served: Array, alone: Array, batch: Batches, tolerance: float) -> Any:
    found = []
    for number in np.unique(batch):
        inside = batch == number
        one, other = np.sort(served[inside]), np.sort(alone[inside])
        with np.errstate(invalid="ignore"):
            near = (np.abs(one - other) <= tolerance) | (np.isnan(one) & np.isnan(other))
        if not near.all():
            found.append(int(number))
    return found


def to_the_bit(served: Array, alone: Array, batch: Batches, tolerance: float) -> Any:
    return _numbers((served != alone) & ~(np.isnan(served) & np.isnan(alone)), batch)


def good_ones(served: Array, alone: Array, batch: Batches, tolerance: float) -> Any:
    bad = _right(served, alone, batch, tolerance)
    return [int(b) for b in np.unique(batch) if b not in bad]


def _probes() -> list[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = []
    for seed, changes in enumerate(
        (
            {},
            {7: 0.3},
            {7: -0.3},
            {3: LARGE},
            {5: 1e-9},
            {9: np.nan},
        )
    ):
        served, alone, batch = _clean(20 + seed)
        for text, change in changes.items():
            if change == LARGE:
                served[text], alone[text] = LARGE + 5e-4, LARGE
            elif change == 1e-9:
                served[text], alone[text] = 4e-7, 1e-9
            else:
                served[text] += change
        made.append((served, alone, batch, 1e-5))
    served, alone, batch = _clean(30)
    served[9] = alone[9] = np.nan
    served[4] += 0.2
    made.append((served, alone, batch, 1e-5))
    served, alone, batch = _clean(33)
    served[9], alone[9] = np.nan, 3e-6
    made.append((served, alone, batch, 1e-5))
    served, alone, batch = _clean(31)
    served[batch == 12] += np.where(np.arange((batch == 12).sum()) % 2, 0.1, -0.1)
    made.append((served, alone, batch, 1e-5))
    served, alone, batch = _clean(32)
    one, other = np.flatnonzero(batch == 13)[:2]
    served[one], served[other] = alone[other], alone[one]
    made.append((served, alone, batch, 1e-5))
    return made


EXERCISE = Exercise(
    id="ch06.faulty_batches",
    parameters=("served", "alone", "batch", "tolerance"),
    broken=broken,
    properties=(
        Property(
            "rounding is no fault",
            "Batches whose scores are within the tolerance should not be named.",
            _nothing,
        ),
        Property(
            "too low is as wrong as too high",
            "A served score may lie on either side of the score alone.",
            _both_ways,
        ),
        Property(
            "the tolerance is absolute",
            "The tolerance is in logits, whether the score is 100 or nearly 0.",
            _absolute,
        ),
        Property(
            "a score that is not finite on one side is a fault",
            "If one of the two is NaN or infinite and the other is not, the batch is faulty.",
            _nan,
        ),
        Property(
            "a text that has no score, has none",
            "If a text has no score (NaN) alone and none when served, that is the same.",
            _no_score,
        ),
        Property(
            "each faulty batch once, in ascending order",
            "Return the numbers of the faulty batches, each once, in ascending order.",
            _once,
        ),
        Property(
            "texts are compared one by one",
            "Scores of a batch that were mixed up, or errors that cancel, are faults too.",
            _cancel,
        ),
    ),
    mutants=(
        Mutant(
            "Nothing is mended yet: means are compared, with their sign, relative to their size, "
            "and a batch comes up once for each of its texts.",
            broken,
        ),
        Mutant(
            "The difference keeps its sign, so a score that is too low always passes. Padding "
            "that is read as text makes scores too low as often as too high.",
            signed,
        ),
        Mutant(
            "The tolerance is taken relative to the score. A score is only known up to a shift, "
            "so nearly 0 is no small score: there nothing would pass, and at 100 everything.",
            relative,
        ),
        Mutant(
            "`np.isclose` adds a relative part of 1e-5 by itself: at a score of 100 a thousandth "
            "of a logit passes. Say `rtol=0`.",
            close_by_numpy,
        ),
        Mutant(
            "NaN passes: every comparison with NaN is False, so `gap > tolerance` never sees a "
            "text whose served score was lost.",
            nan_passes,
        ),
        Mutant(
            "A text that cannot be scored is blamed on the server. It has no score alone either, "
            "and NaN is not equal to NaN: ask for that case.",
            nan_never_equal,
        ),
        Mutant(
            "A missing score is taken for 0. That is a reward like any other, and near 0 nobody "
            "sees the loss.",
            nan_is_zero,
            "verl-omni #366",
        ),
        Mutant(
            "The texts are returned. What has to be looked at is the batch: its width, its side, "
            "its neighbours.",
            texts_not_batches,
        ),
        Mutant(
            "A batch comes up as often as it has faulty texts. Each number once.",
            with_repeats,
        ),
        Mutant(
            "The means of the batch are compared. Errors of both signs cancel, and two texts that "
            "got each other's score leave the mean as it is.",
            batch_means,
        ),
        Mutant(
            "The scores of a batch are sorted before they are compared. If the server restores "
            "the order wrongly, each text has a neighbour's score, and that is not seen.",
            sorted_scores,
        ),
        Mutant(
            "Equality to the last bit is asked for. Sums of another width round differently, so "
            "every batch of a right server would be named.",
            to_the_bit,
            "reward-bench #137",
        ),
        Mutant("The batches that are right are returned.", good_ones),
    ),
    probes=_probes,
    hints=(
        "Compare text by text, not batch by batch: make one boolean for each text first.",
        "`np.abs(served - alone) <= tolerance` is False for NaN, so its opposite names lost "
        "scores. Which NaN are no fault?",
        "`apart = ~(np.abs(served - alone) <= tolerance) & ~(np.isnan(served) & np.isnan(alone))`,"
        " then `np.unique(batch[apart])` as a list.",
    ),
    right="Run it on a sample of the traffic, all day: score some served texts again, alone. A "
    "batch that is named has its members in the log, so the fault can be made again.",
)
