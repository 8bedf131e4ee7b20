"""Rows of every kind, drawn from one seed.

The first ``n`` rows of a seed are the same whatever the total, so a larger file begins with the
smaller one. Chapter 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Final

from companion.errors import DataError
from companion.tutor.gold import Grade, grade
from companion.tutor.labelling import (
    Dials,
    annotator_factors,
    annotator_gap,
    label_probability,
    preference_probability,
    tie_probability,
)
from companion.tutor.solutions import Solution, Style, draw_solution
from companion.tutor.world import Problem, draw_problem

Row = dict[str, Any]
Graded = tuple[str, Grade]  #: a completion and its grade


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _assistant(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def _draw(rng: random.Random, problem: Problem, dials: Dials) -> Solution:
    return draw_solution(rng, problem, shift=dials.shift, misreads=dials.misreads)


def _draw_different(rng: random.Random, problem: Problem, dials: Dials, n: int) -> list[Graded]:
    drawn: dict[str, Grade] = {}
    while len(drawn) < n:
        text = _draw(rng, problem, dials).text
        drawn.setdefault(text, grade(problem, text))
    return list(drawn.items())


def _pair_row(
    row_id: str, problem: Problem, chosen: Graded, rejected: Graded, probability: float
) -> Row:
    both = chosen[1].correct + rejected[1].correct
    return {
        "id": row_id,
        "subset": ("both_wrong", "right_against_wrong", "both_right")[both],
        "prompt": _user(problem.prompt),
        "chosen": _assistant(chosen[0]),
        "rejected": _assistant(rejected[0]),
        "reward_chosen": chosen[1].reward,
        "reward_rejected": rejected[1].reward,
        "correct_chosen": chosen[1].correct,
        "correct_rejected": rejected[1].correct,
        "probability": probability,
    }


def _pairs(rng: random.Random, row_id: str, dials: Dials) -> Row:
    problem = draw_problem(rng)
    first, second = _draw_different(rng, problem, dials, 2)
    annotator = rng.randrange(dials.annotators)
    gap = annotator_gap(first[1], second[1], dials, annotator_factors(dials)[annotator])
    # One draw decides the label and whether it came from a tie: the first part of the unit
    # interval holds 'first preferred', and a tie takes half of its share on either side.
    first_preferred = rng.random() < label_probability(gap, dials)
    p_first = preference_probability(first[1], second[1], dials)
    if first_preferred:
        row = _pair_row(row_id, problem, first, second, p_first)
    else:
        row = _pair_row(row_id, problem, second, first, 1 - p_first)
    return row | {"annotator": annotator, "tie_probability": tie_probability(gap, dials)}


def _rankings(rng: random.Random, row_id: str, dials: Dials) -> Row:
    """Three to five completions with ranks from Plackett–Luce on r*, drawn by Gumbel noise."""
    problem = draw_problem(rng)
    size = rng.randint(3, 5)
    drawn = _draw_different(rng, problem, dials, size)
    rewards = [gold.reward for _, gold in drawn]
    utilities = [r - math.log(-math.log(rng.random() or 1e-300)) for r in rewards]
    order = sorted(range(size), key=lambda i: -utilities[i])
    return {
        "id": row_id,
        "prompt": _user(problem.prompt),
        "completions": [_assistant(text) for text, _ in drawn],
        "ranks": [order.index(i) + 1 for i in range(size)],
        "rewards": rewards,
    }


def _outcomes(rng: random.Random, row_id: str, dials: Dials) -> Row:
    problem = draw_problem(rng)
    solution = _draw(rng, problem, dials)
    result = grade(problem, solution.text)
    label = result.correct
    if rng.random() < dials.noise:
        label = rng.random() < 0.5
    return {
        "id": row_id,
        "prompt": _user(problem.prompt),
        "completion": _assistant(solution.text),
        "label": label,
        "correct": result.correct,
        "reward": result.reward,
    }


def _steps(rng: random.Random, row_id: str, dials: Dials) -> Row:
    problem = draw_problem(rng)
    solution = _draw(rng, problem, dials)
    result = grade(problem, solution.text)
    labels = [
        rng.choice((1, -1)) if label and rng.random() < dials.noise else label
        for label in result.labels
    ]
    return {
        "id": row_id,
        "prompt": problem.prompt,
        "completions": list(solution.lines),
        "labels": labels,
        "true_labels": list(result.labels),
        "first_error": result.first_error,
        "correct": result.correct,
    }


def _prompts(rng: random.Random, row_id: str, dials: Dials) -> Row:
    problem = draw_problem(rng)
    return {"id": row_id, "prompt": _user(problem.prompt), "answer": problem.answer}


_PLAIN: Final = Style(False, 0, "plain")
#: Canaries: what differs between the two completions, and of the better and then the worse one the
#: style, the error rate of its steps and whether its answer is right.
_CANARIES: Final = {
    "right": ((_PLAIN, 0.0, True), (_PLAIN, 0.6, False)),
    "right_but_rude": (
        (Style(False, -1, "plain"), 0.0, True),
        (Style(True, 1, "plain"), 0.6, False),
    ),
    "step": ((_PLAIN, 0.4, False), (_PLAIN, 0.8, False)),
    "greeting": ((Style(True, 0, "plain"), 0.0, True), (_PLAIN, 0.0, True)),
    "tone": ((Style(False, 1, "plain"), 0.0, True), (Style(False, -1, "plain"), 0.0, True)),
    "brevity": ((Style(False, 0, "terse"), 0.0, True), (Style(False, 0, "wordy"), 0.0, True)),
}


def _canaries(rng: random.Random, row_id: str, dials: Dials) -> Row:
    """A pair that differs in one known thing (in two for ``right_but_rude``); chosen is better."""
    kind = list(_CANARIES)[int(row_id.rsplit("/", 1)[1]) % len(_CANARIES)]
    better, worse = _CANARIES[kind]
    while True:
        problem = draw_problem(rng)
        good, bad = (
            draw_solution(rng, problem, misreads=dials.misreads, error_rate=rate, style=style).text
            for style, rate, _ in (better, worse)
        )
        gold, poor = grade(problem, good), grade(problem, bad)
        if (gold.correct, poor.correct) == (better[2], worse[2]) and gold.reward > poor.reward:
            p = preference_probability(gold, poor, dials)
            return _pair_row(row_id, problem, (good, gold), (bad, poor), p) | {"subset": kind}


_MAKERS: Final[dict[str, Callable[[random.Random, str, Dials], Row]]] = {
    "pairs": _pairs,
    "rankings": _rankings,
    "outcomes": _outcomes,
    "steps": _steps,
    "prompts": _prompts,
    "canaries": _canaries,
}

#: The kinds of row that :func:`make_rows` makes.
KINDS: Final = tuple(_MAKERS)


def make_rows(kind: str, n: int, seed: int = 0, **dials: Any) -> list[Row]:
    """Draw ``n`` rows of the tutor's data.

    Parameters
    ----------
    kind : str
        ``pairs`` (chosen, rejected; gold rewards; the true probability of the label), ``rankings``
        (3 to 5 completions with ranks), ``outcomes`` (label: is the answer right), ``steps`` (the
        lines of a completion with labels +1, 0, −1), ``prompts`` (for sampling and GRPO) or
        ``canaries`` (pairs that differ in one known thing, for monitoring).
    n : int
        How many.
    seed : int
        Rows of one seed are always the same, and a larger ``n`` only adds rows.
    **dials
        Fields of :class:`Dials`. Drifted data are ``shift=1.0``.

    Raises
    ------
    DataError
        For an unknown kind, a negative ``n``, or a dial that does not exist or is out of range.
    """
    if kind not in _MAKERS:
        raise DataError(f"no kind {kind!r} of tutor data", f"take one of: {', '.join(KINDS)}")
    if n < 0:
        raise DataError(f"n={n} rows: must not be negative")
    names = [field.name for field in fields(Dials)]
    if unknown := sorted(set(dials) - set(names)):
        raise DataError(f"no dial {', '.join(unknown)}", f"there are: {', '.join(names)}")
    setting = Dials(**dials)
    rng = random.Random(f"{kind}/{seed}")
    return [_MAKERS[kind](rng, f"tutor/{kind}/{seed}/{i}", setting) for i in range(n)]
