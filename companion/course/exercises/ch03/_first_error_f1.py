"""Write the figure by which process models are compared: is the first wrong step found?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, number

Array = np.ndarray[Any, np.dtype[Any]]
Solutions = list[tuple[Array, Array]]

RIGHT_COUNT = (
    "Solutions without an error are left out. A model that cries wolf at every step would then "
    "look best: half of the figure is that right solutions are let through."
)


def _draw(seed: int, errors: int, clean: int) -> Solutions:
    """P(wrong) of each step, and whether it is wrong; after the first error any may be."""
    rng = np.random.default_rng(seed)
    out: Solutions = []
    for number_ in range(errors + clean):
        size = int(rng.integers(2, 7))
        wrong = np.zeros(size, dtype=bool)
        if number_ < errors:
            first = int(rng.integers(size))
            wrong[first] = True
            wrong[first + 1 :] = rng.random(size - first - 1) < 0.5
        chance = np.clip(0.25 + 0.45 * wrong + rng.normal(0, 0.25, size), 0.01, 0.99)
        out.append((chance, wrong))
    rng.shuffle(out)  # type: ignore[arg-type]
    return out


def _first(where: Any) -> int | None:
    return next((i for i, value in enumerate(where) if value), None)


def _by_hand(solutions: Solutions, threshold: float) -> tuple[float, float]:
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for chance, wrong in solutions:
        named, truth = _first(chance > threshold), _first(wrong)
        hits[truth is not None].append(named == truth)
    found, passed = (sum(hits[key]) / len(hits[key]) for key in (True, False))
    return found, passed


def _f1(solutions: Solutions, threshold: float) -> float:
    found, passed = _by_hand(solutions, threshold)
    return 2 * found * passed / (found + passed) if found + passed else 0.0


def _split(*parts: tuple[list[float], list[int]]) -> Solutions:
    return [(np.array(chance), np.array(wrong, dtype=bool)) for chance, wrong in parts]


def _perfect(f1: Attempt) -> None:
    for seed in range(3):
        solutions = [(np.where(wrong, 0.9, 0.1), wrong) for _, wrong in _draw(seed, 4, 4)]
        close(number(f1(solutions, 0.5)), 1.0, "a model that is always right")


def _wolf(f1: Attempt) -> None:
    solutions = _split(([0.9, 0.9], [1, 0]), ([0.9, 0.9, 0.9], [0, 0, 0]), ([0.9], [1]))
    close(number(f1(solutions, 0.5)), 0.0, "a model that calls every step wrong")
    solutions = _split(([0.1, 0.1], [1, 0]), ([0.1, 0.1, 0.1], [0, 0, 0]))
    close(number(f1(solutions, 0.5)), 0.0, "a model that calls every step right")


def _which(f1: Attempt) -> None:
    clean = ([0.1, 0.2], [0, 0])
    for chance, wrong, want, what in (
        ([0.1, 0.8, 0.9], [0, 1, 1], 1.0, "the first step above the threshold is the wrong one"),
        ([0.7, 0.8, 0.9], [0, 1, 1], 0.0, "an earlier step is named"),
        ([0.1, 0.2, 0.9], [0, 1, 1], 0.0, "a later step is named"),
        ([0.1, 0.6, 0.9], [0, 1, 0], 1.0, "a later step has a higher P(wrong) than the first one"),
        ([0.9, 0.1, 0.9], [1, 1, 0], 1.0, "the second wrong step is not called wrong"),
        ([0.5, 0.9, 0.1], [0, 1, 0], 1.0, "a right step lies *at* the threshold, not above it"),
        ([0.5, 0.9, 0.1], [1, 1, 0], 0.0, "the first wrong step lies at the threshold"),
    ):
        got = number(f1(_split((chance, wrong), clean), 0.5))
        close(got, want, f"{what}, and one right solution that is passed")


def _values(f1: Attempt) -> None:
    for seed in range(4):
        for errors, clean in ((12, 12), (20, 4)):
            for threshold in (0.4, 0.6):
                solutions = _draw(seed, errors, clean)
                found, passed = _by_hand(solutions, threshold)
                close(
                    number(f1(solutions, threshold)),
                    _f1(solutions, threshold),
                    f"{errors} solutions with an error, of which {found:.0%} are found, {clean} "
                    f"without, of which {passed:.0%} are passed",
                )


def _zero(f1: Attempt) -> None:
    solutions = _split(([0.9, 0.1], [0, 1]), ([0.9], [0]))
    got = number(f1(solutions, 0.5))
    expect(not math.isnan(got), "nothing found and nothing passed gives NaN; it should be 0")
    close(got, 0.0, "nothing found and nothing passed")


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def arithmetic(solutions: Solutions, threshold: float) -> float:
    found, passed = _by_hand(solutions, threshold)
    return (found + passed) / 2


def pooled(solutions: Solutions, threshold: float) -> float:
    hits = [_first(chance > threshold) == _first(wrong) for chance, wrong in solutions]
    return float(np.mean(hits))


def errors_only(solutions: Solutions, threshold: float) -> float:
    return _by_hand(solutions, threshold)[0]


def step_f1(solutions: Solutions, threshold: float) -> float:
    called = np.concatenate([chance > threshold for chance, _ in solutions])
    wrong = np.concatenate([wrong for _, wrong in solutions]).astype(bool)
    return _harmonic(
        float((called & wrong).sum() / max(called.sum(), 1)),
        float((called & wrong).sum() / max(wrong.sum(), 1)),
    )


def _named(solutions: Solutions, threshold: float, name: Any) -> float:
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for chance, wrong in solutions:
        called = chance > threshold
        step = name(chance, called) if called.any() else None
        truth = _first(wrong)
        hits[truth is not None].append(step == truth)
    return _harmonic(*(float(np.mean(hits[key])) for key in (True, False)))


def most_suspect(solutions: Solutions, threshold: float) -> float:
    return _named(solutions, threshold, lambda chance, called: int(np.argmax(chance)))


def last_called(solutions: Solutions, threshold: float) -> float:
    return _named(solutions, threshold, lambda chance, called: int(np.flatnonzero(called)[-1]))


def any_error(solutions: Solutions, threshold: float) -> float:
    found = [bool((chance > threshold).any()) for chance, wrong in solutions if wrong.any()]
    passed = [not (chance > threshold).any() for chance, wrong in solutions if not wrong.any()]
    return _harmonic(float(np.mean(found)), float(np.mean(passed)))


def at_least(solutions: Solutions, threshold: float) -> float:
    return _f1(solutions, np.nextafter(threshold, -np.inf))


def below(solutions: Solutions, threshold: float) -> float:
    return _f1([(1 - chance, wrong) for chance, wrong in solutions], threshold)


def all_wrong_steps(solutions: Solutions, threshold: float) -> float:
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for chance, wrong in solutions:
        hits[bool(wrong.any())].append(bool(((chance > threshold) == wrong).all()))
    return _harmonic(*(float(np.mean(hits[key])) for key in (True, False)))


def divides_by_zero(solutions: Solutions, threshold: float) -> float:
    found, passed = np.array(_by_hand(solutions, threshold))
    with np.errstate(invalid="ignore"):
        return float(2 * found * passed / (found + passed))


def _probes() -> list[tuple[Any, ...]]:
    nothing = _split(([0.9, 0.1], [0, 1]), ([0.9], [0]))
    at = _split(([0.5, 0.9, 0.1], [0, 1, 0]), ([0.1, 0.2], [0, 0]))
    return [
        (at, 0.5),
        (_draw(1, 12, 12), 0.4),
        (_draw(2, 20, 6), 0.5),
        (_draw(3, 8, 9), 0.6),
        (nothing, 0.5),
    ]


EXERCISE = Exercise(
    id="ch03.first_error_f1",
    parameters=("solutions", "threshold"),
    properties=(
        Property(
            "a perfect model has 1",
            "A model that calls exactly the wrong steps wrong should have 1.",
            _perfect,
        ),
        Property(
            "one that calls all steps wrong, or none, has 0",
            "A model that calls all steps wrong passes no solution, and one that calls none wrong "
            "finds no error: either is worth 0.",
            _wolf,
        ),
        Property(
            "the *first* step above the threshold must be the first wrong one",
            "An error counts as found if the first step whose P(wrong) is above the threshold is "
            "the first step that is wrong; later steps do not matter.",
            _which,
        ),
        Property(
            "the harmonic mean of two accuracies",
            "F1 here is 2ab/(a + b): a is the accuracy on solutions with an error, b that on "
            "solutions without one.",
            _values,
        ),
        Property(
            "0, not NaN, where both accuracies are 0",
            "Where nothing is found and nothing passed the figure is 0.",
            _zero,
        ),
    ),
    mutants=(
        Mutant(
            "The arithmetic mean of the two accuracies lets one half pay for the other: a model "
            "that calls nothing wrong has one half. The harmonic mean gives it 0.",
            arithmetic,
        ),
        Mutant(
            "All solutions go into one accuracy, so the figure depends on how many of them have an "
            "error. Take one accuracy for each of the two groups.",
            pooled,
        ),
        Mutant(RIGHT_COUNT, errors_only),
        Mutant(
            "This is the F1 of single steps. Steps after the first error count there as well, and "
            "long solutions more than short ones; the question is where a solution *begins* to go "
            "wrong.",
            step_f1,
        ),
        Mutant(
            "The step with the highest P(wrong) is named. What follows an error often looks worse "
            "than the error: name the first above the threshold.",
            most_suspect,
        ),
        Mutant(
            "The last step above the threshold is named, the first is asked for.",
            last_called,
        ),
        Mutant(
            "It is counted as found if any step is called wrong. That says that there is an error, "
            "not where.",
            any_error,
        ),
        Mutant(
            "The direction is turned round: the array holds P(wrong), so a step is called wrong "
            "*above* the threshold.",
            below,
        ),
        Mutant(
            "A step whose P(wrong) *is* the threshold counts as called wrong (`>=`). It is one "
            "above it: `>`.",
            at_least,
        ),
        Mutant(
            "All steps of a solution must be called right. After the first error nobody judged "
            "them, so only the first one counts.",
            all_wrong_steps,
        ),
        Mutant(
            "With both accuracies 0 this divides 0 by 0 and is NaN, which no comparison of "
            "checkpoints survives.",
            divides_by_zero,
        ),
    ),
    probes=_probes,
    hints=(
        "Two groups of solutions, an accuracy for each. What is 'right' for a solution with an "
        "error, and for one without?",
        "Name a step: `next((i for i, p in enumerate(chance) if p > threshold), None)`. Do the "
        "same with `wrong`, and compare; None equals None.",
        "Collect the comparisons under `truth is not None`, take the two means a and b, return "
        "`2 * a * b / (a + b) if a + b else 0.0`.",
    ),
    right="It is the figure of ProcessBench. The threshold is free: choose it on other solutions "
    "than those that you report.",
)
