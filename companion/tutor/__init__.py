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
``base``        trains the tutor base, the tiny model that ships with the package
==============  ===============================================================================

Chapter 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.tutor.base import TUTOR_BASE as TUTOR_BASE
    from companion.tutor.gold import (
        GOLD as GOLD,
        GoldReward as GoldReward,
        Grade as Grade,
        gold_reward as gold_reward,
        gold_rewards as gold_rewards,
        grade as grade,
        right_answers as right_answers,
    )
    from companion.tutor.labelling import (
        Dials as Dials,
        Limits as Limits,
        limits as limits,
        preference_probability as preference_probability,
    )
    from companion.tutor.rows import KINDS as KINDS, make_rows as make_rows
    from companion.tutor.solutions import (
        Solution as Solution,
        Style as Style,
        draw_solution as draw_solution,
    )
    from companion.tutor.world import (
        Problem as Problem,
        Step as Step,
        draw_problem as draw_problem,
        parse_problem as parse_problem,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
