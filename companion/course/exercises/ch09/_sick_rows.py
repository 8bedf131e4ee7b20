"""A sick set of pairs: say what is wrong with it."""

from __future__ import annotations

from typing import Any

from companion.course.exercise import Prediction
from companion.course.exercises.ch09._wards import admit, diagnose, question
from companion.data import load_rows

_SPECIMEN, _CHECK = "preferences-in-a-circle", "cyclic-preferences"
_CIRCLES = "preferences run in a circle"
_SIGNS = {
    "a pair stands both ways round": "Then some chosen and rejected of a prompt are the rejected "
    "and chosen of another row.",
    "some pairs have two equal sides": "Then chosen and rejected of a row are the same words.",
    _CIRCLES: "Then of three answers to a prompt each was preferred to the next, and the last to "
    "the first.",
    "prompts stand twice with small changes": "Then two prompts share most of their words.",
    "marks of turns stand in the texts": "Then special tokens of the chat template occur in an "
    "answer.",
    "chosen and rejected are swapped": "Then right answers are rejected more often than chosen.",
}


def pairs() -> list[dict[str, Any]]:
    """The rows: prompt, chosen and rejected, as messages."""
    return [dict(row) for row in load_rows(str(admit(_SPECIMEN).data))]


def run() -> dict[str, str]:
    """Ask the audit."""
    return {"the pairs": {_CHECK: _CIRCLES}[diagnose(_SPECIMEN, (_CHECK,))]}


EXERCISE = Prediction(
    id="ch09.sick_rows",
    run=run,
    questions=(question("the pairs", _CIRCLES, _SIGNS),),
    hints=(
        "Group the rows by their prompt first, and count how often each answer was chosen.",
        "Draw the preferences of one prompt as arrows from the better answer to the worse.",
        "Each prompt has three answers, each of which was chosen once and rejected once.",
    ),
    right="No score can order such answers: the best accuracy on a circle of three is two of "
    "three. Every row by itself is fine.",
)
