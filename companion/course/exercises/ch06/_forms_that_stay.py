"""Predict which forms of a score survive a change of the model, then run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from companion.course.exercise import Prediction, Question
from companion.models import ReferenceStats

Array = np.ndarray[Any, np.dtype[np.float64]]

FORMS = ("raw", "centred", "z", "percentile")


def draw(seed: int = 0) -> tuple[Array, Array]:
    """Scores of 2,000 texts of the reference, and of 500 new texts."""
    rng = np.random.default_rng(seed)
    return rng.gamma(2.0, size=2000) - 1.5, rng.gamma(2.2, size=500) - 1.5


def forms(scores: Array, reference: Array) -> dict[str, Array]:
    """All four forms of scores against a reference."""
    stats = ReferenceStats.from_scores(reference, "drawn")
    return {
        "raw": scores,
        "centred": stats.centered(scores),
        "z": stats.z(scores),
        "percentile": stats.percentile(scores),
    }


def _retrained(scores: Array) -> Array:
    return scores + 0.5 * np.random.default_rng(len(scores)).normal(size=len(scores))


#: what becomes of a score, in the reference and in the new texts alike
CHANGES: dict[str, Callable[[Array], Array]] = {
    "the old model plus 3": lambda scores: scores + 3,
    "twice the old model": lambda scores: 2 * scores,
    "the sigmoid of the old model": lambda scores: 1 / (1 + np.exp(-scores)),
    "minus the old model": lambda scores: -scores,
    "trained again with another seed": _retrained,
}


def staying(before: dict[str, Array], after: dict[str, Array]) -> str:
    """Names of the forms that are the same, but for a percentile of half a point."""
    tolerance = dict.fromkeys(FORMS, 1e-9) | {"percentile": 0.5}
    kept = [f for f in FORMS if np.allclose(before[f], after[f], atol=tolerance[f])]
    return ", ".join(kept) or "none"


def run() -> dict[str, Any]:
    """Score old and new, reference and texts, and compare the forms."""
    reference, texts = draw()
    before = forms(texts, reference)
    found: dict[str, Any] = {
        name: staying(before, forms(change(texts), change(reference)))
        for name, change in CHANGES.items()
    }
    harder = np.sort(reference)[:1000]  # the worse half as the reference
    found["the same model, another reference"] = staying(before, forms(texts, harder))
    return found


ALL_BUT_RAW, TWO, LAST, NONE = "centred, z, percentile", "z, percentile", "percentile", "none"

EXERCISE = Prediction(
    id="ch06.forms_that_stay",
    run=run,
    questions=(
        Question(
            "the old model plus 3",
            (ALL_BUT_RAW, TWO, NONE),
            {
                TWO: "Centred scores are taken to move with the model. The reference's mean moves "
                "by the same 3, and the difference from it does not see it.",
                NONE: "The reference is taken to be stored numbers. It is texts: each version "
                "scores them itself, so a constant is in both and drops out.",
            },
        ),
        Question(
            "twice the old model",
            (ALL_BUT_RAW, TWO, LAST),
            {
                ALL_BUT_RAW: "Centring is taken to undo a factor. It subtracts; only a division "
                "by the spread takes the factor away.",
                LAST: "z is taken to be a matter of units. The reference's standard deviation "
                "doubles as well, so z stays as it is.",
            },
        ),
        Question(
            "the sigmoid of the old model",
            (TWO, LAST, NONE),
            {
                TWO: "z is taken to undo any increasing change. It undoes a shift and a factor; a "
                "sigmoid presses the ends together and changes the distances.",
                NONE: "A curve is taken to spoil the percentile. It counts which texts are lower, "
                "and an increasing curve leaves the order alone.",
            },
            thread="vllm #12910",
        ),
        Question(
            "minus the old model",
            (LAST, "z, percentile", NONE),
            {
                LAST: "The percentile is taken to bear anything that is monotone. It bears what "
                "*increases*: turned round, the best text has percentile 0.",
                "z, percentile": "A factor of −1 is taken for a factor like 2. The standard "
                "deviation is positive, so the sign stays in z, and the order is turned round.",
            },
        ),
        Question(
            "trained again with another seed",
            (TWO, LAST, NONE),
            {
                TWO: "Two trainings are taken to differ by shift and scale. They disagree about "
                "single texts, and no form takes that away.",
                LAST: "A percentile is taken to make each text's verdict the same. It keeps the "
                "*share* of texts above a threshold; which texts these are has changed.",
            },
        ),
        Question(
            "the same model, another reference",
            ("raw", LAST, NONE),
            {
                LAST: "The percentile is taken to belong to the text. It belongs to the text *and* "
                "the reference: beside worse texts every text looks better.",
                NONE: "The model has not changed, and the raw score asks no reference. So it "
                "stays: it just says nothing about quality.",
            },
        ),
    ),
    hints=(
        "Each version scores the reference itself. Write down s − mean(q) for s and q changed in "
        "the same way.",
        "Centred undoes +b. z undoes a·s + b with a > 0. What does a percentile undo, and what can "
        "none of them undo?",
        "An increasing change leaves the percentile, whatever its shape. Noise and a change of "
        "sign leave none. Another reference leaves what did not look at it.",
    ),
    right="Choose the form that forgets what you cannot promise to keep, and no more: centred "
    "scores still are logits, percentiles only an order. And none of them makes two trainings "
    "agree about one text.",
)
