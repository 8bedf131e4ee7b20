"""Whole rankings: their likelihood with ties and gaps, and how well scores agree with them.

Ranks are numbers, 1 is best; equal ranks are ties, and a completion without a rank is masked.
Chapter 3.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from companion.errors import DataError
from companion.functional.checks import as_rankings
from companion.functional.losses import plackett_luce_loss

#: Largest group of ties, the last group apart, whose orders are summed: 2^12 states.
MAX_TIED = 12


def ranking_loss(scores: Tensor, ranks: Tensor, mask: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of a ranking that may have ties and gaps, in nats.

    Plackett–Luce (:func:`companion.functional.plackett_luce_loss`), and where completions are tied,
    the probability that they come in *some* order before those that rank below: the sum over all
    orders. So a tie says nothing of the order within it; a tie at the end costs nothing, and a
    ranking of the best m, with all others tied behind them, is the likelihood of those m choices
    (Plackett 1975; exact, where Breslow and Efron approximate). Without ties it is
    Plackett–Luce, with K = 2 Bradley–Terry. Chapter 3.

    Parameters
    ----------
    scores : Tensor
        ``[B, K]``, in any order.
    ranks : Tensor
        ``[B, K]``, integer or floating point; 1 is best.
    mask : Tensor, optional
        ``[B, K]`` booleans (or 0 and 1), true where there is a completion that has a rank.

    Returns
    -------
    Tensor
        ``[B]``. A row in which no completion beats another has loss 0.

    Raises
    ------
    ShapeError
        If the shapes differ.
    DataError
        If a rank that counts is NaN, or more than 12 completions are tied above others.
    """
    scores, ranks, valid = as_rankings(scores, ranks, mask)
    key = ranks.double().masked_fill(~valid, float("inf"))
    order = torch.sort(key, dim=1, stable=True).indices
    key, valid = key.gather(1, order), valid.gather(1, order)
    scores = scores.gather(1, order).masked_fill(~valid, 0.0)
    tied = ((key[:, 1:] == key[:, :-1]) & valid[:, 1:]).any(dim=1)
    losses = plackett_luce_loss(scores, valid)
    if not bool(tied.any()):
        return losses
    rows = [
        _tied_loss(scores[row, : int(valid[row].sum())], key[row]) if tied[row] else losses[row]
        for row in range(scores.shape[0])
    ]
    return torch.stack(rows)


def _tied_loss(scores: Tensor, key: Tensor) -> Tensor:
    """Loss of one row ``[K]``, best first."""
    _, sizes = torch.unique_consecutive(key[: scores.numel()], return_counts=True)
    total, begin = scores.sum() * 0.0, 0
    for size in sizes.tolist()[:-1]:  # what comes last comes last with certainty
        group, rest = scores[begin : begin + size], scores[begin + size :]
        total = total - _group_log_probability(group, torch.logsumexp(rest, dim=0))
        begin += size
    return total


def _group_log_probability(group: Tensor, rest: Tensor) -> Tensor:
    """log P(all of `group` are drawn, in any order, before anything whose logsumexp is `rest`).

    Dynamic programming over subsets: reach[A] sums, over the member that came last,
    reach[A without it] times its share of what was then left.
    """
    size = group.numel()
    if size > MAX_TIED:
        raise DataError(
            f"{size} completions are tied above others; all their orders are summed up to "
            f"{MAX_TIED}",
            "leave some of them out, or take the loss over pairs (--loss_type pairs)",
        )
    remains, layers = _subsets(size)
    table = torch.cat([group, rest[None]]).expand(remains.shape[0], -1)
    left = torch.logsumexp(table.masked_fill(~remains.to(group.device), float("-inf")), dim=1)
    reach = group.new_zeros(1)
    for place, before, member in layers:
        place, before, member = (x.to(group.device) for x in (place, before, member))
        reach = torch.logsumexp(reach[place] + group[member] - left[before], dim=1)
    return reach[0]


@cache
def _subsets(size: int) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Subsets of `size` members as bits, by the number of members.

    Returns what remains ``[2^size, size + 1]`` (the last column, the rest, always does), and for
    each number p of members, ``[subsets, p]`` each: the place of the subset without its last-come
    member among those of p - 1 members, that subset itself, and the member.
    """
    everything = torch.arange(1 << size)
    bits = (everything[:, None] >> torch.arange(size)) & 1
    remains = torch.cat([bits == 0, torch.ones(1 << size, 1, dtype=torch.bool)], dim=1)
    layers = []
    place_of = torch.zeros(1 << size, dtype=torch.int64)
    for count in range(1, size + 1):
        subsets = everything[bits.sum(dim=1) == count]
        member = bits[subsets].nonzero()[:, 1].reshape(-1, count)
        before = subsets[:, None] - (1 << member)
        layers.append((place_of[before], before, member))
        place_of[subsets] = torch.arange(subsets.numel())
    return remains, layers


def ordered_pairs(
    scores: Tensor, ranks: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pairs of each row that the ranks order, and how many of them the scores order alike.

    Parameters
    ----------
    scores, ranks, mask : Tensor
        As in :func:`ranking_loss`.

    Returns
    -------
    right, pairs : Tensor
        ``[B]`` each, float. Equal scores are not right (as in
        :func:`companion.functional.pairwise_accuracy`).
    """
    scores, ranks, valid = as_rankings(scores, ranks, mask)
    wins = (ranks[:, :, None] < ranks[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    right = wins & (scores[:, :, None] > scores[:, None, :])
    return right.sum(dim=(1, 2)).to(scores.dtype), wins.sum(dim=(1, 2)).to(scores.dtype)


def best_is_best(scores: Tensor, ranks: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 where the completion with the highest score has the best rank (or shares it), ``[B]``.

    The first of several highest scores counts, as in :func:`companion.functional.best_of_n`.

    Parameters
    ----------
    scores, ranks, mask : Tensor
        As in :func:`ranking_loss`; at least one completion a row.
    """
    scores, ranks, valid = as_rankings(scores, ranks, mask)
    top = scores.masked_fill(~valid, float("-inf")).argmax(dim=1, keepdim=True)
    key = ranks.double().masked_fill(~valid, float("inf"))
    return (key.gather(1, top).squeeze(1) == key.amin(dim=1)).to(scores.dtype)
