"""Rankings with ties and gaps: against sums over all orders, Bradley–Terry and Plackett–Luce."""

from __future__ import annotations

import itertools

import pytest
import torch

from companion.errors import DataError
from companion.functional import (
    best_is_best,
    bradley_terry_loss,
    grouped_pair_loss,
    ordered_pairs,
    plackett_luce_loss,
    ranking_loss,
)


def by_enumeration(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Sum over all total orders that agree with the ranks."""
    orders = [
        order
        for order in itertools.permutations(range(len(ranks)))
        if all(ranks[a] <= ranks[b] for a, b in itertools.pairwise(order))
    ]
    logs = [-plackett_luce_loss(scores[list(order)][None])[0] for order in orders]
    return -torch.logsumexp(torch.stack(logs), dim=0)


@pytest.mark.parametrize(
    "ranks", [[1, 2, 3, 4], [2, 1, 1, 3], [1, 1, 1, 2], [1, 2, 2, 2], [3, 1, 3, 1], [1, 1, 1, 1]]
)
def test_ties_are_the_sum_over_all_orders(ranks: list[int]) -> None:
    scores = torch.randn(4, dtype=torch.float64, requires_grad=True)
    expected = by_enumeration(scores, torch.tensor(ranks))
    found = ranking_loss(scores[None], torch.tensor([ranks]))[0]
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    if len(set(ranks)) > 1:
        gradients = [
            torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (found, expected)
        ]
        torch.testing.assert_close(*gradients)


def test_special_cases_and_padding() -> None:
    scores = torch.randn(3, 5)
    nan = float("nan")
    ranks = torch.tensor([[2, 1, nan, nan, nan], [1, 2, 3, 4, 5], [2, 2, 1, nan, nan]])
    mask = ~ranks.isnan()
    noisy = scores.masked_fill(~mask, nan).requires_grad_()
    losses = ranking_loss(noisy, ranks, mask)
    assert losses[0].item() == pytest.approx(float(bradley_terry_loss(scores[0, 1], scores[0, 0])))
    assert losses[1].item() == pytest.approx(float(plackett_luce_loss(scores[1:2])))
    # the best of three, the others tied behind it: a softmax
    softmax = -torch.log_softmax(scores[2, :3], dim=0)[2]
    assert losses[2].item() == pytest.approx(float(softmax))
    losses.sum().backward()
    assert bool(torch.isfinite(noisy.grad).all())
    assert bool((noisy.grad[~mask] == 0).all())
    torch.testing.assert_close(ranking_loss(scores + 3, ranks, mask), losses.detach())


def test_large_scores_stay_finite() -> None:
    scores = torch.tensor([[1000.0, -1000.0, 0.0, 500.0]])
    assert float(ranking_loss(scores, torch.tensor([[1, 3, 2, 1]]))) == pytest.approx(0.0)
    assert float(ranking_loss(scores, torch.tensor([[2, 1, 1, 2]]))) > 1000


def test_pairs_and_best() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    ranks = torch.tensor([[1, 2, 3], [2, 1, 1]])
    right, pairs = ordered_pairs(scores, ranks)
    assert right.tolist() == [2, 0]
    assert pairs.tolist() == [3, 2]
    assert best_is_best(scores, ranks).tolist() == [1, 0]
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert ordered_pairs(scores, ranks, mask)[1].tolist() == [1, 0]
    assert best_is_best(scores, ranks, mask).tolist() == [1, 1]
    # a pair's loss is one number in both forms
    two = torch.tensor([[0.3, -0.4]])
    order = torch.tensor([[2, 1]])
    torch.testing.assert_close(ranking_loss(two, order), grouped_pair_loss(two, order))


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match="row 1 hold NaN"):
        ranking_loss(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]))
    ranks = torch.tensor([[1.0] * 13 + [2.0]])
    with pytest.raises(DataError, match="13 completions are tied"):
        ranking_loss(torch.zeros(1, 14), ranks)
