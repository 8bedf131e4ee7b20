"""Derive the KL divergence of best-of-n among a few texts, where draws repeat."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, number


def _texts(seed: int, size: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.dirichlet(np.ones(size)), dtype=torch.float64)


def _kept(p: Tensor, n: int) -> Tensor:
    """Probability of each text under best-of-n, by all ways to draw n."""
    q = torch.zeros_like(p)
    for drawn in itertools.product(range(len(p)), repeat=n):
        q[max(drawn)] += p[list(drawn)].prod()
    return q


def _want(p: Tensor, n: int) -> float:
    q = _kept(p, n)
    return float((q * (q / p).log())[p > 0].sum())


def _one(kl: Attempt) -> None:
    for p in (_texts(0, 4), torch.tensor([1.0])):
        got = number(kl(p, 1), "the divergence")
        close(got, 0.0, f"n = 1, which is plain sampling, of {len(p)} texts", atol=1e-6)
    got = number(kl(torch.tensor([1.0]), 5), "the divergence")
    close(got, 0.0, "a policy that always says the same, n = 5", atol=1e-6)


def _values(kl: Attempt) -> None:
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    close(
        number(kl(half, 2), "the divergence"),
        _want(half, 2),
        "two texts with probability one half each, n = 2",
    )
    for seed, size, n in ((1, 3, 2), (2, 4, 3), (3, 2, 6)):
        p = _texts(seed, size)
        told = f"texts with the probabilities {[round(x, 3) for x in p.tolist()]}, n = {n}"
        close(number(kl(p, n), "the divergence"), _want(p, n), f"{told}, against all ways to draw")


def _grows(kl: Attempt) -> None:
    p = _texts(4, 5)
    got = [number(kl(p, n), "the divergence") for n in range(1, 20)]
    for n, (a, b) in enumerate(itertools.pairwise(got), start=1):
        expect(b > a, f"n = {n + 1} gives {b:.4f}, n = {n} gives {a:.4f}: it should grow")
    bound = [math.log(n) - (n - 1) / n for n in range(1, 20)]
    for n, (a, b) in enumerate(zip(got, bound, strict=True), start=1):
        expect(a <= b + 1e-6, f"n = {n}: {a:.4f} lies above the bound ln n − (n − 1)/n = {b:.4f}")


def _limits(kl: Attempt) -> None:
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    got = number(kl(p, 10**6), "the divergence")
    close(got, -math.log(0.1), "n = 10⁶: always the best text, ln 1/0.1")
    fine = torch.full((2000,), 1 / 2000, dtype=torch.float64)
    close(number(kl(fine, 4), "the divergence"), math.log(4) - 3 / 4,
          "2,000 texts, n = 4, where it is nearly ln n − (n − 1)/n", atol=1e-3)  # fmt: skip


def _zero(kl: Attempt) -> None:
    for p in ([0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.25, 0.75, 0.0]):
        t = torch.tensor(p, dtype=torch.float64)
        got = number(kl(t, 3), "the divergence")
        close(got, _want(t, 3), f"the probabilities {p}: some text is never said", atol=1e-6)


def _share(p: Tensor, n: int) -> Tensor:
    above = p.cumsum(0).clamp(max=1.0) ** n
    return torch.diff(above, prepend=torch.zeros(1, dtype=p.dtype))


def _divergence(q: Tensor, p: Tensor) -> float:
    seen = (q > 0) & (p > 0)
    return float((q[seen] * (q[seen] / p[seen]).log()).sum())


def formula(probabilities: Tensor, n: int) -> float:
    return math.log(n) - (n - 1) / n


def reversed_kl(probabilities: Tensor, n: int) -> float:
    return _divergence(probabilities, _share(probabilities, n))


def worst_of_n(probabilities: Tensor, n: int) -> float:
    return _divergence(_share(probabilities.flip(0), n), probabilities.flip(0))


def bits(probabilities: Tensor, n: int) -> float:
    return _divergence(_share(probabilities, n), probabilities) / math.log(2)


def density(probabilities: Tensor, n: int) -> float:
    q = n * probabilities * probabilities.cumsum(0) ** (n - 1)
    return _divergence(q, probabilities)


def density_normalised(probabilities: Tensor, n: int) -> float:
    q = n * probabilities * probabilities.cumsum(0) ** (n - 1)
    return _divergence(q / q.sum(), probabilities)


def power(probabilities: Tensor, n: int) -> float:
    q = probabilities**n
    return _divergence(q / q.sum(), probabilities)


def at_least_once(probabilities: Tensor, n: int) -> float:
    q = 1 - (1 - probabilities) ** n
    return _divergence(q / q.sum(), probabilities)


def negative(probabilities: Tensor, n: int) -> float:
    return -_divergence(_share(probabilities, n), probabilities)


def unweighted(probabilities: Tensor, n: int) -> float:
    q = _share(probabilities, n)
    return float((q / probabilities).log().mean())


def nan_at_zero(probabilities: Tensor, n: int) -> float:
    q = _share(probabilities, n)
    return float((q * (q / probabilities).log()).sum())


def as_tensor(probabilities: Tensor, n: int) -> Tensor:
    q = _share(probabilities, n)
    return torch.where(q > 0, q * (q / probabilities).log(), 0.0)


def _probes() -> list[tuple[Any, ...]]:
    return [
        (_texts(0, 4), 1),
        (_texts(1, 3), 2),
        (_texts(2, 5), 7),
        (torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64), 3),
    ]


EXERCISE = Exercise(
    id="ch05.best_of_few_kl",
    parameters=("probabilities", "n"),
    properties=(
        Property(
            "0 where nothing can be chosen",
            "The best of one is the one, and one text is one text: the distribution has not moved, "
            "so the divergence is 0.",
            _one,
        ),
        Property(
            "what all ways to draw give",
            "Best-of-n keeps text k if none of the n draws lies above it and at least one hits it. "
            "With those probabilities q, the divergence is Σ q ln(q / p).",
            _values,
        ),
        Property(
            "it grows with n, and stays below ln n − (n − 1)/n",
            "The best of more lies further away, and with texts that repeat it goes less far than "
            "without.",
            _grows,
        ),
        Property(
            "right for large n, and for many texts",
            "For large n the best text is always kept, which is ln(1/p) of it away; with many "
            "small texts the chapter's formula is the limit.",
            _limits,
        ),
        Property(
            "a text that is never said counts for nothing",
            "A text of probability 0 is never kept either, and 0·ln 0 counts for 0.",
            _zero,
        ),
    ),
    mutants=(
        Mutant(
            "This is the chapter's formula for scores that never tie. Here draws repeat: two "
            "copies of the best text are no better than one, so best-of-n goes less far.",
            formula,
        ),
        Mutant(
            "This is the divergence in the other direction, KL(policy ‖ best-of-n): the mean is "
            "taken under the policy.",
            reversed_kl,
        ),
        Mutant(
            "This is worst-of-n: the texts are sorted from the worst to the best, and the *last* "
            "one wins.",
            worst_of_n,
        ),
        Mutant(
            "This is in bits. Losses and KL budgets here are in nats: the natural logarithm.",
            bits,
        ),
        Mutant(
            "The density n·uⁿ⁻¹ is taken at each text's quantile, times p. That is right for "
            "infinitely many texts; with few, q is the *difference* of the two powers Fⁿ.",
            density,
            also=(density_normalised,),
        ),
        Mutant(
            "pⁿ is the probability that all n draws are this text. It is kept as well if the "
            "others are worse.",
            power,
        ),
        Mutant(
            "1 − (1 − p)ⁿ is the probability that the text is drawn at all. It is kept only if "
            "none of the draws is better.",
            at_least_once,
        ),
        Mutant("The sign is turned round: a divergence is never negative.", negative),
        Mutant(
            "The mean of ln(q/p) is taken over the texts, all alike. It is a mean under q: what "
            "best-of-n never keeps does not count.",
            unweighted,
        ),
        Mutant(
            "A text of probability 0 gives 0·ln(0/0), which is NaN in floating point. Leave out "
            "what is never kept.",
            nan_at_zero,
        ),
        Mutant(
            "There is one term for each text. The divergence is their sum.",
            as_tensor,
        ),
    ),
    probes=_probes,
    hints=(
        "With which probability do *all* n draws lie at text k or below it?",
        "With F = `probabilities.cumsum(0)` that is Fⁿ. Text k is kept with the probability "
        "q_k = F_kⁿ − F_{k−1}ⁿ.",
        "`q = torch.diff(probabilities.cumsum(0) ** n, prepend=torch.zeros(1))`, then the sum of "
        "q·ln(q / p) over the texts with q > 0.",
    ),
    right="For large n it stops at ln(1/p) of the best text: a policy that says few things cannot "
    "be moved far by choosing. The chapter's ln n − (n − 1)/n is the bound, reached without ties.",
)
