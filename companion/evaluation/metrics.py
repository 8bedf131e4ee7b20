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
from scipy.stats import pearsonr, spearmanr

from companion.errors import DataError, ShapeError
from companion.functional.calibration import (
    brier_score,
    calibrated_band,
    confidence_and_correctness,
    expected_calibration_error,
)
from companion.functional.losses import bradley_terry_loss
from companion.functional.resampling import Array, Values, accuracy_interval

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


def _loss(margins: Array) -> Array:
    return bradley_terry_loss(torch.tensor(margins), torch.zeros(margins.size).double()).numpy()


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
    loss = _loss(scaled)
    confidence, correct = confidence_and_correctness(scaled)
    band = calibrated_band(confidence, n_bins, "mass", True, seed=seed)
    plain_band = calibrated_band(confidence, n_bins, "width", False, seed=seed)
    return {
        "loss": float(loss.mean()),
        # of the chosen's probability against 1: at a tie 0.25, not the 0 of 'half right'
        "brier": float(brier_score(np.exp(-loss), np.ones(loss.size)).mean()),
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


def _kept(name: str, values: Sequence[Any] | None, keep: npt.NDArray[np.bool_]) -> Any:
    """Those of the pairs that are kept; None if there are none at all."""
    if values is None:
        return None
    if len(values) != keep.size:
        raise ShapeError(f"{name} has {len(values)} entries for {keep.size} pairs")
    return [value for value, good in zip(values, keep, strict=True) if good]


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
    if temperature is not None and not (np.isfinite(temperature) and temperature > 0):
        raise DataError(f"temperature is {temperature}; it must be positive and finite")
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ShapeError("give the lengths of both sides, or of neither")

    keep = np.isfinite(a) & np.isfinite(b)
    names, prompts = _kept("subsets", subsets, keep), _kept("groups", groups, keep)
    why = _kept("reasons", reasons, ~keep) or [None] * int((~keep).sum())
    infinite = (np.isinf(a) | np.isinf(b))[~keep]
    lost = Counter(
        str(reason or (NOT_FINITE if is_inf else NO_SCORE))
        for reason, is_inf in zip(why, infinite, strict=True)
    )
    if not keep.any():
        listing = ", ".join(f"{count} × {reason}" for reason, count in lost.most_common())
        raise DataError(
            f"none of the {size} pairs has a score" + (f": {listing}" if listing else ""),
            "look at the reasons: too long for the model, or not readable?",
        )

    margins = a[keep] - b[keep]
    length_gap, links = None, dict[str, Any].fromkeys(("score_length", "margin_length"))
    if chosen_lengths is not None:
        long = _array("chosen_lengths", chosen_lengths, size)[keep]
        short = _array("rejected_lengths", rejected_lengths, size)[keep]
        if not (np.isfinite(long).all() and np.isfinite(short).all()):
            raise DataError("a pair that has scores lacks a finite length")
        length_gap, lengths = long - short, np.concatenate([long, short])
        links = {
            "score_length": _correlation(np.concatenate([a[keep], b[keep]]), lengths),
            "margin_length": _correlation(margins, length_gap),
        }
    p = None
    if probability is not None:
        p = _array("probability", probability, size)[keep]
        if not ((p >= 0) & (p <= 1)).all():
            raise DataError("a probability is missing or not in [0, 1]")

    result = {
        "n_rows": size,
        "dropped": {"total": int((~keep).sum()), "reasons": dict(lost.most_common())},
        **_core(margins, length_gap, prompts, seed),
        **_probabilistic(margins, 1.0, n_bins, seed),
        "at_temperature": None,
        **links,
        "limit": None if p is None else _limit(p, margins, n_bins, seed),
        "subsets": {},
    }
    result.setdefault("longer_wins", None)
    if temperature is not None:
        calibrated = _probabilistic(margins, temperature, n_bins, seed)
        result["at_temperature"] = {"temperature": float(temperature), **calibrated}
    for name in sorted(set(map(str, names or ()))):
        mine = np.array([str(own) == name for own in names])
        gap = None if length_gap is None else length_gap[mine]
        figures = _core(margins[mine], gap, _kept("groups", prompts, mine), seed)
        figures |= {"limit_accuracy": None, "limit_loss": None}
        if p is not None:
            figures["limit_accuracy"] = float((p[mine] > 0.5).mean())
            figures["limit_loss"] = float(-np.log(np.maximum(p[mine], 1e-12)).mean())
        result["subsets"][name] = figures
    return result
