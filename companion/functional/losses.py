"""Losses of reward models, one value per item.

No function here takes a mean: which mean is right depends on what the batch is a part of (ranks,
accumulation, a last short batch), and that is the trainer's business (Chapter 8). All take float32
or float64 tensors on any device; half precision is upcast to float32. Shapes must agree exactly.

Non-finite scores are not hidden: a NaN or an infinity in a place that counts comes out as NaN or
infinity. In a masked place it has no effect, neither on the value nor on the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.errors import DataError, DtypeError, ShapeError
from companion.functional.checks import (
    as_float,
    as_lists,
    as_pair,
    as_rankings,
    has_dims,
    same_shape,
)

#: the label of a position that no loss looks at, as in PyTorch and transformers
IGNORE_INDEX = -100


def bradley_terry_probability(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Probability that `chosen` beats `rejected`: ``sigmoid(chosen - rejected)``.

    With strengths ``p = exp(r)`` it is ``p_c / (p_c + p_r)`` (Bradley and Terry 1952). Chapter 1.

    Parameters
    ----------
    chosen, rejected : Tensor
        Scores, any shape, the same for both.

    Returns
    -------
    Tensor
        Probabilities of the same shape.

    Raises
    ------
    ShapeError
        If the shapes differ.
    DtypeError
        If a tensor is not of floating point.
    """
    chosen, rejected = as_pair(chosen, rejected)
    return torch.sigmoid(chosen - rejected)


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of the preference, in nats.

    ``-log sigmoid(z) = softplus(-z)`` with ``z = chosen - rejected - margin``. It is computed as
    ``max(-z, 0) + log1p(exp(-|z|))``, which neither over- nor underflows. (``F.softplus`` becomes
    linear above 20, where it is 2e-9 off; that shows in float64.) Chapter 1.

    Parameters
    ----------
    chosen, rejected : Tensor
        Scores ``[B]`` (any shape, the same for both).
    margin : Tensor or float, optional
        What `chosen` has to be ahead by (Llama 2, arXiv 2307.09288, eq. 2), of the same shape or
        one number. Trained with a margin, ``sigmoid(chosen - rejected)`` is no calibrated
        probability: fit a temperature afterwards.
    label_smoothing : float, default 0
        Probability, in [0, 0.5), with which a label is taken to be flipped. The smoothed loss is
        ``(1 - s) * softplus(-z) + s * softplus(z)``.

    Returns
    -------
    Tensor
        The loss of each pair, of the same shape.

    Raises
    ------
    ShapeError
        If the shapes differ.
    DtypeError
        If a tensor is not of floating point.
    DataError
        If `label_smoothing` is outside [0, 0.5).
    """
    chosen, rejected = as_pair(chosen, rejected)
    if not 0.0 <= label_smoothing < 0.5:
        raise DataError(
            f"label_smoothing is {label_smoothing}; it must lie in [0, 0.5)",
            "at 0.5 the labels say nothing, beyond it they say the opposite",
        )
    logits = chosen - rejected
    if isinstance(margin, Tensor):
        # Ratings come as integers, so an integer margin is welcome; a wrong shape is not.
        if not margin.is_floating_point():
            margin = margin.to(logits.dtype)
        margin = as_float("margin", margin)
        same_shape(chosen=chosen, margin=margin)
    if margin is not None:
        logits = logits - margin
    loss = -F.logsigmoid(logits)
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logits)
    return loss


def centering_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Squared sum of a pair's scores, ``(chosen + rejected)**2``, without its coefficient.

    Bradley–Terry sees differences only, so a model's scores may drift; this ties them to zero
    (Eisenstein et al. 2023, arXiv 2312.09244; TRL's ``center_rewards_coefficient``). It makes the
    global shift unique, not the whole minimiser. Chapter 4.

    Parameters
    ----------
    chosen, rejected : Tensor
        Scores ``[B]`` (any shape, the same for both).

    Returns
    -------
    Tensor
        The penalty of each pair, of the same shape.

    Raises
    ------
    ShapeError, DtypeError
        As in :func:`bradley_terry_loss`.
    """
    chosen, rejected = as_pair(chosen, rejected)
    return (chosen + rejected).square()


def best_global_shift(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the one number that, added to all scores, makes the mean penalty least.

    ``-mean(chosen + rejected) / 2``, a 0-d tensor. Chapter 4.

    Parameters
    ----------
    chosen, rejected : Tensor
        Scores ``[B]`` (any shape, the same for both), at least one pair.

    Raises
    ------
    ShapeError
        If the shapes differ or there is no pair.
    """
    chosen, rejected = as_pair(chosen, rejected)
    if chosen.numel() == 0:
        raise ShapeError("there is no pair to centre")
    return -(chosen + rejected).mean() / 2


def plackett_luce_loss(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of a whole ranking, in nats.

    The best is drawn from all by a softmax, the next from those that remain, and so on (Plackett
    1975, Luce 1959; used for K-wise reward models by Zhu et al. 2023, arXiv 2301.11270, Starling).
    With K = 2 it is Bradley–Terry. Chapter 1.

    Parameters
    ----------
    scores : Tensor
        ``[B, K]``, the best completion first.
    mask : Tensor, optional
        ``[B, K]`` booleans (or 0 and 1), true where there is a completion. A row with fewer than
        two of them says nothing; its loss is 0.

    Returns
    -------
    Tensor
        ``[B]``, the loss of each ranking. It grows with K: divide by the number of choices made
        (K - 1) if long rankings shall not weigh more.

    Raises
    ------
    ShapeError
        If `scores` is not ``[B, K]`` or the mask's shape differs.

    Notes
    -----
    Time and memory grow as B·K², which is nothing at the K of preference data (4 to 16).
    """
    scores, valid = as_lists(scores, mask)
    scores = scores.masked_fill(~valid, 0.0)  # a NaN in the padding must not reach the gradient
    size = scores.shape[1]
    position = torch.arange(size, device=scores.device)
    later = position[None, :] > position[:, None]
    # Each place stays in its own denominator, so that no row of the logsumexp is empty (NaN
    # gradient); what a masked place contributes is removed below.
    remaining = (later & valid[:, None, :]) | torch.eye(
        size, dtype=torch.bool, device=scores.device
    )
    table = scores[:, None, :].expand(-1, size, -1).masked_fill(~remaining, float("-inf"))
    terms = torch.logsumexp(table, dim=-1) - scores
    return terms.masked_fill(~valid, 0.0).sum(dim=-1)


def grouped_pair_loss(scores: Tensor, ranks: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean Bradley–Terry loss over the pairs of each prompt's completions.

    InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, eq. 1) puts all K(K-1)/2 comparisons of a
    prompt into one batch, each weighted 1/C(K, 2), so that a prompt counts once however many
    completions it has. Here the weight is one over the number of pairs that there are: tied ranks
    make no pair. Chapter 1.

    Parameters
    ----------
    scores : Tensor
        ``[B, K]``, in any order.
    ranks : Tensor
        ``[B, K]``, integer or floating point; 1 is best, a lower rank beats a higher one.
    mask : Tensor, optional
        ``[B, K]`` booleans (or 0 and 1), true where there is a completion.

    Returns
    -------
    Tensor
        ``[B]``. A row without any pair (fewer than two completions, or all tied) has loss 0.

    Raises
    ------
    ShapeError
        If the shapes differ.
    DataError
        If a rank that counts is NaN; the message names the row.
    """
    scores, ranks, valid = as_rankings(scores, ranks, mask)
    scores = scores.masked_fill(~valid, 0.0)
    wins = ranks[:, :, None] < ranks[:, None, :]
    wins = wins & valid[:, :, None] & valid[:, None, :]
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :])
    count = wins.sum(dim=(1, 2))
    # `where`, not a product: inf * 0 is NaN for a pair that does not count
    total = torch.where(wins, losses, 0.0).sum(dim=(1, 2))
    return total / count.clamp(min=1)


def outcome_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each token's 'is this right?', in nats.

    The outcome reward model of Cobbe et al. 2021 (arXiv 2110.14168): the outcome stands at every
    completion token, prompt and padding are masked. Chapter 3.

    Parameters
    ----------
    logits : Tensor
        ``[B, T]``.
    labels : Tensor
        ``[B, T]``, integer or floating point: 0, 1, or a probability between them; -100 where no
        loss is taken (:func:`companion.functional.outcome_labels` builds them).

    Returns
    -------
    Tensor
        ``[B, T]``, 0 where the label is -100.

    Raises
    ------
    ShapeError
        If the shapes differ.
    DataError
        If a label is neither -100 nor in [0, 1].
    """
    logits = as_float("logits", logits)
    has_dims("logits", logits, 2, "[B, T]")
    same_shape(logits=logits, labels=labels)
    counted = labels != IGNORE_INDEX
    target = labels.to(logits.dtype).masked_fill(~counted, 0.0)
    if not bool(((target >= 0) & (target <= 1)).all()):
        raise DataError(
            "outcome labels must be 0, 1, a probability between, or -100 (no loss)",
            "build them with companion.functional.outcome_labels",
        )
    safe = logits.masked_fill(~counted, 0.0)
    loss = F.binary_cross_entropy_with_logits(safe, target, reduction="none")
    return loss.masked_fill(~counted, 0.0)


def process_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Three-class cross-entropy at the step boundaries, in nats.

    The process reward model of Lightman et al. 2023 (arXiv 2305.20050): each step is bad, neutral
    or good. Chapter 3.

    Parameters
    ----------
    logits : Tensor
        ``[B, T, 3]``; the classes are 0 (bad, -1), 1 (neutral, 0), 2 (good, +1).
    labels : Tensor
        ``[B, T]`` integers: a class, or -100 where no loss is taken
        (:func:`companion.functional.step_labels` builds them).

    Returns
    -------
    Tensor
        ``[B, T]``, 0 where the label is -100.

    Raises
    ------
    ShapeError
        If the shapes do not fit. With one class the cross-entropy is exactly 0 and nothing is
        learned, so anything but three is refused.
    DataError
        If a label is neither a class nor -100, such as a raw -1.
    """
    logits = as_float("logits", logits)
    if logits.dim() != 3 or logits.shape[-1] != 3:
        raise ShapeError(
            f"logits must be [B, T, 3], not of shape {list(logits.shape)}",
            "a process reward model has three classes: set num_labels=3",
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DtypeError(f"labels must be integers, not {labels.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ShapeError(
            f"labels must be {list(logits.shape[:-1])} for these logits, not {list(labels.shape)}"
        )
    counted = labels != IGNORE_INDEX
    if not bool((~counted | ((labels >= 0) & (labels <= 2))).all()):
        raise DataError(
            "step classes must be 0 (bad), 1 (neutral), 2 (good), or -100 (no loss)",
            "turn -1, 0, +1 into classes with companion.functional.step_labels",
        )
    safe = logits.masked_fill(~counted[..., None], 0.0)
    return F.cross_entropy(
        safe.transpose(1, 2), labels.long(), reduction="none", ignore_index=IGNORE_INDEX
    )
