"""The study in short: 60 runs each. In full: ``python -m benchmarks.monitoring``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import monitoring as study
from benchmarks.results import FOLDER
from companion.functional import expected_calibration_error
from companion.monitoring.plan import Level, Plan
from companion.monitoring.planner import Change, simulate

RUNS, WEEKS = 60, 52


def watched(reference: int, pairs: int, change: Change | None, seed: int) -> dict[str, np.ndarray]:
    """Weeks of the alarms; every pair is drawn, so that the naive alarm sees the same ones."""
    print("seed", seed, "reference", reference, "pairs of a prompt", pairs, change)
    pop = study.population(pairs)
    parts: dict[str, list[np.ndarray]] = {}
    for chunk in study.monitors(pop, reference, RUNS, seed):
        found = study.watch(pop, chunk, change, a_week=study.A_WEEK, weeks=WEEKS)
        for name, weeks in found.items():
            parts.setdefault(name, []).append(weeks)
    found = {name: np.concatenate(own) for name, own in parts.items()}
    print({name: int((weeks > 0).sum()) for name, weeks in found.items()})
    return found


@pytest.mark.parametrize(("reference", "pairs"), [(500, 1), (2000, 5)])
def test_the_alarms_do_not_cry_wolf_and_the_naive_one_does(reference: int, pairs: int) -> None:
    found = watched(reference, pairs, None, seed=70 + pairs)
    assert (found["any"] > 0).sum() <= 3  # of 60 at 0.01: more has a chance of 0.003
    assert (found["naive"] > 0).sum() >= 57
    assert ("slices" in found) == (reference // pairs >= 400)


def test_a_true_change_is_caught_and_the_naive_alarm_rang_before() -> None:
    change = Change("temperature", 2.0, 20)
    found = watched(2000, 1, change, seed=73)
    delay = study.quantiles(found["any"], change, study.A_WEEK)
    print(delay)
    assert delay["early"] <= 3
    assert delay["missed"] == 0
    assert delay["q90"] is not None
    assert delay["q90"] <= 2400
    assert study.quantiles(found["naive"], change, study.A_WEEK)["early"] >= 54


def test_a_reference_that_is_taken_at_its_word_cries_wolf() -> None:
    """The form that one writes first: the estimates are the nulls. A wrong implementation."""

    def taken(plan: Plan) -> Plan:
        own = plan.calibration
        assert own is not None
        best = own.inverse[0]
        level = plan.accuracy
        return replace(
            plan,
            accuracy=Level(level.n, level.prompts, level.mean, level.mean, 0.0, level.alpha),
            calibration=replace(own, inverse=(best, best, best), open=[], log_e=[], tolerance=0.0),
        )

    pop = study.population().coarse()
    plans = [plan for chunk in study.monitors(pop, 500, RUNS, 74) for plan in chunk.plans]
    settings: dict[str, Any] = {"reference": 0, "a_week": 200, "weeks": WEEKS, "runs": RUNS}
    settings["tests"] = ("accuracy", "calibration")
    right, wrong = (
        study.earliest(simulate(pop, plans=own, seed=74, **settings))
        for own in (plans, [taken(plan) for plan in plans])
    )
    print("alarms", (right > 0).sum(), (wrong > 0).sum())
    assert (right > 0).sum() <= 3
    assert (wrong > 0).sum() >= 15


# --- the program's own arithmetic ---------------------------------------------------------------


def test_the_fast_calibration_error_is_the_careful_one() -> None:
    rng = np.random.default_rng(0)
    confidence = 0.5 + 0.5 * rng.random((5, 200))
    confidence[0, :3] = (0.5, 1.0, 0.7)  # edges
    right = (rng.random((5, 200)) < confidence - 0.1).astype(float)
    both = confidence, right
    slow = [expected_calibration_error(c, r, study.NAIVE_BINS) for c, r in zip(*both, strict=True)]
    assert study.weekly_ece(confidence, right) == pytest.approx(slow, abs=1e-12)


def test_delays_count_misses_as_longer_than_all() -> None:
    change = Change("accuracy", 0.05, 10)
    found = study.quantiles(np.array([5, 11, 12, 0, 14]), change, 200)
    assert found == {"early": 1, "missed": 1, "median": 400, "q90": None}
    assert study.quantiles(np.array([3, 4]), change, 200)["median"] is None
    earliest = study.earliest({"a": np.array([0, 3, 0]), "b": np.array([5, 2, 0])})
    assert earliest.tolist() == [5, 2, 0]
    assert study.first(np.array([[False, True, True], [False] * 3])).tolist() == [2, 0]


def test_the_labels_that_a_power_needs_are_read_off_the_curve() -> None:
    from scipy import stats

    grid = [85, 100, 118]
    shares = [float(stats.norm.cdf(1.2816 + 2.0 * np.log(n / 110))) for n in grid]
    needed, noise = study.needed_labels(grid, shares, 1000, 0.9)
    assert needed == pytest.approx(110, rel=1e-3)
    assert noise == pytest.approx(0.0541 / 2, rel=0.01)


def test_the_program_ends_with_an_error_if_alarms_are_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"reference": 500, "runs": 1000, "any": 17}
    monkeypatch.setattr(study, "false_alarms", lambda args: [row])
    monkeypatch.setattr(study, "delays", lambda args: [])
    monkeypatch.setattr(study, "promises", lambda args: [])
    target = tmp_path / "monitoring.json"
    monkeypatch.setattr(sys, "argv", ["monitoring", "--output", str(target)])
    study.main()
    assert json.loads(target.read_text(encoding="utf-8"))["false_alarms"] == [row]
    row["any"] = 18
    with pytest.raises(SystemExit, match="false alarm"):
        study.main()
    row["any"] = 0
    promised = {"change": "accuracy", "size": 1, "within": 1, "reference": 1, "promised": 116}
    promised |= {"found": 100, "ratio": 1.16, "ratio_by_default": 1.0, "noise": 0.0}
    monkeypatch.setattr(study, "promises", lambda args: [promised])
    with pytest.raises(SystemExit, match="promises"):
        study.main()


def test_the_recorded_study_holds() -> None:
    """What is in ``benchmarks/results`` is what was run in full."""
    record = json.loads((FOLDER / "monitoring.json").read_text(encoding="utf-8"))
    assert not record["quick"]
    assert record["weeks"] == 104
    assert {(row["reference"], row["pairs_a_prompt"]) for row in record["false_alarms"]} == {
        (500, 1),
        (2000, 1),
        (500, 5),
        (2000, 5),
    }
    for row in record["false_alarms"]:
        assert row["runs"] == 1000
        assert row["any"] <= 17
        assert row["naive"] >= 990
    assert all(abs(row["ratio"] - 1) <= 0.15 for row in record["promises"])
