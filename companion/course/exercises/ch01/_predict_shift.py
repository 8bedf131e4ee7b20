"""Predict what shifts and scales do to loss and accuracy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from companion.course.exercise import Prediction, Question
from companion.course.exercises._tools import normal

MOVES = ("lower", "same", "higher")


def _compare(before: Tensor | float, after: Tensor | float) -> str:
    gap = float(after) - float(before)
    return "same" if abs(gap) < 1e-5 else "higher" if gap > 0 else "lower"


def run() -> dict[str, Any]:
    """Make the experiment."""
    from companion.functional.losses import bradley_terry_loss
    from companion.functional.selection import pairwise_accuracy

    c, r = normal(0, 400, dtype=torch.float64), normal(1, 400, dtype=torch.float64)
    loss, accuracy = bradley_terry_loss(c, r).mean(), pairwise_accuracy(c, r).mean()
    prompt = normal(2, 400, dtype=torch.float64, scale=30.0)
    wrong_c, wrong_r = torch.tensor([0.0]), torch.tensor([1.0])
    once = bradley_terry_loss(wrong_c, wrong_r)
    twice = bradley_terry_loss(2 * wrong_c, 2 * wrong_r)
    return {
        "add 7.3 to all scores": _compare(loss, bradley_terry_loss(c + 7.3, r + 7.3).mean()),
        "add another number for each prompt": _compare(
            loss, bradley_terry_loss(c + prompt, r + prompt).mean()
        ),
        "double the scores of a pair that is wrong": _compare(once, twice),
        "accuracy when all scores double": _compare(
            accuracy, pairwise_accuracy(2 * c, 2 * r).mean()
        ),
        "add 1 to the chosen scores alone": _compare(loss, bradley_terry_loss(c + 1, r).mean()),
    }


EXERCISE = Prediction(
    id="ch01.predict_shift",
    run=run,
    questions=(
        Question(
            "add 7.3 to all scores",
            MOVES,
            {
                "lower": "Higher scores are taken for better ones. The loss sees only the "
                "difference chosen − rejected, and a common shift cancels in it.",
                "higher": "A common shift is taken to cost something. Only the centring penalty "
                "(Chapter 4) looks at the level of the scores; the loss itself sees differences.",
            },
        ),
        Question(
            "add another number for each prompt",
            MOVES,
            {
                "lower": "An offset for each prompt is taken for information. Both completions of "
                "a pair answer the same prompt, so the offset cancels pair by pair.",
                "higher": "Only a shift common to *all* scores is taken to be free. It is enough "
                "that both texts of a pair get the same number: the loss allows any function of "
                "the prompt.",
            },
        ),
        Question(
            "double the scores of a pair that is wrong",
            MOVES,
            {
                "lower": "Larger margins are taken to be better. They are if they have the right "
                "sign: here the model is surer of what is wrong.",
                "same": "The loss is taken for a function of the order alone. Accuracy is; the "
                "loss also asks how sure the model was.",
            },
        ),
        Question(
            "accuracy when all scores double",
            MOVES,
            {
                "lower": "Accuracy is taken to feel the scale. It sees the sign of each margin, "
                "which doubling does not change.",
                "higher": "More confident is taken for more often right. No sign changes, so "
                "accuracy stays; what changes is the calibration.",
            },
        ),
        Question(
            "add 1 to the chosen scores alone",
            MOVES,
            {
                "same": "A shift is free only if *both* scores of a pair get it. Here every "
                "margin grows by 1.",
                "higher": "The margin grows by 1 for every pair, and the loss falls with the "
                "margin.",
            },
        ),
    ),
    hints=(
        "Write Δ = chosen − rejected for each case, before and after.",
        "The loss is a falling function of Δ; accuracy is a function of its sign.",
        "Two of the five leave every Δ as it is, one leaves every sign as it is.",
    ),
    right="The loss determines differences within a prompt, and nothing else. That is why rewards "
    "of different prompts must not be compared.",
)
