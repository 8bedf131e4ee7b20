"""A sick server: say what is wrong with it."""

from __future__ import annotations

from companion.course.exercise import Prediction
from companion.course.exercises.ch09._wards import admit, diagnose, question

_SPECIMEN, _CHECK = "openrlhf-cut", "silent-cut"
_CUTS = "it cuts long texts"
_SIGNS = {
    "its scores depend on the batch": "Then a text sent alone and beside others has two scores.",
    "it answers in another order": "Then the scores of a request come back in an order of its own.",
    _CUTS: "Then two long texts that differ in their last words alone have one score.",
    "it gives a sigmoid of the score": "Then all scores lie between 0 and 1.",
    "it scores an empty text": "Then an empty query gets a number in place of an error.",
    "it gives other scores each time": "Then the same request has another answer the second time.",
}


def address() -> str:
    """Where the server listens; it is started on the first call."""
    return admit(_SPECIMEN).target


def run() -> dict[str, str]:
    """Ask the audit."""
    return {"the server": {_CHECK: _CUTS}[diagnose(_SPECIMEN, (_CHECK,))]}


EXERCISE = Prediction(
    id="ch09.sick_server",
    run=run,
    questions=(question("the server", _CUTS, _SIGNS),),
    hints=(
        "For each diagnosis write down two requests whose answers should be equal, or should "
        "differ, if the server were sound.",
        "POST /get_reward takes {'query': [...]} and gives {'rewards': [...]}. Send a text twice, "
        "alone and with others, in both orders, empty, short and very long.",
        "Compare two texts of several hundred words with different last words.",
    ),
    right="A cut is silent in the worst way: short texts, with which one tries a server, are all "
    "right. OpenRLHF's own server reads 2,048 tokens of a text; this one fewer, so that you need "
    "not write so much.",
)
