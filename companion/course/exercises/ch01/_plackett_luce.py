"""Write the loss of a whole ranking, with padding."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, normal, tensor


def _full(size: int, k: int) -> Tensor:
    return torch.ones(size, k, dtype=torch.bool)


def _by_hand(scores: list[float]) -> float:
    total = 0.0
    for place in range(len(scores) - 1):
        rest = scores[place:]
        top = max(rest)
        total += top + math.log(sum(math.exp(x - top) for x in rest)) - scores[place]
    return total


def _shape(loss: Attempt) -> None:
    for size, k in ((1, 2), (4, 5), (3, 1)):
        got = loss(normal(0, size, k), _full(size, k))
        tensor(got, (size,), f"the loss of {size} rankings of {k}")


def _two(loss: Attempt) -> None:
    scores = normal(1, 8, 2)
    want = -F.logsigmoid(scores[:, 0] - scores[:, 1])
    close(loss(scores, _full(8, 2)), want, "K = 2 against Bradley–Terry")


def _values(loss: Attempt) -> None:
    for seed in range(2):
        for k in (3, 5):
            scores = normal(seed, 6, k, dtype=torch.float64)
            want = [_by_hand(row) for row in scores.tolist()]
            close(loss(scores, _full(6, k)), want, f"random rankings of {k}, against a loop")


def _sums_to_one(loss: Attempt) -> None:
    scores = normal(7, 4, dtype=torch.float64)
    table = torch.stack([scores[list(order)] for order in permutations(range(4))])
    total = torch.exp(-tensor(loss(table, _full(24, 4)))).sum()
    close(total, 1.0, "the probabilities of all 24 orders of four, summed")


def _masked(loss: Attempt) -> None:
    short = normal(2, 5, 3)
    want = loss(short, _full(5, 3))
    for junk in (0.0, 50.0, -50.0, float("nan")):
        wide = torch.cat([short, torch.full((5, 2), junk)], dim=1)
        mask = torch.cat([_full(5, 3), torch.zeros(5, 2, dtype=torch.bool)], dim=1)
        close(loss(wide, mask), want, f"rankings of 3 padded to 5 with {junk}, against unpadded")


def _gradient(loss: Attempt) -> None:
    scores = torch.cat([normal(3, 4, 3), torch.zeros(4, 2)], dim=1).requires_grad_(True)
    mask = torch.cat([_full(4, 3), torch.zeros(4, 2, dtype=torch.bool)], dim=1)
    (slope,) = torch.autograd.grad(tensor(loss(scores, mask)).sum(), scores)
    expect(bool(slope.isfinite().all()), "the gradient of a padded ranking holds NaN")
    close(slope[:, 3:], torch.zeros(4, 2), "the gradient of the padding")
    close(slope.sum(dim=1), torch.zeros(4), "the sum of a ranking's gradient", atol=1e-5)


def _stable(loss: Attempt) -> None:
    scores = torch.tensor([[1000.0, 0.0, -1000.0], [-1000.0, 0.0, 1000.0]])
    close(loss(scores, _full(2, 3)), [0.0, 3000.0], "scores of ±1000")


def _remaining(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    low = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 4)
    return low, low.flip(1).logcumsumexp(1).flip(1)


def all_pairs(scores: Tensor, mask: Tensor) -> Tensor:
    safe = scores.masked_fill(~mask, 0.0)
    losses = -F.logsigmoid(safe[:, :, None] - safe[:, None, :])
    counts = (mask[:, :, None] & mask[:, None, :]).triu(1)
    return (losses * counts).sum((1, 2))


def one_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    low = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 4)
    terms = torch.logsumexp(low, dim=1, keepdim=True) - low
    return terms.masked_fill(~mask, 0.0).sum(1)


def best_only(scores: Tensor, mask: Tensor) -> Tensor:
    low, rest = _remaining(scores, mask)
    return rest[:, 0] - low[:, 0]


def worst_first(scores: Tensor, mask: Tensor) -> Tensor:
    low = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 4)
    return (low.logcumsumexp(1) - low).masked_fill(~mask, 0.0).sum(1)


def no_mask(scores: Tensor, mask: Tensor) -> Tensor:
    return (scores.flip(1).logcumsumexp(1).flip(1) - scores).sum(1)


def times_mask(scores: Tensor, mask: Tensor) -> Tensor:
    safe = torch.where(mask, scores, 0.0)
    return ((safe.flip(1).logcumsumexp(1).flip(1) - safe) * mask).sum(1)


def averaged(scores: Tensor, mask: Tensor) -> Tensor:
    low, rest = _remaining(scores, mask)
    terms = (rest - low).masked_fill(~mask, 0.0)
    return terms.sum(1) / mask.sum(1)


def additive(scores: Tensor, mask: Tensor) -> Tensor:
    low = scores - 1e9 * (~mask)
    return ((low.flip(1).logcumsumexp(1).flip(1) - low) * mask).sum(1)


def plain_exp(scores: Tensor, mask: Tensor) -> Tensor:
    powers = torch.where(mask, scores, 0.0).exp() * mask
    rest = powers.flip(1).cumsum(1).flip(1)
    ratio = torch.where(mask, rest / powers, torch.ones_like(rest))
    return torch.log(ratio).sum(1)


def one_number(scores: Tensor, mask: Tensor) -> Tensor:
    low, rest = _remaining(scores, mask)
    return (rest - low).masked_fill(~mask, 0.0).sum(1).mean()


def _probes() -> list[tuple[Any, ...]]:
    mask = _full(4, 5)
    mask[1, 3:] = mask[2, 4:] = False
    extreme = torch.tensor([[1000.0, 0.0, -1000.0]])
    junk = normal(0, 4, 5).masked_fill(~mask, float("nan"))
    return [
        (normal(0, 4, 5), mask),
        (junk, mask),
        (extreme, _full(1, 3)),
        (normal(1, 3, 4), _full(3, 4)),
    ]


def _look(loss: Attempt, arguments: tuple[Any, ...]) -> Any:
    scores, mask = arguments
    scores = scores.clone().requires_grad_(True)
    result = loss(scores, mask)
    if not result.requires_grad:
        return result, "no gradient"
    return result, torch.autograd.grad(result.sum(), scores)[0].nan_to_num(1e9)


EXERCISE = Exercise(
    id="ch01.plackett_luce",
    parameters=("scores", "mask"),
    properties=(
        Property(
            "one loss for each ranking",
            "The result should be one value for each row, the sum over its choices.",
            _shape,
        ),
        Property(
            "with two completions it is Bradley–Terry",
            "At K = 2 there is one choice, between two: that is −log σ(first − second).",
            _two,
        ),
        Property(
            "a softmax over those that remain, at each place",
            "At each place the best of the *remaining* completions is chosen: the denominator "
            "runs over this place and all later ones.",
            _values,
        ),
        Property(
            "the probabilities of all orders add up to one",
            "The probabilities of all orders of a ranking, e^(−loss), should add up to one.",
            _sums_to_one,
        ),
        Property(
            "what stands in masked places does not matter, NaN included",
            "Masked places should be no candidates in any denominator, and no choices either.",
            _masked,
        ),
        Property(
            "the gradient is finite, and 0 at masked places",
            "The gradient should be finite, and 0 at masked places: what stands there is to be "
            "replaced *before* it is computed with.",
            _gradient,
        ),
        Property(
            "finite at scores of ±1000",
            "The loss should be finite for scores of ±1000, so no power may overflow.",
            _stable,
        ),
    ),
    mutants=(
        Mutant(
            "This takes the ranking apart into its K(K − 1)/2 pairs, as if they were independent. "
            "That is InstructGPT's loss before its weights, not Plackett–Luce: the order of four "
            "is three choices, not six.",
            all_pairs,
        ),
        Mutant(
            "Every place is drawn from *all* completions. Who has been placed is no candidate any "
            "more: the denominator of place k starts at k.",
            one_softmax,
        ),
        Mutant(
            "Only the first choice is counted: this is the loss of 'best of K'. The others follow, "
            "each among those that remain.",
            best_only,
        ),
        Mutant(
            "The denominators run over the completions that have been placed already: a "
            "cumulative sum in the wrong direction. Flip, cumulate, flip back.",
            worst_first,
        ),
        Mutant(
            "The mask is not used, so padding competes as if it were a completion.",
            no_mask,
        ),
        Mutant(
            "Masked scores are set to 0, but e^0 = 1: they stay candidates in every denominator. A "
            "place that is no candidate has a score of −∞, or as good as that.",
            times_mask,
        ),
        Mutant(
            "The mean over the places is taken. The likelihood of a ranking is the product of its "
            "choices, so its loss is their sum; dividing is a decision of the trainer.",
            averaged,
        ),
        Mutant(
            "The mask is added to the scores (minus a large number), so what stands in the padding "
            "stays in the computation: NaN plus anything is NaN. Replace masked scores "
            "(`masked_fill`).",
            additive,
        ),
        Mutant(
            "The mean over the rankings is taken inside of the loss. Return one value for each; "
            "the trainer knows which mean is right.",
            one_number,
        ),
        Mutant(
            "The powers are computed as they stand: e^1000 is infinite and e^−1000 is 0. Work with "
            "logarithms throughout.",
            plain_exp,
            "DeepSpeedExamples #423",
        ),
    ),
    probes=_probes,
    look=_look,
    hints=(
        "Write it for one ranking with a loop over the places first. What is the softmax over at "
        "place k?",
        "For all places at once: `scores.flip(1).logcumsumexp(1).flip(1)` holds log Σ e^r over "
        "each place and all later ones.",
        "Fill masked places with `torch.finfo(scores.dtype).min / 4`, subtract the scores from the "
        "cumulated ones, set masked terms to 0 by `masked_fill`, sum each row.",
    ),
    right="The last place costs nothing, since there is one candidate: K completions are K − 1 "
    "choices. The companion's `plackett_luce_loss` does the same.",
)
