"""Betting: by hand, against other packages, against all starts, and what must not be done."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from companion.errors import DataError, ShapeError
from companion.functional.betting import (
    BET_SHARES,
    TUNED,
    bets_of,
    by_group,
    evidence_above,
    likely_start,
    log_growth,
    mean_lower_limit,
    mix,
    mix_starts,
    start_prior,
)
from companion.functional.calibration import fit_temperature, inverse_temperature_limits


def test_two_looks_and_one_bet_by_hand() -> None:
    """A null of 3/4, a bet of 0.8: a wrong pair multiplies by 1.6, a right one by 0.8."""
    null, bet = 0.75, 0.8
    looks = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])  # whether the model was right
    growth = log_growth(null - looks, [bet])
    first, second = 0.8 * 1.6 * 0.8, 1.6 * 1.6 * 0.8
    assert np.exp(growth).ravel() == pytest.approx([1.024, 2.048])
    assert [first, second] == pytest.approx([1.024, 2.048])
    # a half begins at look 1, a sixth at look 2; what waits is a half, then a third
    assert start_prior(2).tolist() == [1 / 2, 1 / 6]
    wealth = np.exp(mix_starts(growth)).ravel()
    assert wealth[0] == pytest.approx(1.024 / 2 + 1 / 2)
    assert wealth[1] == pytest.approx(1.024 * 2.048 / 2 + 2.048 / 6 + 1 / 3)
    assert np.exp(mix(np.log([[2.0, 4.0]]))) == pytest.approx([3.0])
    assert np.exp(mix(np.log([2.0, 4.0]), [0.75, 0.25])) == pytest.approx(2.5)


def test_the_largest_bet_of_an_accuracy_cannot_lose_all() -> None:
    null = 0.8
    bets = bets_of(1 - null)
    assert (bets * (1 - null)).tolist() == pytest.approx(list(BET_SHARES))
    assert np.isfinite(log_growth(null - np.ones(1000), bets)).all()
    with pytest.raises(DataError, match="loses everything"):
        log_growth(null - np.ones(2), [1 / (1 - null)])
    with pytest.raises(DataError, match="worst"):
        bets_of(0.0)
    with pytest.raises(DataError, match="weights"):
        mix(np.zeros(2), [0.5, 0.6])


@pytest.mark.parametrize("looks", [1, 2, 7])
def test_mixed_starts_are_the_sum_over_all_starts(looks: int) -> None:
    growth = np.random.default_rng(looks).normal(0, 1, (looks, 3))
    found = mix_starts(growth)
    for look in range(1, looks + 1):
        total = np.full(3, 1 / (look + 1))  # waits
        for start in range(1, look + 1):
            total += np.exp(growth[start - 1 : look].sum(axis=0)) / (start * (start + 1))
        assert np.exp(found[look - 1]) == pytest.approx(total)
    assert start_prior(looks).sum() == pytest.approx(1 - 1 / (looks + 1))


def test_the_likely_start_is_the_best_of_all_starts() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        growth = rng.normal(0, 1, (9, 2))
        each = [
            np.exp(growth[k:].sum(axis=0)).mean() / ((k + 1) * (k + 2)) for k in range(len(growth))
        ]
        assert likely_start(growth) == int(np.argmax(each))
    change = np.concatenate([np.full(30, -0.5), np.full(10, 2.0)])
    assert likely_start(change) == 30


def test_pairs_of_a_prompt_are_one_bet() -> None:
    means = by_group([1.0, 0.0, 1.0, 1.0, 0.5], ["b", "a", "b", "c", "a"])
    assert means.tolist() == [1.0, 0.25, 1.0]
    several = by_group([[1.0, 0.0, 3.0], [2.0, 4.0, 0.0]], ["b", "a", "b"])
    assert several.tolist() == [[2.0, 0.0], [1.0, 4.0]]
    for values, groups in (([1.0], ["a", "b"]), ([], [])):
        with pytest.raises(ShapeError):
            by_group(values, groups)
    with pytest.raises(DataError, match="NaN"):
        by_group([float("nan")], ["a"])


# --- e-values, and what is none ---------------------------------------------------------------


def mean_and_error(e: np.ndarray) -> tuple[float, float]:
    return float(e.mean()), float(e.std() / np.sqrt(e.size))


def nulls(seed: int, runs: int = 20_000, n: int = 12) -> np.ndarray:
    """Whether a model that is right in 3 of 4 cases is right, ``[runs, n]``."""
    print("seed", seed)
    return (np.random.default_rng(seed).random((runs, n)) < 0.75).astype(float)


def test_under_the_null_an_e_value_is_1_in_the_mean() -> None:
    growth = log_growth(0.75 - nulls(1), bets_of(0.25)[:5])
    for bet in range(growth.shape[-1]):
        mean, error = mean_and_error(np.exp(growth[:, bet]))
        assert abs(mean - 1) < 4 * error + 1e-9
    # several looks, starts and bets mixed: still
    looks = log_growth(0.75 - nulls(2).reshape(-1, 4, 3), bets_of(0.25)[:5]).swapaxes(0, 1)
    mean, error = mean_and_error(np.exp(mix(mix_starts(looks)))[-1])
    assert abs(mean - 1) < 4 * error
    # of a model that is better than the null it is less
    mean, error = mean_and_error(np.exp(mix(mix_starts(looks - 0.05)))[-1])
    assert mean < 1 - 4 * error


def test_bets_that_have_seen_the_outcome_are_found_out() -> None:
    """The best bet in hindsight is no bet: its wealth is above 1 in the mean."""
    each = log_growth(0.75 - nulls(3), bets_of(0.25)[:5])
    mean, error = mean_and_error(np.exp(each.max(axis=-1)))
    assert mean > 1 + 10 * error


def test_starts_that_are_not_weighted_are_found_out() -> None:
    looks = log_growth(0.75 - nulls(4).reshape(-1, 4, 3), bets_of(0.25)[:3]).swapaxes(0, 1)
    since = np.cumsum(looks[::-1], axis=0)
    mean, error = mean_and_error(np.exp(since).sum(axis=0).mean(axis=-1))
    assert mean > 2 + 10 * error  # of four starts: 4
    mean, error = mean_and_error(np.exp(since).max(axis=0).mean(axis=-1))  # nor the best of them
    assert mean > 1 + 10 * error


def test_pairs_of_a_prompt_counted_one_by_one_are_found_out() -> None:
    """Five pairs that are all right or all wrong: bets on each are no e-value, on the prompt are.

    (How often 1 / alpha is reached, for the mean of the wrong ones has no bound.)
    """
    prompts = nulls(5, runs=4000, n=60)
    alone = log_growth(0.75 - np.repeat(prompts, 5, axis=1), bets_of(0.25))
    whole = log_growth(0.75 - prompts, bets_of(0.25))
    over = [float((mix(growth) >= np.log(20)).mean()) for growth in (alone, whole)]
    print("reached 20:", over)
    assert over[0] > 0.06
    assert over[1] <= 0.05


# --- ville -------------------------------------------------------------------------------------


def test_a_fixed_bet_is_that_of_another_package() -> None:
    """``ville.BettingTest`` cuts bets at ``c / (1 - m0)``; with an alpha near 0, all of 60."""
    ville = pytest.importorskip("ville", reason="the oracle; comes with the extra `test`")
    for seed, null in itertools.product(range(3), (0.6, 0.75, 0.85)):
        rng = np.random.default_rng(seed)
        values = (rng.random(60) < null - 0.1).astype(float)
        if seed == 2:  # means of groups
            values = rng.beta(8, 3, 60)
        for share, bet in zip(BET_SHARES, bets_of(1 - null), strict=True):
            oracle = ville.BettingTest(null, alternative="less", c=share, alpha=1e-300).fit(values)
            own = np.cumsum([log_growth([null - v], [bet])[0] for v in values])
            assert oracle.log_e_values_ == pytest.approx(own, abs=1e-9)


# --- limits of a mean --------------------------------------------------------------------------


def test_the_limit_of_a_share_is_that_of_clopper_and_pearson() -> None:
    rng = np.random.default_rng(0)
    for n, k, alpha in ((100, 75, 0.01), (500, 380, 0.0032), (30, 30, 0.05), (20, 1, 0.1)):
        values = rng.permutation(np.repeat([1.0, 0.0], [k, n - k]))
        oracle = stats.binomtest(k, n).proportion_ci(1 - 2 * alpha, method="exact").low
        assert mean_lower_limit(values, alpha) == pytest.approx(oracle)
    assert mean_lower_limit([0.0, 0.0], 0.05) == 0.0


@pytest.mark.parametrize("pairs", [1, 5])
def test_a_limit_of_a_mean_covers(pairs: int) -> None:
    """Of shares, and of the means of groups whose pairs are alike."""
    seed, runs, prompts, alpha = 10 + pairs, 400, 150, 0.05
    rng = np.random.default_rng(seed)
    levels = rng.beta(3, 1, (runs, prompts, 1))  # mean 3/4; a prompt is easy or hard
    means = (rng.random((runs, prompts, pairs)) < levels).mean(axis=-1)
    limits = np.array([mean_lower_limit(one, alpha) for one in means])
    wrong = float((limits > 0.75).mean())
    print("seed", seed, "pairs", pairs, "wrong", wrong, "width", 0.75 - limits.mean())
    assert wrong <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)
    # and it is no idle one: the normal limit, which does not hold for sure, is not far
    normal = means.mean(axis=1) - stats.norm.isf(alpha) * means.std(axis=1) / np.sqrt(prompts)
    assert (0.75 - limits.mean()) < 1.6 * (0.75 - normal.mean())


def test_a_limit_of_a_mean_is_refused_what_it_does_not_hold_for() -> None:
    for values in ([0.5, 1.1], [-0.1, 0.3], [float("nan")]):
        with pytest.raises(DataError):
            mean_lower_limit(values, 0.05)
    for alpha in (0.0, 1.0):
        with pytest.raises(DataError, match="alpha"):
            mean_lower_limit([0.5], alpha)
    with pytest.raises(ShapeError):
        mean_lower_limit([], 0.05)


def test_evidence_above_a_level_is_an_e_value_and_not_a_weak_one() -> None:
    """In the mean at most 1 at the true mean, whatever the values; less for all below it."""
    seed, runs, n = 30, 2000, 120
    rng = np.random.default_rng(seed)
    for values in (rng.beta(3, 1, (runs, n)), (rng.random((runs, n)) < 0.75).astype(float)):
        at_true = np.array([evidence_above(one, [0.75])[0] for one in values])
        mean, error = mean_and_error(np.exp(at_true))
        print("seed", seed, mean, "+-", error)
        assert abs(mean - 1) < 4 * error
        # 2.4 standard errors below: about 2.4**2 / 2 in the mean, which no bet of a kind exceeds
        below = 0.75 - TUNED * values.std() / np.sqrt(n)
        assert np.mean([evidence_above(one, [below])[0] for one in values]) > 0.75 * TUNED**2 / 2
    levels = np.linspace(0.01, 1.0, 50)
    assert (np.diff(evidence_above(values[0], levels)) < 0).all()
    with pytest.raises(DataError):
        evidence_above([1.5], [0.5])


# --- limits of the temperature -----------------------------------------------------------------


def margins_of(rng: np.random.Generator, n: int, inverse: float) -> np.ndarray:
    """``chosen - rejected`` of a model whose true 1/T this is."""
    size = 2 * np.abs(rng.standard_normal(n))
    return np.where(rng.random(n) < 1 / (1 + np.exp(-size * inverse)), size, -size)


def test_the_best_inverse_temperature_is_that_of_the_fit() -> None:
    rng = np.random.default_rng(0)
    for inverse in (0.3, 1.0, 2.5):
        margins = margins_of(rng, 800, inverse)
        best, low, high = inverse_temperature_limits(margins)
        assert 1 / best == pytest.approx(fit_temperature(margins), rel=1e-4)
        assert low < best < high
        # a pair turned round says the same
        turned = inverse_temperature_limits(-margins, np.zeros(800))
        assert turned == pytest.approx((best, low, high))
        # in other units
        scaled = inverse_temperature_limits(10 * margins)
        assert 10 * np.array(scaled) == pytest.approx((best, low, high), rel=1e-6)


def test_limits_of_the_temperature_cover_on_each_side() -> None:
    seed, runs, alpha, inverse = 21, 1000, 0.05, 0.8
    rng = np.random.default_rng(seed)
    found = np.array(
        [
            inverse_temperature_limits(margins_of(rng, 300, inverse), alpha=alpha)
            for _ in range(runs)
        ]
    )
    above, below = (found[:, 1] > inverse).mean(), (found[:, 2] < inverse).mean()
    print("seed", seed, "wrong", above, below)
    assert max(above, below) <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)
    assert min(above, below) >= alpha / 3  # and are no wider than they say


def test_pairs_of_one_prompt_widen_the_limits() -> None:
    rng = np.random.default_rng(5)
    margins = margins_of(rng, 200, 0.8)
    alone = inverse_temperature_limits(margins, alpha=0.01)
    names = [str(i) for i in range(200)]
    again = inverse_temperature_limits(np.tile(margins, 4), groups=names * 4, alpha=0.01)
    naive = inverse_temperature_limits(np.tile(margins, 4), alpha=0.01)
    assert again == pytest.approx(alone, rel=1e-6)  # copies say nothing new
    assert naive[2] - naive[1] < 0.6 * (alone[2] - alone[1])


def test_limits_of_the_temperature_say_what_they_cannot_do() -> None:
    with pytest.raises(DataError, match="ordered wrongly"):
        inverse_temperature_limits([1.0, 2.0])
    with pytest.raises(DataError, match="ordered wrongly"):
        inverse_temperature_limits([0.0, 0.0])
    with pytest.raises(DataError, match="one prompt"):
        inverse_temperature_limits([1.0, -0.5], groups=["a", "a"])
    with pytest.raises(ShapeError):
        inverse_temperature_limits([1.0, -0.5], groups=["a"])
    best, low, high = inverse_temperature_limits([-1.0, -2.0, 1.0])
    assert best == low == 0 < high
