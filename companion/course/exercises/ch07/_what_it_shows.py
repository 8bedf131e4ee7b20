"""Predict what a perfect model shows, then run."""

from __future__ import annotations

from typing import Any

import numpy as np

from companion.course.exercise import Prediction, Question
from companion.functional import (
    bets_of,
    confidence_and_correctness,
    expected_calibration_error,
    fit_temperature,
    log_growth,
    mix,
    mix_starts,
)

Array = np.ndarray[Any, np.dtype[np.float64]]


def draw(count: int, seed: int = 0) -> Array:
    """Margins (chosen minus rejected) of a model that is perfectly calibrated."""
    rng = np.random.default_rng(seed)
    margin = rng.normal(0, 2, count)
    return np.where(rng.random(count) < 1 / (1 + np.exp(-margin)), margin, -margin)


def plain_error(count: int) -> float:
    """Mean of 50 plain calibration errors on so many pairs."""
    errors = [
        expected_calibration_error(*confidence_and_correctness(draw(count, seed)))
        for seed in range(50)
    ]
    return float(np.mean(errors))


def evidence(margins: Array, accuracy: float) -> Array:
    """Log of the e-process against a fall below an accuracy, in weeks of 200 pairs."""
    right = (margins > 0).astype(float).reshape(-1, 200)
    return mix(mix_starts(log_growth(accuracy - right, bets_of(1 - accuracy))))


def run() -> dict[str, Any]:
    """Compute all four."""
    many = draw(100_000)
    always = expected_calibration_error(1 / (1 + np.exp(-many)), np.ones(many.size))
    ratio = plain_error(200) / plain_error(5000)
    twice = fit_temperature(2 * many)
    accuracy = float((many > 0).mean())
    doubted = many[np.abs(many) < np.median(np.abs(many))][:4000]
    alarm = bool((evidence(doubted, accuracy) > np.log(100)).any())
    return {
        "outcome always 1": min(("0", "0.3", "0.5"), key=lambda x: abs(float(x) - always)),
        "200 pairs against 5,000": min(
            ("1 times", "5 times", "25 times"), key=lambda x: abs(float(x.split()[0]) - ratio)
        ),
        "twice the margins": "temperature 2" if abs(twice - 2) < 0.05 else "temperature 0.5",
        "only doubtful pairs labelled": "alarm" if alarm else "no alarm",
    }


EXERCISE = Prediction(
    id="ch07.what_it_shows",
    run=run,
    questions=(
        Question(
            "outcome always 1",
            ("0", "0.3", "0.5"),
            {
                "0": "A perfect model is taken to have an error of 0 whatever it is compared with. "
                "An outcome that never varies leaves 1 − mean(p).",
                "0.5": "The model is taken for a coin. It is right more often than that, and says "
                "so: 1 − mean(p) is below one half.",
            },
        ),
        Question(
            "200 pairs against 5,000",
            ("1 times", "5 times", "25 times"),
            {
                "1 times": "The error is taken for a property of the model. On few pairs most of "
                "it is noise.",
                "25 times": "Noise is taken to fall as 1/n. It falls as 1 over the root of n.",
            },
        ),
        Question(
            "twice the margins",
            ("temperature 2", "temperature 0.5", "temperature 1"),
            {
                "temperature 0.5": "The temperature is taken to multiply. Margins are *divided* "
                "by it.",
                "temperature 1": "The temperature is taken to hang on the ranking. It mends the "
                "scale, and only that has changed.",
            },
        ),
        Question(
            "only doubtful pairs labelled",
            ("alarm", "no alarm"),
            {
                "no alarm": "An e-process is taken to bear any choice of the pairs. It bears any "
                "number of looks; doubtful pairs compared with random ones are a fall.",
            },
        ),
    ),
    hints=(
        "For each, ask what would be seen if the model were perfect and nothing happened.",
        "Noise in a mean of n falls as 1/√n; σ(Δ/T) with Δ doubled needs which T?",
        "A model with 0.5 in all pairs would show 0.5 in the first. The accuracy of the pairs that "
        "it doubts is below that of all.",
    ),
    right="Each of these numbers looks like a fault of the model, and none is one.",
)
