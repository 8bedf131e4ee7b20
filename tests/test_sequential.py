"""The test for a fall: no false alarms by noise, and in time when the score does fall."""

from __future__ import annotations

import numpy as np
import pytest

from companion.errors import DataError, ShapeError
from companion.functional import FallTest
from companion.functional.sequential import paired_fall

LOOKS, PROMPTS, RUNS = 16, 100, 200


def series(curve: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``[looks, prompts]``: each prompt has its own level; a completion varies by 1 around it."""
    levels = rng.normal(0, 1.5, size=PROMPTS)
    return curve[:, None] + levels + rng.normal(0, 1.0, size=(len(curve), PROMPTS))


def first_stop(scores: np.ndarray, alpha: float = 0.05) -> int | None:
    test = FallTest(len(scores), alpha)
    for look, values in enumerate(scores):
        if test.add(values).fallen:
            return look
    return None


def naive_stop(scores: np.ndarray) -> int | None:
    """What one writes first: below the best so far at p < 0.05."""
    best = 0
    for look in range(1, len(scores)):
        if scores[look].mean() > scores[best].mean():
            best = look
        elif paired_fall(scores[best], scores[look])[1] < 0.05:
            return look
    return None


@pytest.mark.parametrize("curve", [np.zeros(LOOKS), np.minimum(np.linspace(0, 2, LOOKS), 1.0)])
def test_a_run_that_never_falls_is_hardly_ever_stopped(curve: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    runs = [series(curve, rng) for _ in range(RUNS)]
    stopped = sum(first_stop(run) is not None for run in runs)
    assert stopped <= 0.05 * RUNS
    if not curve.any():  # with many looks the naive rule nearly always cries wolf
        assert sum(naive_stop(run) is not None for run in runs) > 0.4 * RUNS


def test_it_stops_before_the_gain_is_lost() -> None:
    """Up by 1.2 in six looks, then down by 0.12 a look: back at the start after look 16."""
    curve = np.concatenate([np.linspace(0, 1.2, 6), 1.2 - 0.12 * np.arange(1, 11)])
    rng = np.random.default_rng(2)
    stops = [first_stop(series(curve, rng)) for _ in range(RUNS)]
    assert all(stop is not None for stop in stops)
    left = np.array([curve[stop] for stop in stops])
    assert (left > 0).mean() >= 0.98
    assert np.median(left) > 0.5
    assert min(stops) > 5, "not before the top"


def test_pairing_is_by_prompt() -> None:
    """Prompts differ by far more than looks do: unpaired, the fall would drown."""
    rng = np.random.default_rng(3)
    levels = rng.normal(0, 20, size=PROMPTS)
    change, p_value = paired_fall(levels, levels - 0.5 + rng.normal(0, 0.5, size=PROMPTS))
    assert change == pytest.approx(-0.5, abs=0.2)
    assert p_value < 1e-6


def test_missing_scores_leave_their_prompt_out() -> None:
    values = np.arange(20.0)
    later = values - 1.0 + 0.01 * np.arange(20)
    later[:5] = np.nan
    test = FallTest(2)
    assert not test.add(values).fallen
    fall = test.add(later)
    assert fall.fallen
    assert fall.change == pytest.approx(np.mean(later[5:] - values[5:]))
    with pytest.raises(DataError, match="look 3, and 2 were planned"):
        test.add(values)


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(DataError, match="looks is 1"):
        FallTest(1)
    with pytest.raises(DataError, match="alpha is 0"):
        FallTest(3, alpha=0)
    with pytest.raises(DataError, match="only 3 prompts"):
        FallTest(3).add([1.0, 2.0, 3.0])
    test = FallTest(3)
    test.add(np.zeros(10))
    with pytest.raises(ShapeError, match="one for each prompt"):
        test.add(np.zeros(11))
    assert test.add(np.zeros(10)).p_value == 1.0
    assert FallTest(3).level == pytest.approx(0.05 / 3)
