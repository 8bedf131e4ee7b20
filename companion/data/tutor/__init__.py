"""The course's running example: a tutor whose every answer can be checked.

A prompt is a small word problem, a completion a few lines that solve it, rightly or not, in one of
several styles. The gold reward :func:`gold_reward` is a known function of both, so the best
accuracy, loss and calibration that any reward model can reach are known too (:func:`limits`).

==============  ===============================================================================
``world``       problems and their solutions
``solutions``   completions: mistakes and styles
``gold``        the gold reward r* and the grade of every line
``labelling``   annotators, dials, and the limits
``rows``        pairs, rankings, outcomes, steps, prompts, canaries
``text``        what the tutor base is trained on, and its tokenizer's chat template
==============  ===============================================================================
"""

from companion.data.tutor.gold import (
    GOLD,
    GoldReward,
    Grade,
    gold_reward,
    gold_rewards,
    grade,
    right_answers,
)
from companion.data.tutor.labelling import Dials, Limits, limits, preference_probability
from companion.data.tutor.rows import KINDS, make_rows
from companion.data.tutor.world import Problem, Step, parse_problem

__all__ = [
    "GOLD",
    "KINDS",
    "Dials",
    "GoldReward",
    "Grade",
    "Limits",
    "Problem",
    "Step",
    "gold_reward",
    "gold_rewards",
    "grade",
    "limits",
    "make_rows",
    "parse_problem",
    "preference_probability",
    "right_answers",
]
