"""One choice from several voices: the votes of many completions, the scores of many models.

Chapters 3 (majority vote) and 5 (ensembles).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

from torch import Tensor

from companion._tensors import as_float
from companion.errors import DataError, ShapeError


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
