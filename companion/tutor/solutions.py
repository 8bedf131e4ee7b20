"""Completions of the tutor: steps that may err, written in one of several styles.

A completion is a few lines: perhaps a greeting, perhaps a line that restates the problem, one
equation a line, the answer, perhaps a closing line. Whether it is right and how it is written are
drawn independently, so that a reward model cannot read the one off the other; the dial ``shift``
of :class:`companion.tutor.Dials` ties them together again, as a policy does that has learned
to please. Chapter 1.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from companion.tutor.world import LARGEST, MAX_NUMBER, SMALLEST, Problem, Step, apply

GREETINGS: Final = ("Hello!", "Hi there!", "Good question!")
POLITE: Final = ("Hope this helps!", "Happy to help!", "Have a nice day!")
RUDE: Final = ("That was easy.", "Try harder next time.", "Do not ask again.")
VERBOSITIES: Final = ("terse", "plain", "wordy")

#: Error rates per step; a completion draws one. Their mean is the share of steps that err.
ERROR_RATES: Final = (0.0, 0.15, 0.3, 0.6)
#: Probability that the answer line says another number than the last step.
P_MISCOPY: Final = 0.03


@dataclass(frozen=True)
class Style:
    """How a completion is written, whatever it says."""

    greeting: bool
    tone: int  #: −1 rude, 0 neutral, +1 polite
    verbosity: str  #: one of :data:`VERBOSITIES`


def draw_style(rng: random.Random, *, shift: float = 0.0) -> Style:
    """Draw a style; ``shift`` in [0, 1] moves it towards greeting, politeness and many words."""
    if rng.random() < shift:
        return Style(rng.random() < 0.9, int(rng.random() < 0.9), rng.choice(("wordy", "plain")))
    return Style(rng.random() < 0.5, rng.choice((-1, 0, 1)), rng.choice(VERBOSITIES))


def slip(rng: random.Random, result: int) -> int:
    """A wrong result near the right one."""
    while True:
        wrong = result + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))
        if 0 <= wrong <= MAX_NUMBER:
            return wrong


def _wrong_step(rng: random.Random, right: Step, misreads: float) -> Step:
    """A slip of the arithmetic, or with probability ``misreads`` a step that misreads the problem.

    A misread step is a right equation about a wrong number or with a wrong operation: nothing in
    the line itself is wrong, only the comparison with the problem shows it.
    """
    if rng.random() < misreads:
        op, number = right.op, right.right
        if rng.random() < 0.5:
            number = rng.choice([n for n in range(SMALLEST, LARGEST + 1) if n != number])
        else:
            op = {"x": "+", "+": "-", "-": "+"}[op]
        result = apply(right.left, op, number)
        if 0 <= result <= MAX_NUMBER:
            return Step(right.left, op, number, result)
    return Step(right.left, right.op, right.right, slip(rng, right.result))


def draw_steps(
    rng: random.Random, problem: Problem, error_rate: float, misreads: float = 0.0
) -> tuple[tuple[Step, ...], int]:
    """Solve ``problem`` with mistakes; return the steps and the number on the answer line.

    A step goes wrong with probability ``error_rate``; the next step goes on from the wrong result,
    so every step after the first mistake builds on it.
    """
    steps: list[Step] = []
    for truth in problem.steps:
        left = steps[-1].result if steps else truth.left
        result = apply(left, truth.op, truth.right)
        step = Step(left, truth.op, truth.right, max(result, 0))
        if rng.random() < error_rate:
            step = _wrong_step(rng, step, misreads)
        steps.append(step)
    answer = steps[-1].result
    if rng.random() < P_MISCOPY:
        answer = slip(rng, answer)
    return tuple(steps), answer


_LEADS: Final = (("First", "To start"), ("Then", "After that"), ("Finally", "At the end"))


def render(
    rng: random.Random, problem: Problem, steps: tuple[Step, ...], answer: int, style: Style
) -> list[str]:
    """Write a solution in a style, one line an entry."""
    lines: list[str] = []
    if style.greeting:
        lines.append(rng.choice(GREETINGS))
    if style.verbosity == "wordy":
        lines.append(f"{problem.name} has {problem.a} {problem.container} of {problem.item}.")
    for index, step in enumerate(steps):
        if style.verbosity == "terse":
            lines.append(f"Step {step}")
        elif style.verbosity == "plain":
            lines.append(f"{_LEADS[index][0]} {step} {problem.item}.")
        else:
            lines.append(f"{_LEADS[index][1]} we work out that {step} {problem.item}.")
    if style.verbosity == "wordy":
        lines.append(f"So now there are {answer} {problem.item}. Answer: {answer}")
    else:
        lines.append(f"Answer: {answer}")
    if style.tone:
        lines.append(rng.choice(POLITE if style.tone > 0 else RUDE))
    return lines


@dataclass(frozen=True)
class Solution:
    """A completion with what the generator knows of it."""

    problem: Problem
    lines: tuple[str, ...]
    style: Style

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def draw_solution(
    rng: random.Random,
    problem: Problem,
    *,
    shift: float = 0.0,
    misreads: float = 0.0,
    error_rate: float | None = None,
    style: Style | None = None,
) -> Solution:
    """Draw one completion for ``problem``.

    Parameters
    ----------
    rng : random.Random
        The only source of randomness.
    problem : Problem
    shift : float
        In [0, 1]. With this probability a completion comes from the drifted policy, which is
        friendly, wordy and more often wrong.
    misreads : float
        Share of wrong steps that misread the problem; the others slip in the arithmetic.
    error_rate : float, optional
        Probability that a step errs. By default drawn from :data:`ERROR_RATES`.
    style : Style, optional
        By default drawn.
    """
    drifted = rng.random() < shift
    if error_rate is None:
        error_rate = rng.choice(ERROR_RATES[1:] if drifted else ERROR_RATES)
    if style is None:
        style = draw_style(rng, shift=1.0 if drifted else 0.0)
    steps, answer = draw_steps(rng, problem, error_rate, misreads)
    return Solution(problem, tuple(render(rng, problem, steps, answer, style)), style)
