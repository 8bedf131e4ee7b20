"""The votes of many completions, the scores of many models."""

from __future__ import annotations

import math

import pytest
import torch

from companion.errors import DataError, ShapeError
from companion.functional import ensemble_scores, majority_vote

NAN = float("nan")


def test_the_majority_decides_and_silence_has_no_vote() -> None:
    assert majority_vote(["7", "8", "8", "7"]) == 0
    assert majority_vote([None, None, None, "7", "8", "8"]) == 4
    assert majority_vote([None, None]) is None
    assert majority_vote(["7", "8", "8"], [5.0, 1.0, 1.0]) == 0
    with pytest.raises(ShapeError):
        majority_vote(["7"], [1.0, 2.0])
    with pytest.raises(DataError):
        majority_vote(["7"], [math.nan])


def test_ensembles_by_hand() -> None:
    scores = torch.tensor([[1.0, 3.0], [2.0, -1.0], [6.0, 1.0]])
    assert ensemble_scores(scores).tolist() == pytest.approx([3, 1])
    assert ensemble_scores(scores, "worst").tolist() == [1, -1]
    variances = [((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 3, (4 + 4 + 0) / 3]
    got = ensemble_scores(scores, "uncertainty", weight=0.5).tolist()
    assert got == pytest.approx([3 - 0.5 * variances[0], 1 - 0.5 * variances[1]])
    for how in ("mean", "worst", "uncertainty"):
        assert torch.equal(ensemble_scores(scores[:1], how), scores[0])
        assert ensemble_scores(torch.tensor([[NAN], [1.0]]), how).isnan().all()


def test_ensembles_refuse() -> None:
    with pytest.raises(ShapeError):
        ensemble_scores(torch.zeros(0, 3))
    with pytest.raises(DataError):
        ensemble_scores(torch.zeros(2, 3), "best")  # type: ignore[arg-type]
