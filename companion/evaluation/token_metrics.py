"""Figures of outcome and process models: AUC, step accuracy, the first error; each with its floors.

A model that judges solutions has easy rivals: always to say what is most frequent, or to go by the
length. A figure without them says little. Chapter 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from companion.errors import DataError, ShapeError
from companion.evaluation.metrics import N_BINS
from companion.functional.calibration import (
    brier_score,
    calibrated_band,
    expected_calibration_error,
)
from companion.functional.resampling import (
    Array,
    Values,
    accuracy_interval,
    bootstrap_interval,
    vector,
)


def roc_auc(scores: Values, labels: Values) -> float:
    """Area under the ROC curve: P(a right one scores above a wrong one), ties one half.

    Parameters
    ----------
    scores : array ``[n]``
    labels : array ``[n]``
        1 (or true) for right, 0 for wrong; both must occur.

    Raises
    ------
    ShapeError, DataError
        If the lengths differ, or only one label occurs.
    """
    values, positive = vector("scores", scores), vector("labels", labels) > 0.5
    if values.size != positive.size:
        raise ShapeError(f"{values.size} scores but {positive.size} labels")
    n_right = int(positive.sum())
    n_wrong = positive.size - n_right
    if not n_right or not n_wrong:
        raise DataError("an AUC needs right ones and wrong ones", "hold out more rows")
    total = rankdata(values)[positive].sum()
    return float((total - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def outcome_metrics(
    aggregates: Mapping[str, Values],
    labels: Values,
    *,
    how: str,
    lengths: Values,
    groups: Sequence[Any] | None = None,
    truth: Values | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of an outcome model on held-out texts, ready for JSON.

    Parameters
    ----------
    aggregates : mapping of str to array ``[n]``
        The score of each text under each aggregation.
    labels : array ``[n]``
        1 for right, 0 for wrong.
    how : str
        The aggregation that counts.
    lengths : array ``[n]``
        Tokens of each text.
    groups : sequence ``[n]``, optional
        Prompt of each text: the bootstrap draws prompts.
    truth : array ``[n]``, optional
        What is really right, where labels were drawn with noise: gives the limit.

    Returns
    -------
    dict
        ``n``, ``right`` (share), ``auc``, ``auc_interval`` (95%), ``auc_by_aggregation``;
        ``length_auc``, of the length alone in its better direction; ``limit_auc`` or None;
        ``accuracy`` of the aggregation at 0.5, ``accuracy_interval``, and ``majority``, the share
        of the more frequent label; of the aggregation as a probability ``loss`` (nats), ``brier``
        and ``brier_interval``, ``ece`` (debiased, equal mass; confidence against correctness) and
        ``ece_band``, 95% of what a calibrated model shows; all None for ``log_product``. AUCs are
        None if only one label occurs.
    """
    outcome = vector("labels", labels)
    both = 0 < outcome.sum() < outcome.size

    def auc(scores: Values) -> float | None:
        return roc_auc(scores, outcome) if both else None

    by_length = auc(lengths)
    result: dict[str, Any] = {
        "n": outcome.size,
        "n_prompts": None if groups is None else len(set(groups)),
        "right": float(outcome.mean()),
        "aggregation": how,
        "auc": auc(aggregates[how]),
        "auc_interval": None,
        "auc_by_aggregation": {name: auc(scores) for name, scores in aggregates.items()},
        "length_auc": None if by_length is None else max(by_length, 1 - by_length),
        "limit_auc": None if truth is None else auc(truth),
        "majority": float(max(outcome.mean(), 1 - outcome.mean())),
        **dict.fromkeys(("accuracy", "accuracy_interval", "loss")),
        **dict.fromkeys(("brier", "brier_interval", "ece", "ece_band")),
    }
    scores = vector("scores", aggregates[how])
    if both:
        result["auc_interval"] = list(_auc_interval(scores, outcome, groups, seed))
    if how != "log_product":
        inside = np.clip(scores, 1e-12, 1 - 1e-12)
        nll = -(outcome * np.log(inside) + (1 - outcome) * np.log1p(-inside))
        right = _right(scores, outcome)
        result |= {
            "accuracy": float(right.mean()),
            "accuracy_interval": list(accuracy_interval(right, groups, seed)),
            "loss": float(nll.mean()),
            **_as_probability(scores, outcome, groups, seed),
        }
    return result


def _right(scores: Array, outcome: Array) -> Array:
    return ((scores > 0.5) == (outcome > 0.5)).astype(np.float64)


def _as_probability(
    scores: Array, outcome: Array, groups: Sequence[Any] | None, seed: int
) -> dict[str, Any]:
    """Brier score and calibration of scores that are probabilities."""
    squares = brier_score(scores, outcome)
    right, confidence = _right(scores, outcome), np.maximum(scores, 1 - scores)
    return {
        "brier": float(squares.mean()),
        "brier_interval": list(bootstrap_interval(squares, groups, seed=seed)),
        "ece": expected_calibration_error(confidence, right, N_BINS, "mass", True),
        "ece_band": list(calibrated_band(confidence, N_BINS, "mass", True, seed=seed)),
    }


def _auc_interval(
    scores: Array, outcome: Array, groups: Sequence[Any] | None, seed: int
) -> tuple[float, float]:
    table = np.stack([scores, outcome], axis=1)

    def statistic(drawn: Any) -> float:
        both = 0 < drawn[:, 1].sum() < len(drawn)
        return roc_auc(drawn[:, 0], drawn[:, 1]) if both else 0.5

    return bootstrap_interval(table, groups, statistic=statistic, n_resamples=500, seed=seed)


# ---------------------------------------------------------------------- steps

#: for each solution, P(wrong) of its labelled steps, and whether each is wrong
Solutions = Sequence[tuple[Array, Array]]


def first_error_figures(solutions: Solutions, threshold: float) -> dict[str, float]:
    """How often the first wrong step is found, and a right solution passed.

    F1 is the harmonic mean of the two accuracies (ProcessBench, Zheng et al. 2024, arXiv
    2412.06559): that on solutions with an error, of which the first wrong step must be named, and
    that on solutions without one.

    Parameters
    ----------
    solutions : sequence of (array ``[S]``, array ``[S]``)
        P(wrong) of each labelled step, and 1 where the step is wrong.
    threshold : float
        The first step whose P(wrong) is above it is named.

    Returns
    -------
    dict
        ``first_error_f1``, ``accuracy_on_errors``, ``accuracy_on_right``, ``n_errors``,
        ``n_right``; NaN where there is nothing to count.
    """
    return figures_of_hits(_hits(solutions, threshold))


def _hits(solutions: Solutions, threshold: float) -> Array:
    """Of each solution whether it has an error, and whether the first one was named, or none."""
    firsts = [(_first(np.asarray(wrong) > 0.5), _first(p > threshold)) for p, wrong in solutions]
    rows = [(truth is not None, truth == named) for truth, named in firsts]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def figures_of_hits(hits: Array) -> dict[str, float]:
    """:func:`first_error_figures` from ``[n, 2]``: has it an error, and was the right one named."""
    on_errors, on_right = hits[hits[:, 0] == 1, 1], hits[hits[:, 0] == 0, 1]
    a, b = (float(found.mean()) if found.size else float("nan") for found in (on_errors, on_right))
    return {
        "first_error_f1": _harmonic(a, b),
        "accuracy_on_errors": a,
        "accuracy_on_right": b,
        "n_errors": on_errors.size,
        "n_right": on_right.size,
    }


def _first(where: Any) -> int | None:
    found = np.flatnonzero(where)
    return int(found[0]) if found.size else None


def _harmonic(a: float, b: float) -> float:
    return 0.0 if a + b == 0 else 2 * a * b / (a + b)


def fit_threshold(solutions: Solutions) -> float:
    """The threshold with the best first-error F1 on these solutions (0.5 if none is better).

    Candidates are 0.5 and the quantiles of all P(wrong); of equal ones the nearest to 0.5.
    """
    everything = np.concatenate([p for p, _ in solutions]) if solutions else np.zeros(0)
    if not everything.size:
        return 0.5
    candidates = np.unique([0.5, *np.quantile(everything, np.linspace(0.01, 0.99, 99))])
    scored = []
    for candidate in candidates:
        f1 = first_error_figures(solutions, float(candidate))["first_error_f1"]
        scored.append((np.nan_to_num(f1), -abs(candidate - 0.5), candidate))
    return float(max(scored)[2])


def guessing_f1(solutions: Solutions) -> float:
    """Best first-error F1 of guessing: each step is called wrong with one probability q.

    Never to name an error, or always the same step, has an F1 of 0; the best q is a fairer floor.
    """
    firsts = [(_first(np.asarray(wrong) > 0.5), len(wrong)) for _, wrong in solutions]
    errors = np.array([first for first, _ in firsts if first is not None], dtype=np.float64)
    right = np.array([size for first, size in firsts if first is None], dtype=np.float64)
    if not errors.size or not right.size:
        return float("nan")
    return max(
        _harmonic(float((q * (1 - q) ** errors).mean()), float(((1 - q) ** right).mean()))
        for q in np.linspace(0.01, 0.99, 99)
    )


def process_metrics(
    solutions: Solutions,
    *,
    threshold: float,
    right: Sequence[Array],
    labels: Sequence[Array],
    truth: Sequence[Array] | None = None,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of a process model on held-out solutions, ready for JSON.

    Parameters
    ----------
    solutions : sequence of (array, array)
        As for :func:`first_error_figures`.
    threshold : float
        For the first error.
    right : sequence of arrays
        1 where the most likely class is that of the label, for each labelled step.
    labels : sequence of arrays
        The class of each labelled step, for the majority.
    truth : sequence of arrays, optional
        1 where a step is really wrong, where labels were drawn with noise: gives the limit.
    groups : sequence, optional
        Prompt of each solution: the bootstrap draws prompts; each solution its own if absent.
    seed : int, default 0
        Of the bootstrap and the band.

    Returns
    -------
    dict
        ``n``, ``n_prompts``, ``n_steps``; ``step_accuracy`` with ``step_accuracy_interval`` and
        ``majority`` (the share of the most frequent class); ``first_error`` at the ``threshold``
        with ``first_error_interval`` (95%, of its F1), and ``first_error_at_half``;
        ``guessing_f1``; ``limit_f1``, of the truth against these labels, or None; of P(wrong) over
        all labelled steps ``wrong_auc`` and ``wrong_auc_interval`` (None if none or all are wrong),
        beside ``position_auc``, of the step's number alone in its better direction; and ``brier``,
        ``brier_interval``, ``ece``, ``ece_band`` as in :func:`outcome_metrics`.
    """
    if not solutions:
        raise DataError("there is no solution with a labelled step", "hold out more rows")
    probabilities = np.concatenate([p for p, _ in solutions])
    wrong = np.concatenate([w for _, w in solutions]).astype(np.float64)
    _, counts = np.unique(np.concatenate(labels), return_counts=True)
    limit = None
    if truth is not None:
        known = [(np.asarray(t), w) for t, (_, w) in zip(truth, solutions, strict=True)]
        limit = first_error_figures(known, 0.5)["first_error_f1"]
    named = list(groups) if groups is not None else list(range(len(solutions)))
    sizes = [len(p) for p, _ in solutions]
    owner = [name for name, size in zip(named, sizes, strict=True) for _ in range(size)]
    correct = np.concatenate(right).astype(np.float64)
    result: dict[str, Any] = {
        "n": len(solutions),
        "n_prompts": len(set(named)),
        "n_steps": int(wrong.size),
        "step_accuracy": float(correct.mean()),
        "step_accuracy_interval": list(accuracy_interval(correct, owner, seed)),
        "majority": float(counts.max() / counts.sum()),
        "threshold": threshold,
        "first_error": first_error_figures(solutions, threshold),
        "first_error_interval": list(_first_error_interval(solutions, threshold, named, seed)),
        "first_error_at_half": first_error_figures(solutions, 0.5),
        "guessing_f1": guessing_f1(solutions),
        "limit_f1": limit,
        **dict.fromkeys(("wrong_auc", "wrong_auc_interval", "position_auc")),
        **_as_probability(probabilities, wrong, owner, seed),
    }
    if 0 < wrong.sum() < wrong.size:
        by_number = roc_auc(np.concatenate([np.arange(size) for size in sizes]), wrong)
        result |= {
            "wrong_auc": roc_auc(probabilities, wrong),
            "wrong_auc_interval": list(_auc_interval(probabilities, wrong, owner, seed)),
            "position_auc": max(by_number, 1 - by_number),
        }
    return result


def _first_error_interval(
    solutions: Solutions, threshold: float, groups: Sequence[Any], seed: int
) -> tuple[float, float]:
    """Of the F1: whole prompts are drawn, and the two accuracies taken anew."""
    hits = _hits(solutions, threshold)
    whole = figures_of_hits(hits)["first_error_f1"]

    def statistic(drawn: Any) -> float:
        f1 = figures_of_hits(drawn)["first_error_f1"]
        return whole if np.isnan(f1) else f1  # of one sort none was drawn

    return bootstrap_interval(hits, groups, statistic=statistic, n_resamples=500, seed=seed)
