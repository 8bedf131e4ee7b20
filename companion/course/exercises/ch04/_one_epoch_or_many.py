"""Predict what one epoch and many do, then train."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.course.exercise import Prediction, Question

MOVES = ("lower", "about the same", "higher")
FEATURES, PAIRS, HELD_OUT, MANY = 200, 400, 4000, 60


def _draw(generator: torch.Generator, truth: Tensor, size: int) -> Tensor:
    """Differences of features, turned so that the label says 'first is better'."""
    x = torch.randn(size, FEATURES, generator=generator)
    flip = torch.rand(size, generator=generator) > torch.sigmoid(x @ truth)
    return torch.where(flip[:, None], -x, x)


def train(epochs: int, seed: int = 0) -> dict[str, float]:
    """Train a linear reward model on noisy pairs; its figures on these and on new pairs."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.zeros(FEATURES)
    truth[:10] = 0.5
    pairs, new = _draw(generator, truth, PAIRS), _draw(generator, truth, HELD_OUT)
    weight = torch.zeros(FEATURES)
    for _ in range(epochs):
        for batch in pairs.split(8):
            force = torch.sigmoid(-(batch @ weight))
            weight = weight + 0.05 * (force[:, None] * batch).mean(dim=0)
    return {
        "training loss": float(-F.logsigmoid(pairs @ weight).mean()),
        "held-out loss": float(-F.logsigmoid(new @ weight).mean()),
        "held-out accuracy": float((new @ weight > 0).float().mean()),
        "held-out confidence": float(torch.sigmoid((new @ weight).abs()).mean()),
    }


def run() -> dict[str, Any]:
    """Make the experiment: what many epochs do, against one."""
    one, many = train(1), train(MANY)
    return {
        name: "about the same"
        if abs(many[name] - one[name]) < 0.01
        else ("higher" if many[name] > one[name] else "lower")
        for name in one
    }


EXERCISE = Prediction(
    id="ch04.one_epoch_or_many",
    run=run,
    questions=(
        Question(
            "training loss",
            MOVES,
            {
                "about the same": "The model is taken to be done after one pass. With as many "
                "weights as here, it can go on fitting these very pairs for long.",
                "higher": "Descent on the training loss makes the training loss fall; that is all "
                "it promises.",
            },
        ),
        Question(
            "held-out loss",
            MOVES,
            {
                "lower": "What is learned in later epochs is taken to be of use for new pairs. It "
                "is the noise of these labels that is left to learn.",
                "about the same": "Overfitting is taken to stop at 'no more gain'. The loss on new "
                "pairs rises, since the model grows sure of what it has memorised.",
            },
        ),
        Question(
            "held-out accuracy",
            MOVES,
            {
                "about the same": "Only the confidence is taken to suffer. The memorised noise "
                "also turns the order of new pairs round.",
                "higher": "More training is taken for better. The pairs' labels are partly chance, "
                "and later epochs learn that chance by heart.",
            },
        ),
        Question(
            "held-out confidence",
            MOVES,
            {
                "lower": "A model that overfits does not grow careful: the weights go on growing, "
                "and with them all margins, on new pairs too.",
                "about the same": "The scale is taken to be settled after one epoch. Nothing in "
                "the loss stops the margins of memorised pairs from growing.",
            },
        ),
    ),
    hints=(
        "There are 400 pairs, 200 weights, and labels that are partly chance. What is left to "
        "learn after the true direction?",
        "Two of the four figures look better to someone who sees only the training set or only "
        "the confidence.",
        "The training loss is a promise about the pairs that were seen. The other three are about "
        "new pairs: two get worse, and the model is surer of itself than before.",
    ),
    right="Training loss falls, held-out loss rises, accuracy falls, confidence rises: the "
    "training curve looks best when the model is worst. Hence a held-out set, looked at after each "
    "epoch.",
)
