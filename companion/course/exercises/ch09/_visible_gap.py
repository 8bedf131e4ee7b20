"""By how much two reward models differ in what any pair could show."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, number

Array = np.ndarray[Any, np.dtype[np.float64]]
Case = tuple[Array, Array, list[str]]


def _case(seed: int) -> Case:
    """Scores of two models; prompts in any order, some with one text alone."""
    rng = np.random.default_rng(seed)
    prompts = [f"p{i}" for i in rng.permutation([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])]
    return rng.normal(0, 2, 10), rng.normal(1, 2, 10), prompts


def _by_prompt(values: Array, prompts: list[str]) -> list[Array]:
    return [
        values[[i for i, p in enumerate(prompts) if p == one]] for one in dict.fromkeys(prompts)
    ]


def _right(first: Array, second: Array, prompts: list[str]) -> float:
    return float(max(np.ptp(own) for own in _by_prompt(first - second, prompts)))


def _ask(attempt: Attempt, case: Case) -> float:
    return number(attempt(*case))


def _shift(attempt: Attempt) -> None:
    for seed in range(3):
        first, _, prompts = _case(seed)
        case = (first, first + 7.3, prompts)
        close(
            _ask(attempt, case), 0.0, f"the second is the first plus 7.3 (seed {seed})", atol=1e-9
        )


def _shift_of_a_prompt(attempt: Attempt) -> None:
    for seed in range(3):
        first, _, prompts = _case(seed)
        own = np.array([{"p0": -4.0, "p1": 2.5}.get(p, 0.0) for p in prompts])
        close(
            _ask(attempt, (first, first + own, prompts)),
            0.0,
            f"the second adds a number of its own to each prompt (seed {seed})",
            atol=1e-9,
        )


def _scale(attempt: Attempt) -> None:
    case = (np.array([0.0, 1.0, 3.0]), np.array([0.0, 2.0, 6.0]), ["a", "a", "a"])
    close(_ask(attempt, case), 3.0, "scores 0, 1, 3 and twice as much, one prompt")


def _by_hand(attempt: Attempt) -> None:
    case = (np.array([1.0, 5.0, 2.0, 4.0]), np.array([1.5, 0.0, 1.0, 9.0]), ["a", "b", "a", "c"])
    close(_ask(attempt, case), 1.5, "prompts a, b, a, c; gaps -0.5, 5, 1, -5")


def _many(attempt: Attempt) -> None:
    for seed in range(12):
        case = _case(seed)
        close(_ask(attempt, case), _right(*case), f"10 texts of 4 prompts (NumPy seed {seed})")


def all_texts(first: Array, second: Array, prompts: list[str]) -> float:
    return float(np.ptp(first - second))


def largest_difference(first: Array, second: Array, prompts: list[str]) -> float:
    return float(np.abs(first - second).max())


def centred_by_prompt(first: Array, second: Array, prompts: list[str]) -> float:
    gaps = _by_prompt(first - second, prompts)
    return float(max(np.abs(own - own.mean()).max() for own in gaps))


def neighbours(first: Array, second: Array, prompts: list[str]) -> float:
    found = [0.0]
    gap = first - second
    for i in range(len(gap) - 1):
        if prompts[i] == prompts[i + 1]:
            found.append(abs(gap[i] - gap[i + 1]))
    return float(max(found))


def runs_of_a_prompt(first: Array, second: Array, prompts: list[str]) -> float:
    gap, found, place = first - second, [0.0], 0
    for _, run in itertools.groupby(prompts):
        n = len(list(run))
        found.append(float(np.ptp(gap[place : place + n])))
        place += n
    return float(max(found))


def scale_taken_out(first: Array, second: Array, prompts: list[str]) -> float:
    found = [0.0]
    for own, other in zip(_by_prompt(first, prompts), _by_prompt(second, prompts), strict=True):
        if np.ptp(own) > 0 and np.ptp(other) > 0:
            found.append(float(np.ptp(own / np.ptp(own) - other / np.ptp(other))))
    return float(max(found))


def smallest(first: Array, second: Array, prompts: list[str]) -> float:
    return float(min(np.ptp(own) for own in _by_prompt(first - second, prompts)))


def mean_of_prompts(first: Array, second: Array, prompts: list[str]) -> float:
    return float(np.mean([np.ptp(own) for own in _by_prompt(first - second, prompts)]))


EXERCISE = Exercise(
    id="ch09.visible_gap",
    parameters=("first", "second", "prompts"),
    properties=(
        Property(
            "a shift is not seen",
            "The same number on all scores changes no pair, so it is not seen.",
            _shift,
        ),
        Property(
            "a shift of a prompt is not seen",
            "A number for each prompt changes no pair of that prompt, so it is not seen.",
            _shift_of_a_prompt,
        ),
        Property(
            "another scale is seen",
            "Pairs show differences of scores, and with them the scale.",
            _scale,
        ),
        Property(
            "the largest over all pairs",
            "It is the largest over all pairs of texts of one prompt, wherever they stand.",
            _by_hand,
        ),
        Property(
            "many cases",
            "Go through all pairs of texts that share a prompt; take the largest.",
            _many,
        ),
    ),
    mutants=(
        Mutant(
            "Texts of different prompts are compared. No pair does that, so one constant is free "
            "for each prompt, and not one for the model.",
            all_texts,
        ),
        Mutant(
            "Scores are compared, not their differences. Any shift of a model then looks like "
            "another model.",
            largest_difference,
        ),
        Mutant(
            "Each text is compared with the mean of its prompt. A pair compares two texts, which "
            "may lie on either side of that mean.",
            centred_by_prompt,
        ),
        Mutant(
            "Only texts that stand next to each other are compared. Any two texts of a prompt can "
            "be a pair.",
            neighbours,
        ),
        Mutant(
            "The texts of a prompt are taken to stand together. In a file they stand anywhere.",
            runs_of_a_prompt,
        ),
        Mutant(
            "The scale of each model is taken out. The loss sees it: twice the margin is another "
            "probability.",
            scale_taken_out,
        ),
        Mutant(
            "The least of the prompts is taken, so one prompt with a single text hides all others.",
            smallest,
        ),
        Mutant(
            "The prompts are averaged. The question was how far any pair could tell the two apart.",
            mean_of_prompts,
        ),
    ),
    probes=lambda: [_case(seed) for seed in range(20, 26)],
    hints=(
        "What of two models' scores does the loss of a pair contain?",
        "Let d be first minus second. A pair of texts i and j of one prompt sees d_i − d_j.",
        "So for each prompt take the largest d minus the smallest, and of these the largest.",
    ),
    right="If this is 0, no set of pairs, however large, can tell the two models apart. A list of "
    "the best scores over all prompts still can.",
)
