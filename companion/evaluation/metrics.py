"""Figures of a reward model on preference pairs, from its scores alone.

Every figure is the mean of one value per pair, or says what else it is. Rows that have no score are
counted and left out. A figure that cannot be computed (a correlation with a constant) is None.
Chapter 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import binomtest, pearsonr, spearmanr

from companion.errors import DataError, ShapeError
from companion.functional.calibration import (
    brier_score,
    calibrated_band,
    confidence_and_correctness,
    expected_calibration_error,
)
from companion.functional.losses import bradley_terry_loss
from companion.functional.resampling import Array, Interval, Values, bootstrap_interval

N_BINS = 10
NO_SCORE = "no score"
NOT_FINITE = "score is not finite"


def _array(name: str, values: Any, size: int | None = None) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or (size is not None and array.size != size):
        want = "[n]" if size is None else f"[{size}]"
        raise ShapeError(f"{name} must be {want}, not {list(array.shape)}")
    return array


def _sigmoid(margins: Array) -> Array:
    return np.exp(-_loss(margins))


def _loss(margins: Array) -> Array:
    return bradley_terry_loss(torch.tensor(margins), torch.zeros(margins.size).double()).numpy()


def accuracy_interval(correct: Array, groups: Sequence[Any] | None, seed: int = 0) -> Interval:
    """95% interval of a share: bootstrap over prompts, or Wilson's where all items are alike.

    The bootstrap has nothing to go by if nothing is wrong, and would answer [1, 1].

    Parameters
    ----------
    correct : array ``[n]``
        1 or 0.
    groups : sequence ``[n]``, optional
        Prompt of each item.
    """
    if correct.min() == correct.max():
        n = correct.size if groups is None else len(set(groups))
        low, high = binomtest(round(n * correct[0]), n).proportion_ci(method="wilson")
        return Interval(float(low), float(high))
    return bootstrap_interval(correct, groups, seed=seed)


def _correlation(scores: Array, lengths: Array) -> dict[str, float | None]:
    if scores.size < 3 or np.ptp(scores) == 0 or np.ptp(lengths) == 0:
        return {"pearson": None, "spearman": None}
    return {
        "pearson": float(pearsonr(scores, lengths).statistic),
        "spearman": float(spearmanr(scores, lengths).statistic),
    }


def _probabilistic(margins: Array, temperature: float, n_bins: int, seed: int) -> dict[str, Any]:
    """Loss and calibration of ``sigmoid(margin / temperature)``."""
    scaled = margins / temperature
    confidence, correct = confidence_and_correctness(scaled)
    band = calibrated_band(confidence, n_bins, "mass", True, seed=seed)
    plain_band = calibrated_band(confidence, n_bins, "width", False, seed=seed)
    return {
        "loss": float(_loss(scaled).mean()),
        # of the chosen's probability against 1: at a tie 0.25, not the 0 of 'half right'
        "brier": float(brier_score(_sigmoid(scaled), np.ones(scaled.size)).mean()),
        "ece": expected_calibration_error(confidence, correct, n_bins, "mass", True),
        "ece_band": list(band),
        "ece_plain": expected_calibration_error(confidence, correct, n_bins),
        "ece_plain_band": list(plain_band),
    }


def _limit(p: Array, margins: Array, n_bins: int, seed: int) -> dict[str, Any]:
    """What the true probabilities reach: on these labels, and on average over labels."""
    # In [0, 1] by the check before; the clip keeps a probability of 0 from an infinite loss.
    inside = np.clip(p, 1e-12, 1 - 1e-12)
    gold = np.log(inside) - np.log1p(-inside)
    confidence, correct = np.maximum(p, 1 - p), np.where(p == 0.5, 0.5, p > 0.5)
    choice = np.where(margins == 0, 0.5, np.where(margins > 0, p, 1 - p))
    rows = {
        "accuracy": float((p > 0.5).mean()),
        "loss": float(_loss(gold).mean()),
        "brier": float(((1 - p) ** 2).mean()),
        "ece": expected_calibration_error(confidence, correct, n_bins, "mass", True),
        "ece_band": list(calibrated_band(confidence, n_bins, "mass", True, seed=seed)),
    }
    expected = {
        "accuracy": float(confidence.mean()),
        "loss": float((p * _loss(gold) + (1 - p) * _loss(-gold)).mean()),
        "brier": float((p * (1 - p)).mean()),
        "ece": 0.0,
    }
    model = {
        "accuracy": float(choice.mean()),
        "loss": float((p * _loss(margins) + (1 - p) * _loss(-margins)).mean()),
    }
    return {"rows": rows, "expected": expected, "model_expected": model}


def _core(
    margins: Array, length_gap: Array | None, groups: Sequence[Any] | None, seed: int
) -> dict[str, Any]:
    correct = (margins > 0).astype(np.float64)
    ties = int((margins == 0).sum())
    result: dict[str, Any] = {
        "n": margins.size,
        "n_prompts": None if groups is None else len(set(groups)),
        "accuracy": float(correct.mean()),
        "accuracy_interval": list(accuracy_interval(correct, groups, seed)),
        "accuracy_ties_half": float((correct.sum() + ties / 2) / margins.size),
        "ties": ties,
        "loss": float(_loss(margins).mean()),
        "margin_mean": float(margins.mean()),
        "margin_std": float(margins.std()),
    }
    if length_gap is not None:
        same = int((length_gap == 0).sum())
        result["longer_wins"] = {
            # half: a rule that says nothing about equal lengths tosses a coin there
            "accuracy": float(((length_gap > 0).sum() + same / 2) / margins.size),
            "ties": same,
        }
    return result


def _listed(name: str, values: Sequence[Any] | npt.NDArray[Any] | None, size: int) -> Any:
    if values is not None and len(values) != size:
        raise ShapeError(f"{name} has {len(values)} entries for {size} pairs")
    return None if values is None else list(values)


def pairwise_metrics(
    chosen: Values,
    rejected: Values,
    *,
    chosen_lengths: Values | None = None,
    rejected_lengths: Values | None = None,
    subsets: Sequence[Any] | None = None,
    groups: Sequence[Any] | None = None,
    probability: Values | None = None,
    reasons: Sequence[str | None] | None = None,
    temperature: float | None = 1.0,
    n_bins: int = N_BINS,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of a reward model on pairs, ready for JSON.

    Parameters
    ----------
    chosen, rejected : array ``[n]``
        Raw scores; NaN where a row was dropped.
    chosen_lengths, rejected_lengths : array ``[n]``, optional
        Lengths of the completions or texts, in any unit.
    subsets : sequence ``[n]``, optional
        Name of each row's subset; each gets a row of figures.
    groups : sequence ``[n]``, optional
        Prompt of each row: the bootstrap draws prompts, since pairs of one prompt go together.
    probability : array ``[n]``, optional
        True probability that `chosen` is preferred, where it is known: gives the limit.
    reasons : sequence ``[n]`` of str or None, optional
        Why a row has no score.
    temperature : float or None, default 1
        T of the calibrated probability ``sigmoid(margin / T)``, usually from the manifest.
    n_bins : int, default 10
        Bins of the calibration error.
    seed : int, default 0
        Of the bootstrap and the band; the result is the same each time.

    Returns
    -------
    dict
        ``n_rows``, ``n`` (scored), ``n_prompts``, ``dropped`` {total, reasons};
        ``accuracy`` (a tie is wrong), ``accuracy_interval`` (95%), ``accuracy_ties_half``,
        ``ties``; ``margin_mean``, ``margin_std``; at T = 1 ``loss`` (nats), ``brier``, ``ece``
        (debiased, equal mass; confidence against correctness), ``ece_band`` (95% of a calibrated
        model), ``ece_plain``, ``ece_plain_band``; the same at the temperature under
        ``at_temperature`` (None if it is None); ``score_length`` and ``margin_length``
        correlations {pearson, spearman}; ``longer_wins`` {accuracy, ties}, the floor;
        ``limit`` {rows, expected, model_expected} or None: the true probabilities on these labels,
        on average over labels, and this model on average over labels; ``subsets``
        {name: figures}.

    Raises
    ------
    ShapeError
        If lengths differ.
    DataError
        If no row has a score, a probability is not in [0, 1] or a temperature not positive.
    """
    a = _array("chosen", chosen)
    size = a.size
    b = _array("rejected", rejected, size)
    subset_names = _listed("subsets", subsets, size)
    group_names = _listed("groups", groups, size)
    why = _listed("reasons", reasons, size) or [None] * size
    if temperature is not None and not (np.isfinite(temperature) and temperature > 0):
        raise DataError(f"temperature is {temperature}; it must be positive and finite")
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ShapeError("give the lengths of both sides, or of neither")

    keep = np.isfinite(a) & np.isfinite(b)
    lost: Counter[str] = Counter()
    for row in np.flatnonzero(~keep):
        infinite = np.isinf(a[row]) or np.isinf(b[row])
        lost[str(why[row] or (NOT_FINITE if infinite else NO_SCORE))] += 1
    if not keep.any():
        listing = ", ".join(f"{count} × {reason}" for reason, count in lost.most_common())
        raise DataError(
            f"none of the {size} pairs has a score" + (f": {listing}" if listing else ""),
            "look at the reasons: too long for the model, or not readable?",
        )

    def kept(values: list[Any] | None) -> list[Any] | None:
        return None if values is None else [v for v, k in zip(values, keep, strict=True) if k]

    margins = a[keep] - b[keep]
    kept_groups, kept_subsets = kept(group_names), kept(subset_names)
    length_gap, lengths = None, None
    if chosen_lengths is not None:
        long = _array("chosen_lengths", chosen_lengths, size)[keep]
        short = _array("rejected_lengths", rejected_lengths, size)[keep]
        if not (np.isfinite(long).all() and np.isfinite(short).all()):
            raise DataError("a pair that has scores lacks a finite length")
        length_gap, lengths = long - short, np.concatenate([long, short])
    p = None
    if probability is not None:
        p = _array("probability", probability, size)[keep]
        if not ((p >= 0) & (p <= 1)).all():
            raise DataError("a probability is missing or not in [0, 1]")

    result = {
        "n_rows": size,
        "dropped": {"total": int((~keep).sum()), "reasons": dict(lost.most_common())},
        **_core(margins, length_gap, kept_groups, seed),
        **_probabilistic(margins, 1.0, n_bins, seed),
        "at_temperature": None,
        "score_length": None,
        "margin_length": None,
        "limit": None if p is None else _limit(p, margins, n_bins, seed),
        "subsets": {},
    }
    result.setdefault("longer_wins", None)
    if temperature is not None:
        calibrated = _probabilistic(margins, temperature, n_bins, seed)
        result["at_temperature"] = {"temperature": float(temperature), **calibrated}
    if length_gap is not None and lengths is not None:
        result["score_length"] = _correlation(np.concatenate([a[keep], b[keep]]), lengths)
        result["margin_length"] = _correlation(margins, length_gap)
    if kept_subsets is not None:
        names = np.array([str(name) for name in kept_subsets])
        for name in sorted(set(names.tolist())):
            mine = names == name
            some = (
                None
                if kept_groups is None
                else [g for g, m in zip(kept_groups, mine, strict=True) if m]
            )
            figures = _core(
                margins[mine], None if length_gap is None else length_gap[mine], some, seed
            )
            figures["limit_accuracy"] = None if p is None else float((p[mine] > 0.5).mean())
            figures["limit_loss"] = (
                None if p is None else float(-np.log(np.maximum(p[mine], 1e-12)).mean())
            )
            result["subsets"][name] = figures
    return result
