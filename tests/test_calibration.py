"""Calibration: estimators against models whose calibration is known, and the known traps."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from companion.errors import DataError, ShapeError
from companion.functional import (
    bootstrap_interval,
    brier_score,
    calibrated_band,
    confidence_and_correctness,
    expected_calibration_error,
    fit_temperature,
    orient_at_random,
    reliability_bins,
    score_parts,
)

NAN = float("nan")


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def calibrated_margins(n: int, seed: int, spread: float = 1.5) -> np.ndarray:
    """Margins ``chosen - rejected`` of a model that is the Bradley–Terry truth itself."""
    random = np.random.default_rng(seed)
    gap = np.abs(random.normal(0, spread, n))
    return np.where(random.random(n) < sigmoid(gap), gap, -gap)


probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=60)


# --- the two right questions, and the wrong one -----------------------------------------------


def test_confidence_and_correctness() -> None:
    confidence, correct = confidence_and_correctness([2.0, -2.0, 0.0, 1000.0])
    assert confidence.tolist() == pytest.approx([sigmoid(np.array(2.0))] * 2 + [0.5, 1.0])
    assert correct.tolist() == [1.0, 0.0, 0.5, 1.0]


def test_the_outcome_always_one_is_no_calibration() -> None:
    margins = calibrated_margins(50_000, 0)
    for error in (
        expected_calibration_error(*confidence_and_correctness(margins)),
        expected_calibration_error(*orient_at_random(margins, 0)),
    ):
        assert error < 0.02
    p = sigmoid(margins)
    wrong = expected_calibration_error(p, np.ones_like(p))
    assert wrong == pytest.approx(1 - p.mean(), abs=1e-9)
    assert wrong > 0.2  # a perfectly calibrated model looks terrible


def test_orientation() -> None:
    margins = calibrated_margins(20_000, 1)
    p, first = orient_at_random(margins, 7)
    assert 0.48 < first.mean() < 0.52
    assert np.array_equal(p, np.where(first == 1, sigmoid(margins), sigmoid(-margins))) or (
        np.allclose(p, np.where(first == 1, sigmoid(margins), sigmoid(-margins)), atol=1e-12)
    )
    assert np.array_equal(orient_at_random(margins, 7)[0], p)
    assert not np.array_equal(orient_at_random(margins, np.random.default_rng(8))[0], p)
    # a Brier score does not mind the orientation
    assert brier_score(p, first) == pytest.approx(
        brier_score(sigmoid(margins), np.ones(20_000)), abs=1e-12
    )


# --- expected calibration error ---------------------------------------------------------------


def test_three_hundred_thousand_draws() -> None:
    random = np.random.default_rng(0)
    p = random.random(300_000)
    assert expected_calibration_error(p, random.random(300_000) < p) < 0.02
    assert expected_calibration_error(p, random.random(300_000) < 0.5) > 0.1


@settings(deadline=None)
@given(probabilities, st.integers(0, 99), st.sampled_from(["width", "mass"]), st.integers(1, 20))
def test_bins_hold_every_item_once(values: list[float], seed: int, how: str, n: int) -> None:
    random = np.random.default_rng(seed)
    p = np.array([*values, 0.0, 1.0])
    y = (random.random(p.size) < p).astype(float)
    bins = reliability_bins(p, y, n, how)  # type: ignore[arg-type]
    assert bins.count.sum() == p.size
    assert (bins.count * bins.confidence).sum() == pytest.approx(p.sum())
    assert (bins.count * bins.outcome).sum() == pytest.approx(y.sum())
    assert (bins.low <= bins.confidence + 1e-12).all()
    assert (bins.confidence <= bins.high + 1e-12).all()
    error = expected_calibration_error(p, y, n, how)  # type: ignore[arg-type]
    assert 0 <= error <= 1
    # one bin is the least that any binning can show
    assert error >= abs(p.mean() - y.mean()) - 1e-12
    # the order of the rows says nothing
    order = random.permutation(p.size)
    for debias in (False, True):
        a = expected_calibration_error(p, y, n, how, debias)  # type: ignore[arg-type]
        b = expected_calibration_error(p[order], y[order], n, how, debias)  # type: ignore[arg-type]
        assert a == pytest.approx(b, abs=1e-7)


def test_ece_by_width_is_the_loop() -> None:
    random = np.random.default_rng(3)
    p, y = random.random(500), random.random(500) < 0.4
    total = 0.0
    for b in range(10):
        inside = (p >= b / 10) & ((p < (b + 1) / 10) | (b == 9))
        if inside.any():
            total += inside.mean() * abs(p[inside].mean() - y[inside].mean())
    assert expected_calibration_error(p, y) == pytest.approx(total, abs=1e-12)


def test_bins_open_on_the_left_lose_zero() -> None:
    # float16: sigmoid(-18) is exactly 0
    p = torch.sigmoid(torch.full((100,), -18.0, dtype=torch.float32)).half()
    assert (p == 0).all()
    y = np.ones(100)  # said 'never', came always
    assert expected_calibration_error(p, y) == 1.0

    def left_open(p: np.ndarray, y: np.ndarray) -> float:
        edges, total = np.linspace(0, 1, 11), 0.0
        for low, high in itertools.pairwise(edges):
            inside = (p > low) & (p <= high)
            if inside.any():
                total += inside.mean() * abs(p[inside].mean() - y[inside].mean())
        return total

    assert left_open(p.numpy().astype(float), y) == 0.0  # wrong: looks perfect


def test_equal_mass_bins_are_equal() -> None:
    p = np.random.default_rng(0).random(1000) ** 3
    assert reliability_bins(p, p > 0.5, 10, "mass").count.tolist() == [100] * 10
    # a run of equal confidences is one bin, not cut by the order of the rows
    assert reliability_bins(np.full(30, 0.7), np.ones(30), 10, "mass").count.tolist() == [30]


def mean_error(n: int, strategy: str, debias: bool, n_bins: int = 15, repeats: int = 200) -> float:
    return float(
        np.mean(
            [
                expected_calibration_error(
                    *confidence_and_correctness(calibrated_margins(n, seed)),
                    n_bins,
                    strategy,  # type: ignore[arg-type]
                    debias,
                )
                for seed in range(repeats)
            ]
        )
    )


def test_debiasing_takes_most_of_the_bias_off() -> None:
    # True error 0. Plain estimates come out near 0.06 at 200 and 0.03 at 1,000 pairs.
    for n, plain_at_least, debiased_at_most in ((200, 0.05, 0.035), (1000, 0.022, 0.016)):
        plain = mean_error(n, "width", debias=False)
        debiased = mean_error(n, "mass", debias=True)
        assert plain > plain_at_least
        assert debiased < debiased_at_most
        assert debiased < 0.6 * plain
        assert debiased < 0.5 * mean_error(n, "mass", debias=False)


def test_debiasing_keeps_a_real_error() -> None:
    random = np.random.default_rng(5)
    confidence = random.uniform(0.6, 0.9, 4000)
    errors = []
    for shift in (0.05, 0.1, 0.2):
        outcome = random.random(4000) < confidence - shift
        errors.append(expected_calibration_error(confidence, outcome, 15, "mass", True))
    assert errors == pytest.approx([0.05, 0.1, 0.2], abs=0.02)


def test_debiasing_survives_bins_of_one() -> None:
    confidence = np.array([0.55, 0.65, 0.95])
    error = expected_calibration_error(confidence, [1, 1, 1], 15, "mass", True)
    assert np.isfinite(error)
    assert 0 <= error <= 1


# --- the band ---------------------------------------------------------------------------------


def test_the_band_covers() -> None:
    for strategy, debias in (("width", False), ("mass", True)):
        inside = 0
        for seed in range(100):
            confidence, correct = confidence_and_correctness(calibrated_margins(300, seed))
            low, high = calibrated_band(
                confidence,
                10,
                strategy,
                debias,
                n_simulations=300,  # type: ignore[arg-type]
            )
            error = expected_calibration_error(confidence, correct, 10, strategy, debias)  # type: ignore[arg-type]
            inside += low <= error <= high
        assert 88 <= inside <= 100


def test_the_band_catches_overconfidence() -> None:
    margins = calibrated_margins(1000, 2) * 2  # a temperature of 2 is missing
    confidence, correct = confidence_and_correctness(margins)
    band = calibrated_band(confidence, 10, "mass", True)
    assert expected_calibration_error(confidence, correct, 10, "mass", True) > 2 * band.high


def test_the_band_is_the_same_each_time_and_matches_the_estimator() -> None:
    confidence, _ = confidence_and_correctness(calibrated_margins(200, 3))
    band = calibrated_band(confidence, 10, "mass", True, seed=1)
    assert band == calibrated_band(confidence, 10, "mass", True, seed=1)
    assert band != calibrated_band(confidence, 10, "mass", True, seed=2)
    random = np.random.default_rng(9)
    for debias in (False, True):
        errors = [
            expected_calibration_error(
                confidence, random.random(200) < confidence, 10, "width", debias
            )
            for _ in range(400)
        ]
        band = calibrated_band(confidence, 10, "width", debias)
        assert np.quantile(errors, [0.025, 0.975]) == pytest.approx(band, abs=0.015)
    with pytest.raises(DataError):
        calibrated_band(confidence, level=1.0)


# --- temperature ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_found(temperature: float) -> None:
    margins = calibrated_margins(100_000, 4) * temperature
    found = fit_temperature(torch.tensor(margins, dtype=torch.float32))
    assert found == pytest.approx(temperature, rel=0.02)

    def loss(t: float) -> float:
        return float(np.logaddexp(0, -margins / t).mean())

    assert loss(found) <= min(loss(found * 0.99), loss(found * 1.01))
    fixed = expected_calibration_error(*confidence_and_correctness(margins / found))
    assert fixed < 0.01


@pytest.mark.parametrize(
    ("margins", "bound", "word"),
    [
        ([1.0, 2.0, 3.0], 0.01, "wrongly"),
        ([1000.0, 0.0], 0.01, "wrongly"),
        ([-1.0, -2.0, 1.0], 100.0, "coin"),
        ([0.0, 0.0], 100.0, "coin"),
    ],
)
def test_temperature_warns_at_its_bound(margins: list[float], bound: float, word: str) -> None:
    with pytest.warns(UserWarning, match=word):
        assert fit_temperature(margins) == pytest.approx(bound)


def test_temperature_is_quiet_inside_and_refuses_infinity() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_temperature([3.0, 1.0, -1.0, 2.0])
    with pytest.raises(DataError):
        fit_temperature([1.0, float("inf")])


# --- bootstrap --------------------------------------------------------------------------------


def test_bootstrap_of_a_mean() -> None:
    values = (np.random.default_rng(0).random(2000) < 0.7).astype(float)
    low, high = bootstrap_interval(values)
    error = np.sqrt(values.var() / 2000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.004)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.004)
    assert bootstrap_interval(values) == (low, high)
    slow = bootstrap_interval(values[:200], statistic=lambda v: float(v.mean()), n_resamples=500)
    assert slow == pytest.approx(bootstrap_interval(values[:200]), abs=0.03)


def test_bootstrap_draws_prompts_not_pairs() -> None:
    random = np.random.default_rng(1)
    by_prompt = (random.random(100) < 0.7).astype(float)
    values, prompts = np.repeat(by_prompt, 20), np.repeat(np.arange(100), 20)
    low, high = bootstrap_interval(values, [f"prompt {p}" for p in prompts])
    single = bootstrap_interval(by_prompt)
    assert (low, high) == pytest.approx(single, abs=0.02)
    wrong = bootstrap_interval(values)  # as if 2,000 independent pairs
    assert (high - low) > 3 * (wrong.high - wrong.low)


def test_bootstrap_of_unequal_groups_is_of_the_mean_over_items() -> None:
    values = np.array([1.0] * 10 + [0.0])
    groups = [0] * 10 + [1]
    low, high = bootstrap_interval(values, groups, level=0.2)
    assert low <= values.mean() <= high
    pair = bootstrap_interval(
        np.stack([values, values], axis=1), groups, statistic=lambda v: float(v[:, 0].sum())
    )
    assert (pair.low, pair.high) == (0.0, 20.0)


# --- input ------------------------------------------------------------------------------------


def test_torch_and_numpy_give_the_same() -> None:
    margins = calibrated_margins(100, 6).astype(np.float32)
    a = confidence_and_correctness(margins)
    b = confidence_and_correctness(torch.tensor(margins, requires_grad=True))
    assert np.array_equal(a[0], b[0])
    assert np.array_equal(a[1], b[1])
    assert expected_calibration_error(*a) == expected_calibration_error(
        torch.tensor(a[0]), torch.tensor(a[1])
    )


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="position 1"):
        confidence_and_correctness([1.0, NAN])
    with pytest.raises(DataError, match="logits"):
        expected_calibration_error([1.5], [1])
    with pytest.raises(ShapeError, match="2 items, outcome 1"):
        expected_calibration_error([0.5, 0.5], [1])
    with pytest.raises(ShapeError, match="one-dimensional"):
        brier_score(np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(ShapeError, match="empty"):
        fit_temperature([])
    with pytest.raises(DataError):
        reliability_bins([0.5], [1], 0)
    with pytest.raises(DataError):
        reliability_bins([0.5], [1], 10, "both")  # type: ignore[arg-type]
    with pytest.raises(ShapeError):
        bootstrap_interval([1.0, 2.0], ["a"])
    with pytest.raises(DataError):
        bootstrap_interval([1.0, NAN])


# ---------------------------------------------------------------------- parts of a score


@pytest.mark.parametrize("rule", ["brier", "log"])
def test_a_score_is_the_sum_of_its_parts(rule: Any) -> None:
    """Whatever the numbers; and a monotone change of all moves the miscalibration alone."""
    rng = np.random.default_rng(41)
    said = rng.uniform(0.01, 0.99, 500)
    came = (rng.random(500) < said**2).astype(float)
    parts = score_parts(said, came, rule)
    total = parts.miscalibration - parts.discrimination + parts.uncertainty
    assert parts.score == pytest.approx(total)
    assert min(parts.miscalibration, parts.discrimination, parts.uncertainty) > 0
    bent = score_parts(said**2, came, rule)
    assert bent.discrimination == pytest.approx(parts.discrimination)
    assert bent.uncertainty == pytest.approx(parts.uncertainty)
    assert bent.miscalibration < parts.miscalibration / 2  # it is what came
    order = rng.permutation(500)
    assert score_parts(said[order], came[order], rule).score == pytest.approx(parts.score)


def test_parts_of_a_score_by_hand() -> None:
    """Four pairs: 0.6 twice, right once; 0.9 twice, right twice."""
    parts = score_parts([0.6, 0.6, 0.9, 0.9], [1, 0, 1, 1])
    assert parts.score == pytest.approx((0.16 + 0.36 + 0.01 + 0.01) / 4)
    assert parts.uncertainty == pytest.approx(0.75 * 0.25)
    assert parts.miscalibration == pytest.approx(0.01)  # both are off by 0.1
    assert parts.discrimination == pytest.approx(0.1875 - 0.125)
    assert score_parts([0.7] * 4, [1, 0, 1, 1]).discrimination == pytest.approx(0)
    sure = score_parts([1.0, 0.0], [1, 0], "log")
    assert sure.score == sure.miscalibration == 0.0
    assert score_parts([1.0], [0], "log").score == np.inf
    with pytest.raises(DataError, match="rule='linear'"):
        score_parts([0.5], [1], "linear")  # type: ignore[arg-type]
