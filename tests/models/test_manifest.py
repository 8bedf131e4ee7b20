"""The manifest: what it holds, what it refuses, and the reference statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from companion import RewardFormatter
from companion.errors import DataError, ModelError
from companion.models import ReferenceStats, RewardManifest


@pytest.fixture
def manifest(tiny_tokenizer: Any) -> RewardManifest:
    made = RewardManifest(
        reference=ReferenceStats.from_scores(np.random.default_rng(0).normal(2, 3, 500), "normal"),
        temperature=1.2,
        metrics={"accuracy": np.float64(0.75), "n": np.int64(3)},
    )
    made.describe(RewardFormatter(tiny_tokenizer))
    return made


def test_round_trip(manifest: RewardManifest, tmp_path: Path) -> None:
    path = manifest.save(tmp_path)
    assert RewardManifest.load(tmp_path) == RewardManifest.load(path) == manifest
    assert next(iter(json.loads(path.read_text()))) == "format_version"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file is left


def _changed(manifest: RewardManifest, **changes: Any) -> str:
    data = json.loads(manifest.to_json())
    for key, value in changes.items():
        if value is ...:
            del data[key]
        else:
            data[key] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"format_version": ...}, "format_version is 0"),
        ({"formatter": ...}, "missing field formatter"),
        ({"extra": 1}, "unknown field extra"),
        ({"readout": {"rule": "first_token"}}, "first_token"),
        ({"readout": 3}, "'readout' is no object"),
        ({"formatter_fingerprint": "0"}, "the file was edited"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"reference": {"mean": 1}}, "'reference' is malformed"),
        ({"reference": 7}, "'reference' is malformed"),
        ({"notes": "x"}, "'notes' is no list"),
    ],
)
def test_refused(manifest: RewardManifest, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        RewardManifest.from_json(_changed(manifest, **changes), "here.json")
    assert str(caught.value).startswith(("here.json", "reward_manifest.json"))


@pytest.mark.parametrize(
    "change", [{"std": -1.0}, {"n": 1}, {"mean": None}, {"quantiles": [0.0]}, {"quantiles": "desc"}]
)
def test_impossible_reference_is_refused(manifest: RewardManifest, change: dict[str, Any]) -> None:
    assert manifest.reference is not None
    reference = {**vars(manifest.reference), **change}
    if change.get("quantiles") == "desc":
        reference["quantiles"] = manifest.reference.quantiles[::-1]
    with pytest.raises(ModelError, match="reference"):
        RewardManifest.from_json(_changed(manifest, reference=reference))


def test_not_json(tmp_path: Path) -> None:
    for text, message in (("{", "no valid JSON"), ("[]", "holds a list")):
        (tmp_path / "reward_manifest.json").write_text(text)
        with pytest.raises(ModelError, match=message):
            RewardManifest.load(tmp_path)
    with pytest.raises(ModelError, match="no such file"):
        RewardManifest.load(tmp_path / "other.json")


# ---------------------------------------------------------------------- reference statistics


def test_reference_against_scipy() -> None:
    sample = np.random.default_rng(1).normal(-1, 4, 20_000)
    reference = ReferenceStats.from_scores(sample, "normal")
    probe = np.array([-9.0, -1.0, 0.5, 6.0, np.nan])
    np.testing.assert_allclose(reference.centered(probe), probe - sample.mean())
    np.testing.assert_allclose(reference.z(probe), (probe - sample.mean()) / sample.std(ddof=1))
    exact = [stats.percentileofscore(sample, x) for x in probe[:-1]]
    np.testing.assert_allclose(reference.percentile(probe)[:-1], exact, atol=0.3)
    assert np.isnan(reference.percentile(probe)[-1])
    assert reference.percentile([-1e9, 1e9]).tolist() == [0.0, 100.0]


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.integers(2, 40), elements=st.floats(-5, 5).map(lambda x: round(x, 1))))
def test_percentile_grows_with_the_score(scores: np.ndarray) -> None:
    reference = ReferenceStats.from_scores(scores, "x")
    grid = np.sort(np.concatenate([scores, np.linspace(-6, 6, 25)]))
    percent = reference.percentile(grid)
    assert (np.diff(percent) >= -1e-9).all()
    assert ((percent >= 0) & (percent <= 100)).all()
    assert np.isfinite(reference.z(grid)).all()


def test_ties_and_constants() -> None:
    reference = ReferenceStats.from_scores([0.0] * 50 + [1.0] * 50, "coin")
    assert reference.percentile([0.0, 1.0]) == pytest.approx([25, 75], abs=1)
    constant = ReferenceStats.from_scores([2.0] * 5, "constant")
    assert constant.percentile([1.0, 2.0, 3.0]).tolist() == [0.0, 50.0, 100.0]
    assert constant.z([1.0, 2.0]).tolist() == [0.0, 0.0]
    assert np.isnan(constant.z([np.nan]))[0]


def test_reference_refuses_too_little() -> None:
    with pytest.raises(DataError, match="has 1 scores"):
        ReferenceStats.from_scores([1.0], "x")
    with pytest.raises(DataError, match="1 of the 3"):
        ReferenceStats.from_scores([1.0, np.nan, 2.0], "x")
