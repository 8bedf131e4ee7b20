"""Agreement of annotators: Krippendorff's own example, sums by hand, and simulated annotators."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from companion.errors import DataError, DtypeError, ShapeError
from companion.functional import (
    accuracy_ceiling,
    annotator_agreement,
    bootstrap_interval,
    item_agreement,
    krippendorff_alpha,
)


def test_alpha_is_krippendorffs_own_example():
    """Four observers, twelve units, five values, gaps: nominal α = 0.743 (Krippendorff 2011, C)."""
    table = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
        [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
    ]
    assert krippendorff_alpha(np.array(table).T - 1) == pytest.approx(0.743, abs=5e-4)


def slow_alpha(codes):
    """By pairs of verdicts, one at a time."""
    units = [[c for c in row if c >= 0] for row in codes]
    units = [unit for unit in units if len(unit) > 1]
    values = [c for unit in units for c in unit]
    observed = sum(
        2 * sum(x != y for x, y in combinations(unit, 2)) / (len(unit) - 1) for unit in units
    ) / len(values)
    every = list(combinations(values, 2))
    return 1 - observed / (sum(x != y for x, y in every) / len(every))


@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_what_its_definition_says(seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 3, (40, 4))
    assert krippendorff_alpha(codes) == pytest.approx(slow_alpha(codes), abs=1e-12)
    renamed = np.array([2, 0, 1, -1])[codes]
    assert krippendorff_alpha(renamed[:, ::-1]) == pytest.approx(slow_alpha(codes), abs=1e-12)


def test_agreement_of_an_item_by_hand():
    codes = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 2], [0, -1, 0], [1, -1, -1]])
    shares = item_agreement(codes)
    assert shares[:4] == pytest.approx([1, 1 / 3, 0, 1])
    assert np.isnan(shares[4])


def test_alpha_has_no_value_where_chance_explains_all():
    assert np.isnan(krippendorff_alpha(np.zeros((5, 2), dtype=int)))
    assert np.isnan(krippendorff_alpha(np.array([[0, -1], [-1, 1]])))
    figures = annotator_agreement(np.zeros((5, 2), dtype=int))
    assert (figures["agreement"], figures["alpha"], figures["ceiling"]) == (1.0, None, 1.0)
    assert figures["agreement_interval"] is None
    assert annotator_agreement(np.full((3, 2), -1))["ceiling"] is None
    quarrel = annotator_agreement(np.array([[0, 1], [1, 0], [0, 0]]))
    assert (quarrel["ceiling"], quarrel["ceiling_unequal"]) == (0.5, 0.5)


def annotators(quality, n, m, seed):
    """Codes of annotators who say the better side with `quality` (of each pair), else the other."""
    rng = np.random.default_rng(seed)
    better = rng.integers(0, 2, n)
    right = rng.random((n, m)) < np.broadcast_to(quality, n)[:, None]
    return better, np.where(right, better[:, None], 1 - better[:, None])


@pytest.mark.parametrize("q", [0.6, 0.75, 0.9])
def test_the_ceiling_is_what_a_model_that_knows_reaches(q):
    better, codes = annotators(q, 20_000, 2, seed=1)
    reached = (codes[:, 0] == better).mean()
    assert accuracy_ceiling(item_agreement(codes).mean()) == pytest.approx(reached, abs=0.012)
    low, high = annotator_agreement(codes[:1000])["ceiling_interval"]
    assert low < q < high


def test_pairs_of_unequal_difficulty_lie_between_agreement_and_the_formula():
    rng = np.random.default_rng(2)
    for quality in (rng.uniform(0.5, 1, 40_000), rng.choice([0.5, 1.0], 40_000)):
        better, codes = annotators(quality, 40_000, 2, seed=3)
        reached = (codes[:, 0] == better).mean()
        agreement = item_agreement(codes).mean()
        assert agreement - 0.01 < reached < accuracy_ceiling(agreement) + 0.01
    # half clear, half coins: agreement itself is the ceiling, and the formula well above it
    assert reached == pytest.approx(agreement, abs=0.01)
    assert accuracy_ceiling(agreement) > reached + 0.05


def test_the_interval_of_alpha_is_that_of_the_general_bootstrap():
    """And as wide as α of fresh annotators varies."""
    _, codes = annotators(0.8, 120, 3, seed=6)
    prompts = np.repeat(np.arange(40), 3)
    found = annotator_agreement(codes, prompts)["alpha_interval"]
    wanted = bootstrap_interval(codes, prompts, statistic=krippendorff_alpha, n_resamples=1000)
    assert found == pytest.approx(wanted, abs=0.03)
    fresh = [krippendorff_alpha(annotators(0.8, 120, 3, seed=s)[1]) for s in range(100, 300)]
    assert found[1] - found[0] == pytest.approx(3.92 * np.std(fresh), rel=0.3)


@pytest.mark.parametrize(
    "wrong",
    [lambda a: a, lambda a: a**0.5, lambda a: (1 + a) / 2, lambda a: max(a, 1 - a)],
    ids=["agreement", "root", "half way", "majority of two"],
)
def test_formulas_that_come_to_mind_are_off(wrong):
    q = 0.8
    assert accuracy_ceiling(q**2 + (1 - q) ** 2) == pytest.approx(q)
    assert abs(wrong(q**2 + (1 - q) ** 2) - q) > 0.02


def test_ties_count_as_a_verdict_but_not_against_the_ceiling():
    codes = np.array([[0, 0], [1, 1], [0, 2], [2, 2], [0, 1], [1, 1]])
    figures = annotator_agreement(codes)
    assert (figures["n"], figures["agreement"]) == (6, pytest.approx(4 / 6))
    assert (figures["n_decided"], figures["agreement_decided"]) == (4, 0.75)
    assert figures["ceiling"] == pytest.approx((1 + 0.5**0.5) / 2)


def test_pairs_of_one_prompt_are_drawn_together():
    _, codes = annotators(0.8, 100, 2, seed=4)
    alone = annotator_agreement(codes)["agreement_interval"]
    thrice = annotator_agreement(np.repeat(codes, 3, axis=0), np.repeat(np.arange(100), 3))
    assert thrice["agreement_interval"] == pytest.approx(alone)


def test_what_cannot_be_read_is_refused():
    assert accuracy_ceiling(0.4) == 0.5
    for value in (1.2, -0.1, float("nan")):
        with pytest.raises(DataError, match="agreement is"):
            accuracy_ceiling(value)
    with pytest.raises(ShapeError):
        item_agreement(np.zeros(3, dtype=int))
    with pytest.raises(DtypeError):
        krippendorff_alpha(np.zeros((3, 2)))
    with pytest.raises(DataError):
        krippendorff_alpha(np.full((3, 2), -2))
    with pytest.raises(ShapeError, match="groups"):
        annotator_agreement(np.zeros((3, 2), dtype=int), ["p"])
