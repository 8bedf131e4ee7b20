"""Write the accuracy of an epoch: ties, and a short last batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, normal, number

Batches = list[tuple[Tensor, Tensor]]
MEANS = (
    "The accuracies of the batches are averaged. A short last batch then weighs as much as a full "
    "one: sum the right pairs, and divide once by all pairs."
)
TIE = (
    "A tie is counted as a win. A model that gives every text one score would reach 100%: a pair "
    "is right only if chosen is *strictly* above rejected."
)


def _batches(seed: int, sizes: list[int]) -> Batches:
    out = []
    for number_, size in enumerate(sizes):
        c = normal(seed + 17 * number_, size).round()  # rounded: with ties
        r = normal(seed + 17 * number_ + 1, size).round() - 0.5 * (number_ % 2)
        out.append((c, r))
    return out


def _want(batches: Batches) -> float:
    wins = sum(a > b for c, r in batches for a, b in zip(c.tolist(), r.tolist(), strict=True))
    return wins / sum(len(c) for c, _ in batches)


def _five() -> Batches:
    chosen = torch.tensor([1.0, 0.5, -0.2, 2.0, 0.0])
    rejected = torch.tensor([0.0, 0.7, 0.3, 1.0, 0.0])
    return [(chosen, rejected)]


def _ties(accuracy: Attempt) -> None:
    close(number(accuracy(_five())), 0.4, "five pairs: two right, two wrong, one tie")
    same = torch.zeros(8)
    close(number(accuracy([(same, same)])), 0.0, "eight ties")


def _one(accuracy: Attempt) -> None:
    for seed in range(3):
        batches = _batches(seed, [40])
        close(number(accuracy(batches)), _want(batches), "one batch, against a loop")


def _split(accuracy: Attempt) -> None:
    [(c, r)] = _batches(5, [13])
    whole = _want([(c, r)])
    for size in (1, 4, 5, 12, 13):
        parts = list(zip(c.split(size), r.split(size), strict=True))
        close(number(accuracy(parts)), whole, f"13 pairs in batches of {size}")
    c, r = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])
    parts = list(zip(c.split(4), r.split(4), strict=True))
    close(number(accuracy(parts)), 0.6, "five pairs in batches of 4: two of four, and one of one")


def _empty(accuracy: Attempt) -> None:
    batches = _batches(2, [6])
    got = number(accuracy([*batches, (torch.zeros(0), torch.zeros(0))]))
    close(got, _want(batches), "an empty batch at the end")


def _plain(accuracy: Attempt) -> None:
    got = accuracy(_batches(1, [4, 3]))
    expect(isinstance(got, float), f"the result is a {type(got).__name__}; a float was asked for")


def tie_wins(batches: Batches) -> float:
    right = sum(int((c >= r).sum()) for c, r in batches)
    return right / sum(len(c) for c, _ in batches)


def tie_half(batches: Batches) -> float:
    right = sum(float((c > r).sum() + 0.5 * (c == r).sum()) for c, r in batches)
    return right / sum(len(c) for c, _ in batches)


def mean_of_means(batches: Batches) -> float:
    return float(torch.stack([(c > r).float().mean() for c, r in batches]).mean())


def mean_of_means_with_ties(batches: Batches) -> float:
    return float(torch.stack([(c >= r).float().mean() for c, r in batches]).mean())


def full_batches(batches: Batches) -> float:
    size = len(batches[0][0])
    kept = [(c, r) for c, r in batches if len(c) == size]
    return sum(int((c > r).sum()) for c, r in kept) / (size * len(kept))


def first_size(batches: Batches) -> float:
    right = sum(int((c > r).sum()) for c, r in batches)
    return right / (len(batches[0][0]) * len(batches))


def last_batch(batches: Batches) -> float:
    c, r = batches[-1]
    return float((c > r).float().mean())


def mean_probability(batches: Batches) -> float:
    p = torch.cat([torch.sigmoid(c - r) for c, r in batches])
    return float(p.mean())


def mean_margin(batches: Batches) -> float:
    return float(torch.cat([c - r for c, r in batches]).mean())


def as_percent(batches: Batches) -> float:
    right = sum(int((c > r).sum()) for c, r in batches)
    return 100.0 * right / sum(len(c) for c, _ in batches)


def per_batch(batches: Batches) -> list[float]:
    return [float((c > r).float().mean()) for c, r in batches]


def as_tensor(batches: Batches) -> Tensor:
    right = torch.stack([(c > r).sum() for c, r in batches]).sum()
    return right / sum(len(c) for c, _ in batches)


def _probes() -> list[tuple[Any, ...]]:
    return [(_five(),), (_batches(0, [8, 8, 3]),), (_batches(3, [5, 2]),)]


EXERCISE = Exercise(
    id="ch04.epoch_accuracy",
    parameters=("batches",),
    properties=(
        Property(
            "a tie is not a win",
            "A pair is right only if chosen is *strictly* above rejected.",
            _ties,
        ),
        Property(
            "one batch: the share of pairs with chosen above rejected",
            "Accuracy is the share of pairs whose chosen score is above the rejected one.",
            _one,
        ),
        Property(
            "the same however the pairs are cut into batches",
            "The accuracy should not depend on how the pairs are cut into batches.",
            _split,
        ),
        Property(
            "an empty batch changes nothing",
            "A batch without pairs should change nothing.",
            _empty,
        ),
        Property("a plain float", "The result should be one Python float, from 0 to 1.", _plain),
    ),
    mutants=(
        Mutant(TIE, tie_wins),
        Mutant(
            "A tie is counted as half a win. That is a fair rule too (a coin would do as well), "
            "but not the one asked for, nor TRL's: figures must be compared under one rule.",
            tie_half,
        ),
        Mutant(MEANS, mean_of_means, "trl #7010"),
        Mutant(
            "Two mistakes at once: ties are counted as wins, and the batches' means are averaged, "
            "whatever their sizes.",
            mean_of_means_with_ties,
            "trl #7010",
        ),
        Mutant(
            "The short last batch is left out, so some pairs are never counted. In a small "
            "held-out set that is a good part of it.",
            full_batches,
        ),
        Mutant(
            "The number of pairs is taken to be batches × the first batch's size. The last batch "
            "may be shorter: count the pairs.",
            first_size,
        ),
        Mutant("Only the last batch is reported; the epoch has more of them.", last_batch),
        Mutant(
            "This is the mean probability of the labels, not the share of right pairs: it moves "
            "with the scale of the scores, which accuracy does not.",
            mean_probability,
        ),
        Mutant(
            "This is the mean margin. It is worth logging beside the accuracy, but one huge margin "
            "can carry it.",
            mean_margin,
        ),
        Mutant("The result is in percent; a share from 0 to 1 was asked for.", as_percent),
        Mutant("There is one figure for each batch; one for the epoch was asked for.", per_batch),
        Mutant(
            "The value is right, but it is a tensor, which no JSON log takes. Return a float.",
            as_tensor,
        ),
    ),
    probes=_probes,
    hints=(
        "Which two numbers of each batch can be added up over batches without losing anything?",
        "Count right pairs (`c > r`, strictly) and all pairs; divide once, at the end.",
        "`sum(int((c > r).sum()) for c, r in batches) / sum(len(c) for c, _ in batches)`.",
    ),
    right="Sums and counts also add up over processes. `companion.functional.SumCount` is this "
    "function with a class around it.",
)
