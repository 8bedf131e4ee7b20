"""Derive by what a micro-batch's mean loss has to be multiplied."""

from __future__ import annotations

from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property, Unusable
from companion.course.exercises._tools import Attempt, a_kind, close, expect

Array = np.ndarray[Any, np.dtype[np.float64]]
DIMS = 40


def _counts(*rows: tuple[int, ...]) -> Any:
    return np.array(rows)


def _right(counts: Array) -> Array:
    total = counts.sum()
    return len(counts) * counts / total if total else np.zeros(counts.shape)


def _ask(attempt: Attempt, counts: Array) -> Array:
    got = attempt(counts)
    if not isinstance(got, np.ndarray) or got.shape != counts.shape:
        raise Unusable(
            f"the result: expected a NumPy array of shape {list(counts.shape)}, got {a_kind(got)}"
        )
    return np.asarray(got, dtype=np.float64)


def _step(counts: Array, scales: Array, seed: int) -> tuple[Array, Array]:
    """The gradient that the optimiser is given, and that of the mean over all pairs."""
    rng = np.random.default_rng(seed)
    pairs = rng.normal(0, 1, (int(counts.sum()), DIMS))
    ranks, begin = np.zeros((len(counts), DIMS)), 0
    for rank, row in enumerate(counts):
        for micro, count in enumerate(row):
            own = pairs[begin : begin + count]
            begin += count
            if count:  # backward adds up
                ranks[rank] += scales[rank, micro] * own.mean(axis=0)
    return ranks.mean(axis=0), pairs.mean(axis=0)  # DDP averages


def _same(attempt: Attempt, counts: Array, setting: str) -> None:
    scales = _ask(attempt, counts)
    expect(np.isfinite(scales).all(), f"{setting}: a scale that is not finite")
    got, want = _step(counts, scales, seed=int(counts.sum()))
    close(got, want, f"{setting}: the gradient")


def _even(attempt: Attempt) -> None:
    _same(attempt, _counts((4, 4)), "one rank, micro-batches of 4 and 4")
    _same(attempt, _counts((4, 4), (4, 4)), "two ranks, two micro-batches of 4 each")


def _accumulation(attempt: Attempt) -> None:
    _same(attempt, _counts((4, 1)), "one rank, micro-batches of 4 and 1")
    _same(attempt, _counts((2, 2, 2, 1)), "one rank, micro-batches of 2, 2, 2 and 1")


def _ranks(attempt: Attempt) -> None:
    _same(attempt, _counts((140,), (70,), (90,)), "ranks with 140, 70 and 90 pairs")


def _both(attempt: Attempt) -> None:
    _same(attempt, _counts((4, 4), (4, 1)), "ranks with 4 and 4, and with 4 and 1 pairs")
    _same(attempt, _counts((3, 2, 5), (1, 4, 4), (2, 2, 7)), "three ranks of mixed micro-batches")


def _none(attempt: Attempt) -> None:
    _same(attempt, _counts((4, 2), (3, 0)), "a micro-batch without pairs")
    scales = _ask(attempt, _counts((0, 0), (0, 0)))
    close(scales, np.zeros((2, 2)), "a step without any pair")


def one_over_accumulation(counts: Array) -> Any:
    return np.full(counts.shape, 1 / counts.shape[1])


def one_over_all(counts: Array) -> Any:
    return np.full(counts.shape, 1 / counts.size)


def without_ranks(counts: Array) -> Any:
    return _right(counts) / len(counts)


def own_count(counts: Array) -> Any:
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)


def as_if_sums(counts: Array) -> Any:
    total = counts.sum()
    return np.full(counts.shape, len(counts) / total if total else 0.0)


def of_its_turn(counts: Array) -> Any:
    turns = counts.sum(axis=0)
    share = np.divide(counts, turns, out=np.zeros(counts.shape), where=turns > 0)
    return len(counts) * share / counts.shape[1]


def times_accumulation(counts: Array) -> Any:
    return _right(counts) * counts.shape[1]


def no_pairs(counts: Array) -> Any:
    with np.errstate(all="ignore"):
        return len(counts) * counts / np.float64(counts.sum())


def _probes() -> list[tuple[Any, ...]]:
    return [
        (_counts((3, 1), (2, 5)),),
        (_counts((4, 2, 1), (1, 0, 3)),),
        (_counts((0,), (0,)),),
    ]


EXERCISE = Exercise(
    id="ch08.loss_scales",
    parameters=("counts",),
    properties=(
        Property(
            "equal micro-batches",
            "Even here the scales have to undo what backward and DDP do.",
            _even,
        ),
        Property(
            "a short micro-batch",
            "With accumulation, each pair of the step has the same weight.",
            _accumulation,
        ),
        Property(
            "ranks with unlike numbers of pairs",
            "Over ranks, each pair has the same weight.",
            _ranks,
        ),
        Property(
            "both at once",
            "The step is all micro-batches of all ranks.",
            _both,
        ),
        Property(
            "nothing to learn from",
            "A micro-batch without pairs, and a step without any, have scales of 0.",
            _none,
        ),
    ),
    mutants=(
        Mutant(
            "Each micro-batch is divided by the accumulation. That is the mean of means; a short "
            "micro-batch counts as much as a full one.",
            one_over_accumulation,
            "trl #4104",
        ),
        Mutant(
            "Each micro-batch is divided by the accumulation and the ranks. DDP divides by the "
            "ranks itself, and the sizes are not looked at.",
            one_over_all,
        ),
        Mutant(
            "The pairs of all ranks are counted, but not that DDP *averages*: the gradient is too "
            "small by the number of ranks.",
            without_ranks,
            "fairseq #494",
        ),
        Mutant(
            "A rank counts its own pairs only. Within it every pair has the same weight, and a "
            "pair of a rank with few has more.",
            own_count,
            "transformers #34242",
        ),
        Mutant(
            "This is right for a *sum* over the pairs. The loss here is a mean: it has to be "
            "multiplied by its own count first.",
            as_if_sums,
        ),
        Mutant(
            "Pairs are counted turn by turn: right over the ranks of one micro-batch, and a mean "
            "of means over the accumulation.",
            of_its_turn,
        ),
        Mutant(
            "The accumulation is multiplied in. Backward *adds* gradients up; nobody divides by "
            "the accumulation here.",
            times_accumulation,
        ),
        Mutant(
            "A step without pairs divides 0 by 0, and the NaN goes into every weight.",
            no_pairs,
        ),
    ),
    probes=_probes,
    hints=(
        "Write the gradient of the mean over all pairs as a sum over micro-batches, each with its "
        "own mean.",
        "A micro-batch of n pairs has the share n / N of that mean, N being the pairs of the whole "
        "step on all ranks. What does DDP do to it afterwards?",
        "`ranks * counts / counts.sum()`, and zeros where the sum is 0.",
    ),
    right="`counts.sum()` is what a real rank does not know: it sums the counts of its "
    "micro-batches *before* the first backward, and all-reduces that one number.",
)
