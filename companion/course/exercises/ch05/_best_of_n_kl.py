"""Derive the KL divergence of best-of-n sampling."""

from __future__ import annotations

import itertools
import math

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, number


def _integral(n: int) -> float:
    """∫ f log f over the quantile u of the score, with f = n uⁿ⁻¹, by Gauss–Legendre panels."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    edges = 1.0 - np.geomspace(1.0, 1e-14, 200)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        u = (high - low) / 2 * nodes + (high + low) / 2
        log_f = math.log(n) + (n - 1) * np.log(u)
        total += float((weights * np.exp(log_f) * log_f).sum() * (high - low) / 2)
    return total


def _one(kl: Attempt) -> None:
    close(number(kl(1), "the divergence"), 0.0, "n = 1, which is plain sampling", atol=1e-9)


def _values(kl: Attempt) -> None:
    for n in (2, 3, 4, 16, 100, 1024):
        close(number(kl(n), "the divergence"), _integral(n),
              f"n = {n}, against a numerical integral", rtol=1e-4)  # fmt: skip


def _grows(kl: Attempt) -> None:
    got = [number(kl(n), "the divergence") for n in range(1, 65)]
    for n, (a, b) in enumerate(itertools.pairwise(got), start=1):
        expect(b > a, f"n = {n + 1} gives {b:.4f}, n = {n} gives {a:.4f}: it should grow")


def _huge(kl: Attempt) -> None:
    n = 10**9
    close(number(kl(n), "the divergence"), math.log(n) - 1, "n = 10⁹, where it is ln n − 1",
          rtol=1e-6)  # fmt: skip


def log_n(n: int) -> float:
    return math.log(n)


def bits(n: int) -> float:
    return (math.log(n) - (n - 1) / n) / math.log(2)


def reversed_kl(n: int) -> float:
    return n - 1 - math.log(n)


def log_n_minus_one(n: int) -> float:
    return math.log(n) - 1


def one_over_n(n: int) -> float:
    return math.log(n) - 1 / n


def negative(n: int) -> float:
    return (n - 1) / n - math.log(n)


def second_term(n: int) -> float:
    return (n - 1) / n


def by_sum(n: int) -> float:
    return math.log(n) - sum(1 / k for k in range(2, min(n, 10**6) + 1))


EXERCISE = Exercise(
    id="ch05.best_of_n_kl",
    parameters=("n",),
    properties=(
        Property(
            "0 for n = 1",
            "The best of one is the one: the distribution has not moved, so the divergence is 0.",
            _one,
        ),
        Property(
            "the integral of f log f",
            "In terms of the score's quantile u the best of n has the density n·uⁿ⁻¹, and one "
            "sample the density 1. The divergence is the mean of log(n·uⁿ⁻¹) under the first.",
            _values,
        ),
        Property(
            "it grows with n",
            "The best of more lies further away: the divergence grows with n.",
            _grows,
        ),
        Property(
            "right for n = 10⁹ too",
            "For large n it is ln n − 1, and no number on the way may overflow or vanish.",
            _huge,
        ),
    ),
    mutants=(
        Mutant(
            "ln n is the density's logarithm at the very best quantile, u = 1, so it is an upper "
            "bound. The mean over u takes (n − 1)/n off.",
            log_n,
        ),
        Mutant(
            "This is in bits. Losses and KL budgets here are in nats: the natural logarithm.",
            bits,
        ),
        Mutant(
            "This is the divergence in the other direction, KL(policy ‖ best-of-n): the mean is "
            "taken under the policy. It explodes with n, since the policy has much where "
            "best-of-n has nearly nothing.",
            reversed_kl,
        ),
        Mutant(
            "ln n − 1 is what is left for large n. For n = 1 it is −1, and no divergence is "
            "negative.",
            log_n_minus_one,
        ),
        Mutant(
            "The mean of ln u under n·uⁿ⁻¹ is −1/n, but it enters n − 1 times.",
            one_over_n,
        ),
        Mutant(
            "The sign is turned round: a divergence is never negative.",
            negative,
        ),
        Mutant(
            "The constant ln n is lost, and what is left is the size of the second term alone.",
            second_term,
        ),
        Mutant(
            "This takes 1/2 + 1/3 + … off, as if the n samples were removed one by one. The "
            "density n·uⁿ⁻¹ has all of them in it already.",
            by_sum,
        ),
    ),
    probes=lambda: [(1,), (2,), (7,), (100,)],
    hints=(
        "What matters of a score is its quantile u, uniform between 0 and 1 for one sample. What "
        "is the density of the largest of n?",
        "P(all n below u) = uⁿ, so the density is n·uⁿ⁻¹. Its logarithm is ln n + (n − 1)·ln u.",
        "The mean of ln u under n·uⁿ⁻¹ is ∫ n·uⁿ⁻¹ ln u du = −1/n.",
    ),
    right="ln n − (n − 1)/n nats: best of 16 is about 1.8 nats away, best of 1,024 about 5.9. With "
    "ties it is an upper bound. The companion's `best_of_n_kl` is this line.",
)
