"""Six sick models: say what is wrong with each."""

from __future__ import annotations

from companion.course.exercise import Prediction
from companion.course.exercises.ch09._wards import admit, diagnose, question

#: of each patient the specimen, and the check that finds it
_PATIENTS = {
    "A": ("left-padded-table", "absolute-positions"),
    "B": ("two-bos", "bos-doubled"),
    "C": ("head-never-trained", "head-untrained"),
    "D": ("no-end-of-turn", "eos-missing"),
    "E": ("head-in-bfloat16", "head-in-half-precision"),
    "F": ("padded-with-eos", "pad-is-eos"),
}
#: check -> its diagnosis in words, and what shows it
_DIAGNOSES = {
    "head-in-half-precision": (
        "the head is in half precision",
        "Then most scores of different texts have no more than eight significant bits.",
    ),
    "pad-is-eos": (
        "the pad token is the EOS",
        "Then a text has the same score with its EOS and without.",
    ),
    "bos-doubled": (
        "texts begin with two BOS",
        "Then the tokenizer, called on plain text, writes the BOS id twice.",
    ),
    "head-untrained": (
        "the head was never trained",
        "Then the weights of the head have the spread of a fresh draw, initializer_range in the "
        "configuration.",
    ),
    "absolute-positions": (
        "padding is counted as positions",
        "Then padding on the left, as its tokenizer puts it, moves the score of a short text.",
    ),
    "eos-missing": (
        "no text ends with an end token",
        "Then the ids of a conversation, by the chat template, end in no end token.",
    ),
}
_SIGNS = dict(_DIAGNOSES.values())


def ward() -> dict[str, str]:
    """The folder of each of the six models."""
    return {letter: admit(specimen).target for letter, (specimen, _) in _PATIENTS.items()}


def run() -> dict[str, str]:
    """Ask the audit."""
    return {
        letter: _DIAGNOSES[diagnose(specimen, (check,))][0]
        for letter, (specimen, check) in _PATIENTS.items()
    }


_THREADS = {
    "A": "trl #469", "B": "reward-bench #164", "D": "reward-bench #94", "F": "transformers #35352",
}  # fmt: skip

EXERCISE = Prediction(
    id="ch09.sick_models",
    run=run,
    questions=tuple(
        question(letter, _DIAGNOSES[check][0], _SIGNS, _THREADS.get(letter))
        for letter, (_, check) in _PATIENTS.items()
    ),
    hints=(
        "Each is a folder: load model and tokenizer with transformers, look at the configuration "
        "and at the ids of a text before you look at scores.",
        "Score one text alone, with its last token taken off, and beside a longer one with the "
        "padding that its tokenizer makes. Look at the dtype and the spread of the head's weights.",
        "Two are seen in ids alone, two in the head's weights alone. Of the last two, one cannot "
        "tell a finished text from one that was cut off, the other has another score in a batch.",
    ),
    right="Three of the six score every text the same in each way of asking. No comparison of "
    "scores finds those: look at ids and weights too.",
)
