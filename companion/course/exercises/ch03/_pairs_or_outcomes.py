"""Predict what Bradley–Terry on right-against-wrong pairs learns, against an outcome model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from companion.course.exercise import Prediction, Question
from companion.evaluation.token_metrics import roc_auc

PROMPTS, ANSWERS, STEPS = 800, 4, 100
FEATURES = ("constant", "difficulty", "quality")


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """Features ``[prompts, answers, 3]`` and outcomes ``[prompts, answers]``.

    Difficulty belongs to the prompt, quality to the answer; about a third of the answers is right.
    """
    generator = torch.Generator().manual_seed(seed)
    difficulty = torch.randn(PROMPTS, 1, generator=generator).expand(-1, ANSWERS)
    quality = torch.randn(PROMPTS, ANSWERS, generator=generator)
    features = torch.stack([torch.ones_like(quality), difficulty, quality], dim=2)
    chance = torch.sigmoid(features @ torch.tensor([-1.0, -1.5, 1.5]))
    return features, torch.rand(chance.shape, generator=generator) < chance


def right_against_wrong(features: Tensor, right: Tensor) -> Tensor:
    """Differences of features, right − wrong, for all such pairs of one prompt."""
    gaps = features[:, :, None] - features[:, None, :]
    return gaps[right[:, :, None] & ~right[:, None, :]]


def fit(features: Tensor, right: Tensor, kind: str) -> Tensor:
    """Weights after gradient descent from zero: Bradley–Terry on pairs, or on outcomes."""
    weight = torch.zeros(len(FEATURES))
    pairs, label = right_against_wrong(features, right), right.float()
    for _ in range(STEPS):
        if kind == "pairs":
            force = torch.sigmoid(-(pairs @ weight))
            weight = weight + 2.0 * (force[:, None] * pairs).mean(0)
        else:
            force = label - torch.sigmoid(features @ weight)
            weight = weight + 2.0 * (force[:, :, None] * features).mean((0, 1))
    return weight


def figures(weight: Tensor, features: Tensor, right: Tensor) -> dict[str, float]:
    """What a linear model with these weights does on new prompts."""
    scores = features @ weight
    picked = right.gather(1, scores.argmax(1, keepdim=True))
    return {
        "best of four is right": float(picked.float().mean()),
        "AUC over all prompts": roc_auc(scores.flatten().numpy(), right.flatten().numpy()),
        "mean of sigmoid(score)": float(torch.sigmoid(scores).mean()),
        "share that is right": float(right.float().mean()),
        "weight of difficulty": float(weight[1]),
    }


def _against(value: float, other: float, tolerance: float, words: tuple[str, str, str]) -> str:
    below, same, above = words
    return same if abs(value - other) < tolerance else (below if value < other else above)


def run() -> dict[str, Any]:
    """Train both kinds on the same answers and measure them on others."""
    old, new = draw(0), draw(1)
    pairs, outcomes = fit(*old, "pairs"), fit(*old, "outcomes")
    bt, orm = figures(pairs, *new), figures(outcomes, *new)
    moves = ("lower", "about the same", "higher")
    some = old[1].any(1)  # prompts with at least one right answer
    taught = [
        kind
        for kind, whole in (("pairs", pairs), ("outcomes", outcomes))
        if float((fit(old[0][some], old[1][some], kind) - whole).abs().max()) > 0.01
    ]
    return {
        "best of four is right": _against(
            bt["best of four is right"], orm["best of four is right"], 0.01, moves
        ),
        "AUC over all prompts": _against(
            bt["AUC over all prompts"], orm["AUC over all prompts"], 0.01, moves
        ),
        "mean of sigmoid(score)": _against(
            bt["mean of sigmoid(score)"],
            bt["share that is right"],
            0.03,
            ("too low", "about right", "too high"),
        ),
        "weight of difficulty": "zero" if abs(bt["weight of difficulty"]) < 1e-4 else "negative",
        "prompts with wrong answers alone": {
            (): "teach neither",
            ("pairs",): "teach the pairs' model alone",
            ("outcomes",): "teach the outcome model alone",
            ("pairs", "outcomes"): "teach both",
        }[tuple(taught)],
    }


EXERCISE = Prediction(
    id="ch03.pairs_or_outcomes",
    run=run,
    questions=(
        Question(
            "best of four is right",
            ("lower", "about the same", "higher"),
            {
                "lower": "Pairs are taken to lose what tells the answers of one prompt apart. That "
                "is the one thing that they hold: among answers to one prompt both kinds rank by "
                "the quality.",
                "higher": "Training on comparisons is taken to make comparisons better. Both see "
                "the same answers and the same outcomes, and within a prompt they learn the same "
                "order.",
            },
        ),
        Question(
            "AUC over all prompts",
            ("lower", "about the same", "higher"),
            {
                "about the same": "A score is taken to mean the same for every prompt. Pairs never "
                "compare answers of two prompts, so an easy prompt's wrong answer may well score "
                "above a hard prompt's right one.",
                "higher": "The pairs' model is taken to be the better ranker. It ranks within a "
                "prompt; across prompts it does not know which problems are hard.",
            },
        ),
        Question(
            "mean of sigmoid(score)",
            ("too low", "about right", "too high"),
            {
                "too low": "The direction is turned round: a third of the answers is right, and "
                "the scores of the pairs' model lie around 0, where the sigmoid is one half.",
                "about right": "σ(score) is taken for the probability of being right. In "
                "Bradley–Terry only σ of a *difference* is a probability; the level of the scores "
                "is free.",
            },
        ),
        Question(
            "weight of difficulty",
            ("negative", "zero"),
            {
                "negative": "The pairs' model is taken to learn that hard problems are more often "
                "answered wrongly. Both answers of a pair have the same prompt, so its difficulty "
                "cancels in the difference.",
            },
        ),
        Question(
            "prompts with wrong answers alone",
            (
                "teach neither",
                "teach the outcome model alone",
                "teach the pairs' model alone",
                "teach both",
            ),
            {
                "teach neither": "Prompts without a right answer are taken to be useless. They "
                "give no pair, but to an outcome model they say that these answers are wrong.",
                "teach the pairs' model alone": "It is the other way round: a pair needs a right "
                "and a wrong answer, a label needs an answer alone.",
                "teach both": "Every prompt is taken to give pairs. Where all answers are wrong "
                "there is nothing to compare, and the prompt drops out without a word.",
            },
        ),
    ),
    hints=(
        "Write down the difference of two feature vectors of the *same* prompt. Which of the three "
        "entries can differ from 0?",
        "So the pairs' model knows the quality and nothing else. Which of the figures need more "
        "than the order within a prompt?",
        "Within a prompt nothing is lost. Across prompts, and as a probability, the score says "
        "little: no weight on the difficulty, a level of about 0.",
    ),
    right="Bradley–Terry on right-against-wrong pairs is no outcome model: it picks the best "
    "answer to a prompt as well, but its score is no probability of being right and cannot be "
    "compared across prompts. Where you need a threshold ('good enough to send?'), train on "
    "outcomes.",
)
