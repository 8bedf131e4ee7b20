"""AUC against scikit-learn, the first error by hand, and the floors."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from companion.errors import DataError
from companion.evaluation import (
    first_error_figures,
    fit_threshold,
    guessing_f1,
    outcome_metrics,
    process_metrics,
    roc_auc,
)

RNG = np.random.default_rng(0)
#: P(wrong) and whether wrong: error found, error named too early, right passed, right accused
SOLUTIONS = [
    (np.array([0.1, 0.9, 0.2]), np.array([0, 1, 0])),
    (np.array([0.6, 0.9]), np.array([0, 1])),
    (np.array([0.1, 0.2]), np.array([0, 0])),
    (np.array([0.1, 0.7]), np.array([0, 0])),
]


def test_auc_is_that_of_scikit_learn() -> None:
    labels = RNG.integers(0, 2, 200)
    scores = np.round(RNG.normal(labels, 2), 1)  # with ties
    assert roc_auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    with pytest.raises(DataError, match="right ones and wrong ones"):
        roc_auc([0.1, 0.2], [1, 1])


def test_outcome_figures_stand_beside_their_floors() -> None:
    labels = RNG.integers(0, 2, 300).astype(float)
    last = np.clip(0.5 + 0.3 * (labels - 0.5) + RNG.normal(0, 0.2, 300), 0.01, 0.99)
    lengths = 20 - 5 * labels + RNG.normal(0, 5, 300)
    found = outcome_metrics(
        {"last": last, "log_product": np.log(last)},
        labels,
        how="last",
        lengths=lengths,
        groups=[i // 3 for i in range(300)],
        truth=labels,
    )
    assert found["auc"] == found["auc_by_aggregation"]["log_product"]  # the same order
    assert found["length_auc"] == pytest.approx(1 - roc_auc_score(labels, lengths))
    assert found["limit_auc"] == 1.0
    assert found["majority"] == max(labels.mean(), 1 - labels.mean())
    assert found["accuracy"] == np.mean((last > 0.5) == (labels > 0.5))
    assert found["auc_interval"][0] < found["auc"] < found["auc_interval"][1]
    alike = outcome_metrics({"last": last}, np.ones(300), how="last", lengths=lengths)
    assert alike["auc"] is None
    assert alike["majority"] == 1.0


def test_the_first_error() -> None:
    found = first_error_figures(SOLUTIONS, 0.5)
    assert found["accuracy_on_errors"] == 0.5
    assert found["accuracy_on_right"] == 0.5
    assert found["first_error_f1"] == 0.5
    # named only above 0.8: both errors, and both right ones pass
    assert first_error_figures(SOLUTIONS, 0.8)["first_error_f1"] == 1.0
    assert 0.7 <= fit_threshold(SOLUTIONS) < 0.9
    assert fit_threshold([]) == 0.5


def test_guessing_never_beats_its_best_rate() -> None:
    floor = guessing_f1(SOLUTIONS)
    assert 0 < floor < 0.5
    q = 0.3
    on_errors, on_right = np.mean([q * (1 - q), q * (1 - q)]), (1 - q) ** 2
    assert floor >= 2 * on_errors * on_right / (on_errors + on_right)


def test_process_figures() -> None:
    right = [np.ones(3), np.array([0, 1]), np.ones(2), np.array([1, 0])]
    classes = [np.array([2, 0, 2]), np.array([2, 0]), np.array([1, 2]), np.array([2, 2])]
    found = process_metrics(SOLUTIONS, threshold=0.8, right=right, labels=classes)
    assert found["step_accuracy"] == pytest.approx(7 / 9)
    assert found["majority"] == pytest.approx(6 / 9)
    assert found["first_error"]["first_error_f1"] == 1.0
    assert found["first_error_at_half"]["first_error_f1"] == 0.5
    assert found["n_steps"] == 9
    assert found["limit_f1"] is None
    truth = [wrong for _, wrong in SOLUTIONS]
    truth[2] = np.array([1, 0])  # its label came out as 'right' by noise
    found = process_metrics(SOLUTIONS, threshold=0.8, right=right, labels=classes, truth=truth)
    assert found["limit_f1"] == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="no solution"):
        process_metrics([], threshold=0.5, right=[], labels=[])
