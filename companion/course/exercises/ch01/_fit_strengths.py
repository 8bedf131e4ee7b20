"""Find the bugs in a maximum-likelihood script."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, expect

Array = npt.NDArray[Any]
FORCE = (
    "Each comparison pulls with p, the probability of what was seen. It pulls with 1 − p: with p, "
    "what is learned pulls most, and the scores grow without end."
)
BUFFERED = (
    "`scores[winner] += pull` counts an item that wins several times only once: NumPy reads all "
    "places first and writes the last value. `np.add.at` adds them all."
)


def _draw(truth: list[float], n: int, seed: int, lopsided: bool = False) -> tuple[Any, ...]:
    """Comparisons of random pairs; lopsided: item 0 meets the last one most of the time."""
    rng = np.random.default_rng(seed)
    r, k = np.array(truth), len(truth)
    i = rng.integers(k, size=n)
    j = (i + rng.integers(1, k, size=n)) % k
    if lopsided:
        often = rng.random(n) < 0.6
        i, j = np.where(often, 0, i), np.where(often, k - 1, j)
    first = rng.random(n) < 1 / (1 + np.exp(r[j] - r[i]))
    return np.where(first, i, j), np.where(first, j, i), k


def _array(value: Any, size: int) -> Array:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    expect(array.shape == (size,), f"the result is no array of {size} scores")
    return array


def _shape(fit: Attempt) -> None:
    for truth in ([0.0, 0.5], [1.0, 0.0, -1.0, 0.3]):
        winner, loser, k = _draw(truth, 200, 0)
        scores = _array(fit(winner, loser, k), k)
        expect(
            np.isfinite(scores).all() and np.ptp(scores) < 20,
            f"200 comparisons of items 2 apart at most: scores {np.round(scores, 1).tolist()}",
        )


def _stationary(fit: Attempt) -> None:
    for seed, truth in enumerate(([0.0, 0.7, -0.5], [1.0, 0.0, -1.0, 0.4], [0.3, -0.3])):
        for lopsided in (False, True):
            winner, loser, k = _draw(truth, 500, seed, lopsided)
            r = _array(fit(winner, loser, k), k)
            gap = np.clip(r[loser] - r[winner], -500, 500)
            force = 1 / (1 + np.exp(-gap))
            left = np.bincount(winner, force, k) - np.bincount(loser, force, k)
            worst = int(np.abs(left).argmax())
            expect(
                abs(left[worst]) < 0.5,
                f"item {worst} of {k} won {np.sum(winner == worst)} times; with the scores "
                f"{np.round(r, 2).tolist()} the model expects "
                f"{np.sum(winner == worst) - left[worst]:.1f}",
            )


def _centred(fit: Attempt) -> None:
    winner, loser, k = _draw([1.0, 0.0, -1.0, 0.4], 400, 5)
    mean = _array(fit(winner, loser, k), k).mean()
    expect(abs(mean) < 1e-6, f"the mean of the scores is {mean:.3g}")


def _truth(fit: Attempt) -> None:
    truth = np.array([0.8, 0.1, -0.9])
    winner, loser, k = _draw(truth.tolist(), 6000, 3)
    error = np.abs(_array(fit(winner, loser, k), k) - truth).max()
    expect(error < 0.25, f"6,000 comparisons of known truth: the largest error is {error:.2f}")


def _descend(winner: Array, loser: Array, n_items: int, variant: str) -> Array:
    scores = np.zeros(n_items)
    for _ in range(600):
        p = 1 / (1 + np.exp(np.clip(scores[loser] - scores[winner], -500, 500)))
        pull = 4.0 * (p if variant == "force" else 1 - p) / len(winner)
        if variant == "buffered":
            scores[winner] += pull
            scores[loser] -= pull
        else:
            np.add.at(scores, winner, pull)
            np.add.at(scores, loser, pull if variant == "raised" else -pull)
    return scores if variant == "uncentred" else scores - scores.mean()


def broken(winner: Array, loser: Array, n_items: int) -> Array:
    scores = np.zeros(n_items)
    for _ in range(600):
        p = 1 / (1 + np.exp(np.clip(scores[loser] - scores[winner], -500, 500)))
        pull = 4.0 * p / len(winner)
        scores[winner] += pull
        scores[loser] -= pull
    return scores - scores.mean()


def wrong_force(winner: Array, loser: Array, n_items: int) -> Array:
    return _descend(winner, loser, n_items, "force")


def buffered(winner: Array, loser: Array, n_items: int) -> Array:
    return _descend(winner, loser, n_items, "buffered")


def loser_raised(winner: Array, loser: Array, n_items: int) -> Array:
    return _descend(winner, loser, n_items, "raised")


def shifted(winner: Array, loser: Array, n_items: int) -> Array:
    return _descend(winner, loser, n_items, "uncentred") + 1.0


def win_share(winner: Array, loser: Array, n_items: int) -> Array:
    won, lost = np.bincount(winner, minlength=n_items), np.bincount(loser, minlength=n_items)
    return won / (won + lost)


def share_logit(winner: Array, loser: Array, n_items: int) -> Array:
    won, lost = np.bincount(winner, minlength=n_items), np.bincount(loser, minlength=n_items)
    logit = np.log(won / lost)
    return logit - logit.mean()


def one_pass(winner: Array, loser: Array, n_items: int) -> Array:
    scores = np.zeros(n_items)
    for w, x in zip(winner, loser, strict=True):
        force = 1 / (1 + np.exp(scores[w] - scores[x]))
        scores[w] += 0.1 * force
        scores[x] -= 0.1 * force
    return scores - scores.mean()


def _probes() -> list[tuple[Any, ...]]:
    return [_draw([0.5, 0.0, -0.4], 120, 1), _draw([0.2, -0.2, 0.6, 0.0], 150, 2, lopsided=True)]


EXERCISE = Exercise(
    id="ch01.fit_strengths",
    parameters=("winner", "loser", "n_items"),
    broken=broken,
    properties=(
        Property(
            "one score for each item, none running away",
            "The scores should be finite, one for each item, and not run away.",
            _shape,
        ),
        Property(
            "each item wins as often as the model expects",
            "At the maximum of the likelihood the gradient is 0: for each item, the wins that were "
            "seen equal those that the model expects. Here they do not.",
            _stationary,
        ),
        Property(
            "the scores have mean 0",
            "The likelihood says nothing of a common shift; the scores are to be returned with "
            "mean 0, so that two runs can be compared.",
            _centred,
        ),
        Property(
            "the truth, from many comparisons",
            "With 6,000 comparisons of known strengths the estimate should be close to the truth.",
            _truth,
        ),
    ),
    mutants=(
        Mutant(BUFFERED, buffered, also=(broken,)),
        Mutant(FORCE, wrong_force),
        Mutant(
            "The loser is raised along with the winner. The two forces are opposite: their sum is "
            "0, and the mean of the scores never moves.",
            loser_raised,
        ),
        Mutant(
            "The differences are right; only the common shift, which the data leave open, is not "
            "taken out. Subtract the mean.",
            shifted,
        ),
        Mutant(
            "The share of comparisons won is no Bradley–Terry score: it is not a logit, and it "
            "forgets *whom* an item has met.",
            win_share,
        ),
        Mutant(
            "The logit of an item's share of wins is right only if it met every other item equally "
            "often. An item that mostly met the weakest looks strong.",
            share_logit,
        ),
        Mutant(
            "One pass with a constant step is Elo's rule: the result depends on the order of the "
            "comparisons and keeps trembling. Maximum likelihood goes on until the gradient is 0.",
            one_pass,
        ),
    ),
    probes=_probes,
    hints=(
        "There are two bugs: one in the force of a comparison, one in how forces are added up. Try "
        "two items and five comparisons by hand.",
        "What is the gradient of log σ(Δ)? And what does `x = np.zeros(2); x[[0, 0]] += 1` give?",
        "The pull is `1 - p`; add it with `np.add.at(scores, winner, pull)`, and the negative for "
        "the loser.",
    ),
    right="That the expected wins equal the wins that were seen is the whole of maximum likelihood "
    "here: a check for any implementation, at any size.",
)
