"""A server in front of an engine: what it lacks is added, and the scores are the engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from companion.errors import ModelError
from companion.models import (
    ReferenceStats,
    RewardManifest,
    load_base,
    load_reward_model,
    save_reward_model,
)
from companion.scoring import RemoteScorer, add_golden_texts, load_scorer
from companion.serving import open_service, running

ROWS: list[dict[str, Any]] = [
    {"prompt": "Say hello.", "completion": "Hello."},
    {"prompt": "Say hello.", "completion": "Hello and", "terminated": False},
    {"prompt": "Count.", "completion": "1 2 3 4 5 6 7 8 9."},
]


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gateway")
    base = load_base(tiny_base)
    base.model.score.weight.data.normal_()
    manifest = RewardManifest(reference=ReferenceStats.from_scores(np.linspace(-2, 2, 50), "test"))
    save_reward_model(base, made, manifest, describe=add_golden_texts)
    return made


def test_the_gateway_gives_the_engines_scores_with_what_the_engine_lacks(folder: Path) -> None:
    here = load_scorer(folder)
    with running(folder) as engine:
        behind = RemoteScorer.from_pretrained(engine.url, folder)
        behind.read_texts(overlong="error")
        with running(behind, name="gateway") as gateway:
            asked = {"items": ROWS, "return": ["raw", "z", "percentile"]}
            answer = httpx2.post(f"{gateway.url}/v1/rewards", json=asked, timeout=60).json()
            there = RemoteScorer.from_pretrained(gateway.url, folder, protocol="companion")
            again = there.score(ROWS)
    scores = here.score(ROWS)
    found = answer["rewards"]
    np.testing.assert_allclose([one["raw"] for one in found], scores.raw, atol=1e-5)
    np.testing.assert_allclose([one["z"] for one in found], scores.z, atol=1e-5)
    np.testing.assert_allclose(again.raw, scores.raw, atol=1e-5)
    assert [bool(one["warnings"]) for one in found] == [False, True, False]
    assert answer["hashes"]["dtype"] == "engine"


def test_an_engine_with_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = load_reward_model(folder)
    other.model.score.weight.data *= 1.5
    other.source = None
    save_reward_model(other, tmp_path / "other")
    with running(tmp_path / "other", allow_unchecked=True) as engine:
        behind = RemoteScorer.from_pretrained(engine.url, folder)
        with pytest.raises(ModelError, match="golden texts do not have the scores"):
            open_service(behind)


def test_a_model_without_golden_texts_is_served_only_after_a_clear_word() -> None:
    scorer = load_scorer(Path(__file__).parents[1] / "assets" / "before_0_2" / "pairwise")
    with pytest.raises(ModelError, match="no golden texts"):
        open_service(scorer)
    service = open_service(scorer, allow_unchecked=True)
    assert any("golden" in note for note in service.notes)
