"""The gold reward r*(x, y): a documented function of the text alone, with a grade for every line.

:func:`grade` reads any completion, whoever wrote it: the generator, a policy in training, a person.
So the gold reward of a best-of-N winner or of a GRPO sample is known as exactly as that of a row of
the training data. Chapter 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from companion.errors import DataError
from companion.tutor.solutions import GREETINGS, POLITE, RUDE
from companion.tutor.world import Problem, Step, parse_problem

_EQUATION = re.compile(r"(\d+) ([x+-]) (\d+) = (\d+)\b")
_ANSWER = re.compile(r"\bAnswer: (\d+)\b")


@dataclass(frozen=True)
class GoldReward:
    """Weights of r*. The unit is the logit: a gap of 1 is preferred with probability σ(1) = 0.73.

    ``r* = correct·[answer right] + steps·(share of valid steps) + greeting·[greets]
    + tone·(−1 rude … +1 polite) − words·(tens of words beyond the shortest solution, at most 3)``
    """

    correct: float = 2.5
    steps: float = 1.5
    greeting: float = 0.4
    tone: float = 0.6
    words: float = 0.3

    def __call__(self, grade: Grade) -> float:
        return (
            self.correct * grade.correct
            + self.steps * grade.validity
            + self.greeting * grade.greeting
            + self.tone * grade.tone
            - self.words * grade.extra_words / 10
        )


#: The weights that all of the course uses.
GOLD: Final = GoldReward()


@dataclass(frozen=True)
class Grade:
    """What is true of one completion."""

    correct: bool  #: the last ``Answer: n`` states the right number
    labels: tuple[int, ...]  #: per line: +1 right, 0 neither (greeting, restatement), −1 wrong
    validity: float  #: needed steps that are there and right, over steps needed or written
    greeting: bool
    tone: int  #: −1 rude, 0 neutral, +1 polite
    n_words: int
    extra_words: float  #: words beyond the shortest right solution, within [0, 30]

    @property
    def first_error(self) -> int | None:
        """Index of the first wrong line, or ``None``."""
        return self.labels.index(-1) if -1 in self.labels else None

    @property
    def reward(self) -> float:
        """The gold reward r* with the course's weights, in logits."""
        return GOLD(self)


def grade(prompt: str | Problem, completion: str) -> Grade:
    """Grade a completion line by line.

    A line with equations is right if each is one of the problem's steps, with the right operands,
    operation and result (operands of x and + in any order); an answer line is right if its number
    is. A correct sum of wrong numbers is wrong: it does not follow from the problem.

    Raises
    ------
    DataError
        If ``prompt`` is not a problem of the tutor's world.
    """
    problem = prompt if isinstance(prompt, Problem) else parse_problem(prompt)
    if problem is None:
        raise DataError(
            f"not a problem of the tutor's world: {prompt!r}",
            "grade only prompts that companion.tutor made",
        )
    needed = problem.steps
    labels: list[int] = []
    established: set[int] = set()
    written = 0
    correct = False
    for line in completion.split("\n"):
        equations = [Step(int(m[1]), m[2], int(m[3]), int(m[4])) for m in _EQUATION.finditer(line)]
        answers = _ANSWER.findall(line)
        right = True
        for step in equations:
            written += 1
            found = [i for i, truth in enumerate(needed) if step.says_the_same_as(truth)]
            established.update(found)
            right &= bool(found)
        if answers:
            correct = int(answers[-1]) == problem.answer
            right &= correct
        labels.append((1 if right else -1) if equations or answers else 0)
    n_words = len(completion.split())
    shortest = 6 * len(needed) + 2  # "Step 3 x 4 = 12" a step, then "Answer: 12"
    return Grade(
        correct=correct,
        labels=tuple(labels),
        validity=len(established) / max(len(needed), written),
        greeting=any(phrase in completion for phrase in GREETINGS),
        tone=any(phrase in completion for phrase in POLITE)
        - any(phrase in completion for phrase in RUDE),
        n_words=n_words,
        extra_words=float(min(max(n_words - shortest, 0), 30)),
    )


def gold_reward(prompt: str, completion: str) -> float:
    """r*(x, y) in logits; see :class:`GoldReward` for the formula and :func:`grade` for errors."""
    return grade(prompt, completion).reward


def gold_rewards(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """r* of completions in the form of a reward function of TRL, to hold a policy against.

    Parameters
    ----------
    prompts, completions : sequence
        ``[B]`` texts, or lists of messages of which the last counts.
    **columns
        What else TRL hands over; not used.
    """
    return [gold.reward for gold in _grades(prompts, completions)]


def right_answers(
    prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
) -> list[float]:
    """1 for each completion with the right answer, else 0; called as :func:`gold_rewards`.

    Its mean over completions is the share of right answers.
    """
    return [float(gold.correct) for gold in _grades(prompts, completions)]


def _grades(prompts: Sequence[Any], completions: Sequence[Any]) -> list[Grade]:
    return [
        grade(*(text if isinstance(text, str) else str(text[-1]["content"]) for text in pair))
        for pair in zip(prompts, completions, strict=True)
    ]
