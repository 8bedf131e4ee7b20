"""Choosing by score or by vote, and the figures that go with it: accuracy, margin, best-of-N.

Chapters 3 (majority vote), 4 (accuracy and margin) and 5 (best-of-N, whitening, ensembles). A NaN
score marks an item that could not be scored; it never wins, and it is never counted as right or
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from companion.errors import DataError, ShapeError
from companion.functional.checks import as_float, as_pair, same_shape
from companion.functional.resampling import Array, bootstrap_interval


def margin(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return ``chosen - rejected`` for each pair. Chapter 4.

    Raises
    ------
    ShapeError, DtypeError
        If the shapes differ or a tensor is not of floating point.
    """
    chosen, rejected = as_pair(chosen, rejected)
    return chosen - rejected


def pairwise_accuracy(
    chosen: Tensor, rejected: Tensor, *, ties: Literal["wrong", "half"] = "wrong"
) -> Tensor:
    """1 for each pair that is ordered right, 0 for each that is not. Chapter 4.

    Parameters
    ----------
    chosen, rejected : Tensor
        Scores ``[B]`` (any shape, the same for both).
    ties : {"wrong", "half"}
        What a tie is worth: 0 (TRL's rule: strictly greater) or 0.5 (a coin's).

    Returns
    -------
    Tensor
        Of the same shape; NaN where a score is NaN (a comparison with NaN is false, which would
        pass for a wrong answer).

    Raises
    ------
    ShapeError, DtypeError
        If the shapes differ or a tensor is not of floating point.
    DataError
        If `ties` is unknown.
    """
    chosen, rejected = as_pair(chosen, rejected)
    if ties not in ("wrong", "half"):
        raise DataError(f"ties={ties!r} is unknown", "there are 'wrong' and 'half'")
    result = (chosen > rejected).to(torch.promote_types(chosen.dtype, rejected.dtype))
    if ties == "half":
        result = result + 0.5 * (chosen == rejected)
    return result.masked_fill(chosen.isnan() | rejected.isnan(), float("nan"))


def _candidates(scores: Tensor) -> Tensor:
    scores = as_float("scores", scores)
    if scores.dim() == 0 or scores.shape[-1] == 0:
        raise ShapeError(f"scores must be [..., N] with N >= 1, not {list(scores.shape)}")
    return scores


def best_of_n(scores: Tensor) -> Tensor:
    """Index of the best of N completions; the first one if several are best. Chapter 5.

    Parameters
    ----------
    scores : Tensor
        ``[..., N]``. NaN never wins (``torch.argmax`` would let it win always).

    Returns
    -------
    Tensor
        ``[...]`` int64.

    Raises
    ------
    DataError
        If all N scores of an item are NaN.
    """
    if bool(_candidates(scores).isnan().all(dim=-1).any()):
        raise DataError("a prompt has no completion with a score: all are NaN")
    return top_k(scores, 1).squeeze(-1)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k best, best first; equal scores keep their order. Chapter 5.

    Parameters
    ----------
    scores : Tensor
        ``[..., N]``; NaN comes last.
    k : int
        From 1 to N.

    Returns
    -------
    Tensor
        ``[..., k]`` int64.

    Raises
    ------
    ShapeError
        If k is not within 1 and N.
    """
    scores = _candidates(scores)
    if not 1 <= k <= scores.shape[-1]:
        raise ShapeError(f"k is {k}; it must lie within 1 and {scores.shape[-1]}")
    by_score = torch.sort(
        scores.masked_fill(scores.isnan(), float("-inf")), dim=-1, descending=True, stable=True
    ).indices
    # a second stable sort puts NaN behind a true -inf
    behind = scores.isnan().gather(-1, by_score).int()
    order = torch.sort(behind, dim=-1, stable=True).indices
    return by_score.gather(-1, order)[..., :k]


def best_of_n_kl(n: int) -> float:
    """KL divergence of best-of-N sampling from its policy, in nats: ``ln n - (n - 1) / n``.

    Exact for a continuous score, else an upper bound (Beirami et al. 2024, arXiv 2401.01879).
    Chapter 5.

    Raises
    ------
    DataError
        If n is below 1.
    """
    if n < 1:
        raise DataError(f"best-of-N with N = {n}: N must be at least 1")
    return math.log(n) - (n - 1) / n


def measured_best_of_n_kl(scores: Tensor, n: int) -> Tensor:
    """KL divergence of best-of-n from its policy, measured on M samples of each prompt, in nats.

    Best-of-n with ties to the first drawn multiplies the probability of every completion of one
    score by the same factor: with q the policy's probability of that score and F that of it or a
    lower one, by (Fⁿ − (F − q)ⁿ)/q. So the divergence is that between two distributions of the
    *score*, and no log-probability of a text is needed. q and F are the samples' shares.

    It converges to the truth as M grows with n fixed, and never exceeds :func:`best_of_n_kl`. If
    no scores tie and M = n it falls short of that by 0.04 (0.06 for n = 2): then the closed form is
    the better figure, and this one tells how much ties take off. Chapter 5.

    Parameters
    ----------
    scores : Tensor
        ``[..., M]``, of independent samples of the policy.
    n : int
        At least 1; above M the shares say little.

    Returns
    -------
    Tensor
        ``[...]`` float64.

    Raises
    ------
    DataError
        If n is below 1 or a score is NaN.
    """
    scores = _candidates(scores)
    if n < 1:
        raise DataError(f"best-of-N with N = {n}: N must be at least 1")
    if bool(scores.isnan().any()):
        raise DataError("a score is NaN", "drop completions that could not be scored")
    size = scores.shape[-1]
    up_to = (scores[..., None, :] <= scores[..., :, None]).sum(-1).double() / size
    below = (scores[..., None, :] < scores[..., :, None]).sum(-1).double() / size
    ratio = (up_to**n - below**n) / (up_to - below)
    # each sample stands for 1/M of the policy; 0·log 0 is 0
    return torch.special.xlogy(ratio, ratio).mean(dim=-1)


def expected_best_of_n(scores: Tensor, n: int, values: Tensor | None = None) -> Tensor:
    """Unbiased estimate of best-of-n from M >= n samples of each prompt.

    Mean over all ways to draw n of the M without replacement, in closed form (Nakano et al. 2021,
    arXiv 2112.09332, appendix). All n up to M come from one set of samples. Chapter 5.

    Parameters
    ----------
    scores : Tensor
        ``[..., M]``, what the choice is made by.
    n : int
        From 1 to M.
    values : Tensor, optional
        ``[..., M]``, what is counted of the chosen one, such as a gold reward; `scores` if absent.

    Returns
    -------
    Tensor
        ``[...]`` float64.

    Raises
    ------
    ShapeError
        If n is not within 1 and M, or the shapes differ.
    DataError
        If a score is NaN.
    """
    scores = _candidates(scores)
    values = scores if values is None else as_float("values", values)
    same_shape(scores=scores, values=values)
    size = scores.shape[-1]
    if not 1 <= n <= size:
        raise ShapeError(f"n is {n}; it must lie within 1 and the {size} samples")
    if bool(scores.isnan().any()):
        raise DataError("a score is NaN", "drop completions that could not be scored")
    order = torch.sort(scores, dim=-1, stable=True).indices
    # The i-th smallest is the best of those n-subsets whose n - 1 others lie below it.
    weights = torch.tensor(
        [math.comb(i, n - 1) / math.comb(size, n) for i in range(size)],
        dtype=torch.float64,
        device=scores.device,
    )
    return (values.double().gather(-1, order) * weights).sum(dim=-1)


@dataclass(frozen=True)
class BestOfNCurve:
    """Best-of-n over n, as :func:`best_of_n_curve` makes it; arrays are ``[K]``. Chapter 5."""

    n: np.ndarray  #: int64
    kl: Array  #: bound on the divergence from the policy in nats (:func:`best_of_n_kl`)
    mean: Array  #: over prompts, of what the chosen completion is worth
    low: Array  #: end of its interval
    high: Array
    per_prompt: Array  #: ``[P, K]``, what the mean is of: compare curves by its differences


def best_of_n_curve(
    scores: Tensor,
    ns: Sequence[int],
    values: Tensor | None = None,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> BestOfNCurve:
    """Unbiased best-of-n for many n from one pool of samples, with intervals over prompts.

    Drawn against ``kl``, with a proxy as `scores` and once the proxy, once the gold reward as
    `values`, it is the figure of Gao, Schulman and Hilton (2023, arXiv 2210.10760). Chapter 5.

    Parameters
    ----------
    scores : Tensor
        ``[P, M]``, M samples of each of P prompts; what the choice is made by.
    ns : sequence of int
        Each from 1 to M.
    values : Tensor, optional
        ``[P, M]``, what is counted of the chosen one; `scores` if absent.
    level, n_resamples, seed
        Of :func:`companion.functional.bootstrap_interval`; it draws whole prompts, since the
        samples of one prompt succeed or fail together.

    Raises
    ------
    ShapeError
        If the scores are not ``[P, M]``, an n is not within 1 and M, or the shapes differ.
    DataError
        If a score is NaN.
    """
    scores = _candidates(scores)
    if scores.dim() != 2:
        raise ShapeError(f"scores must be [prompts, samples], not {list(scores.shape)}")
    columns = [expected_best_of_n(scores, n, values).cpu().numpy() for n in ns]
    per_prompt = np.stack(columns, axis=1) if columns else np.empty((len(scores), 0))
    intervals = [
        bootstrap_interval(column, level=level, n_resamples=n_resamples, seed=seed)
        for column in columns
    ]
    return BestOfNCurve(
        n=np.array(ns, dtype=np.int64),
        kl=np.array([best_of_n_kl(n) for n in ns]),
        mean=per_prompt.mean(axis=0),
        low=np.array([interval.low for interval in intervals]),
        high=np.array([interval.high for interval in intervals]),
        per_prompt=per_prompt,
    )


def whiten(
    scores: Tensor,
    dim: int = -1,
    *,
    eps: float | None = None,
    shift_mean: bool = True,
    correction: int = 0,
) -> Tensor:
    """Scores with mean 0 and standard deviation 1 along `dim`; zeros where all are equal.

    Chapter 5. (TRL's GRPO divides by the sample standard deviation + 1e-4 itself: whitening a
    reward before it changes nothing under group scaling.)

    Parameters
    ----------
    scores : Tensor
        Any shape with at least one axis.
    eps : float, optional
        Scores count as equal if their standard deviation is at most `eps` times the largest
        magnitude: then it is rounding noise, which a division would blow up to size 1. By default
        twice the machine epsilon.
    shift_mean : bool, default True
        If false the mean is put back afterwards, so that only the scale changes.
    correction : int, default 0
        0 for the population's standard deviation, 1 for the sample's.

    Returns
    -------
    Tensor
        Of the same shape.

    Raises
    ------
    ShapeError
        If the axis is empty.
    """
    scores = as_float("scores", scores)
    if scores.dim() == 0 or scores.shape[dim] == 0:
        raise ShapeError(f"there is nothing to whiten along axis {dim} of {list(scores.shape)}")
    tolerance = 2 * torch.finfo(scores.dtype).eps if eps is None else eps
    mean = scores.mean(dim=dim, keepdim=True)
    centred = scores - mean
    freedom = scores.shape[dim] - correction
    variance = centred.square().sum(dim=dim, keepdim=True) / max(freedom, 1)
    with torch.no_grad():
        scale = scores.abs().amax(dim=dim, keepdim=True)
        equal = scores.amax(dim=dim, keepdim=True) == scores.amin(dim=dim, keepdim=True)
        equal = equal | (variance.sqrt() <= tolerance * scale)
    # The root of 0 has an infinite gradient, so the guard stands before the root.
    deviation = variance.masked_fill(equal, 1.0).sqrt()
    white = torch.where(equal, torch.zeros_like(centred), centred / deviation)
    return white if shift_mean else white + mean


def majority_vote(
    answers: Sequence[Hashable | None], weights: Sequence[float] | None = None
) -> int | None:
    """Index of the first completion with the most frequent answer (self-consistency).

    Wang et al. 2022, arXiv 2203.11171; with weights, such as rewards, as in Li et al. 2022, arXiv
    2206.02336. Chapter 3.

    Parameters
    ----------
    answers : sequence
        ``[N]`` what each completion says; None for one that gives no answer, which has no vote.
    weights : sequence of float, optional
        ``[N]``, 0 or more; 1 each if absent.

    Returns
    -------
    int or None
        None if nobody votes. Of answers with equally many votes the one that came first wins.

    Raises
    ------
    ShapeError
        If the lengths differ.
    DataError
        If a weight is negative or NaN.
    """
    if weights is None:
        weights = [1.0] * len(answers)
    if len(weights) != len(answers):
        raise ShapeError(f"{len(answers)} answers, {len(weights)} weights")
    if not all(weight >= 0 for weight in weights):
        raise DataError("a weight is negative or NaN", "use weights of 0 or more")
    votes: dict[Hashable, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weight
    return list(answers).index(max(votes, key=votes.__getitem__)) if votes else None


def ensemble_scores(
    scores: Tensor, how: Literal["mean", "worst", "uncertainty"] = "mean", *, weight: float = 1.0
) -> Tensor:
    """One score from those of several reward models, to be optimised in place of a single one.

    The three ways are those of Coste et al. (2024, arXiv 2310.02743). Chapter 5.

    Parameters
    ----------
    scores : Tensor
        ``[K, ...]`` of K models *on one scale*, such as z scores of one reference set: raw scores
        of two reward models differ by a shift at least.
    how : {"mean", "worst", "uncertainty"}
        The mean; the smallest; or the mean minus `weight` times the variance over the models.
    weight : float, default 1.0
        Only for "uncertainty".

    Returns
    -------
    Tensor
        ``[...]``; NaN where one of the models has NaN.

    Raises
    ------
    ShapeError
        If there is no model.
    DataError
        If `how` is unknown.
    """
    scores = as_float("scores", scores)
    if scores.dim() == 0 or scores.shape[0] == 0:
        raise ShapeError(f"scores must be [K, ...] with K >= 1, not {list(scores.shape)}")
    if how == "mean":
        return scores.mean(dim=0)
    if how == "worst":
        return scores.amin(dim=0)
    if how == "uncertainty":
        return scores.mean(dim=0) - weight * scores.var(dim=0, correction=0)
    raise DataError(f"how={how!r} is unknown", "there are 'mean', 'worst' and 'uncertainty'")
