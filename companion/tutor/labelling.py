"""How the tutor's annotators turn gold rewards into labels, and the best that any model can reach.

Labels are drawn from Bradley–Terry on r* (Chapter 1). Each dial bends that in one known way, and
:func:`preference_probability` is the probability after all of them, so that the limits are computed
and not estimated.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from companion.errors import DataError
from companion.functional.calibration import calibrated_band
from companion.tutor.gold import GOLD, Grade


@dataclass(frozen=True)
class Dials:
    """What can be wrong with preference data, each by its own amount.

    All at their defaults: labels are drawn from σ(r*(first) − r*(second)) and nothing else.
    """

    #: share of labels that are a coin's flip
    noise: float = 0.0
    #: ν of Davidson's model (1970): P(tie) = ν√(pq) / (p + q + ν√(pq)); a coin labels a tie
    ties: float = 0.0
    #: logits that annotators add for every ten words a completion is longer than the other
    length_bias: float = 0.0
    #: how many annotators there are; above 1 their tastes in style differ
    annotators: int = 1
    #: standard deviation of an annotator's factor on the style weights (mean 1)
    disagreement: float = 1.0
    #: share of completions from the drifted policy: friendly, wordy and more often wrong
    shift: float = 0.0
    #: share of wrong steps that misread the problem (the others slip in the arithmetic); the tutor
    #: base checks sums but hardly compares a step with its problem
    misreads: float = 0.0

    def __post_init__(self) -> None:
        for name, high in (("noise", 1), ("ties", 100), ("shift", 1), ("misreads", 1)):
            value = getattr(self, name)
            if not 0 <= value <= high:
                raise DataError(f"dial {name}={value} is outside [0, {high}]")
        if self.annotators < 1 or self.disagreement < 0:
            raise DataError("annotators must be at least 1 and disagreement at least 0")


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _style_part(grade: Grade) -> float:
    """The part of r* that annotators may disagree on."""
    return GOLD(grade) - GOLD.correct * grade.correct - GOLD.steps * grade.validity


def annotator_factors(dials: Dials) -> list[float]:
    """Each annotator's factor on the style weights: the same list for the same dials."""
    if dials.annotators == 1:
        return [1.0]
    rng = random.Random(f"annotators/{dials.annotators}")
    return [rng.gauss(1.0, dials.disagreement) for _ in range(dials.annotators)]


def annotator_gap(first: Grade, second: Grade, dials: Dials, factor: float) -> float:
    """The logit by which one annotator prefers ``first``: gold gap, own taste, length bias."""
    gap = GOLD(first) - GOLD(second)
    gap += (factor - 1.0) * (_style_part(first) - _style_part(second))
    return gap + dials.length_bias * (first.n_words - second.n_words) / 10


def tie_probability(gap: float, dials: Dials) -> float:
    """Davidson (1970): with p = σ(gap), ν√(pq) / (1 + ν√(pq))."""
    p = _sigmoid(gap)
    weight = dials.ties * math.sqrt(p * (1 - p))
    return weight / (1 + weight)


def label_probability(gap: float, dials: Dials) -> float:
    """P(the label says ``first``) for an annotator's gap: ties split evenly, noise mixed in."""
    tie = tie_probability(gap, dials)
    p = (1 - tie) * _sigmoid(gap) + tie / 2
    return (1 - dials.noise) * p + dials.noise / 2


def preference_probability(first: Grade, second: Grade, dials: Dials) -> float:
    """P(the label says ``first``) before the annotator is known: what a model can hope to learn."""
    factors = annotator_factors(dials)
    gaps = [annotator_gap(first, second, dials, factor) for factor in factors]
    return sum(label_probability(gap, dials) for gap in gaps) / len(gaps)


@dataclass(frozen=True)
class Limits:
    """The best that any model of (prompt, completion) can reach on given pairs.

    ``accuracy`` and ``loss`` (nats per pair) are expectations over the labels; ``label_accuracy``
    and ``label_loss`` are those of the true probabilities on the labels that were drawn, which is
    what a model's figures on the same rows should be compared with. ``ece_band`` is the 95%
    interval of the debiased ECE that a perfectly calibrated model shows on so many pairs.
    """

    n: int
    accuracy: float
    loss: float
    label_accuracy: float
    label_loss: float
    ece_band: tuple[float, float]


def limits(rows: Sequence[Mapping[str, object]]) -> Limits:
    """Compute the limits of pairs made by :func:`companion.tutor.make_rows`.

    Parameters
    ----------
    rows : sequence of mappings
        Each with ``probability``, the true probability that ``chosen`` is preferred.

    Raises
    ------
    DataError
        If there are no rows, or a row has no ``probability``.
    """
    if not len(rows):
        raise DataError("no rows to compute limits of")
    values = [row.get("probability") for row in rows]
    for index, value in enumerate(values):
        if not isinstance(value, float):
            raise DataError(
                f"row {index}: no 'probability', so the limits are not known",
                "limits exist for pairs made by 'companion data tutor --kind pairs'",
            )
    p = np.clip(np.array(values, dtype=np.float64), 1e-12, 1 - 1e-12)
    confidence = np.maximum(p, 1 - p)
    low, high = calibrated_band(confidence, debias=True, strategy="mass")
    return Limits(
        n=len(p),
        accuracy=float(confidence.mean()),
        loss=float(-(p * np.log(p) + (1 - p) * np.log1p(-p)).mean()),
        label_accuracy=float((p > 0.5).mean()),
        label_loss=float(-np.log(p).mean()),
        ece_band=(float(low), float(high)),
    )
