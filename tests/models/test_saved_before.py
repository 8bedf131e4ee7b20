"""Models that were saved by companion 0.1: the same token ids and scores today.

``tests/assets/before_0_2`` holds what ``companion train`` wrote then (40 steps on the tutor's base)
and, beside each model, what that version gave for some rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from companion import load_reward_model
from companion.scoring import TokenScores, load_scorer

SAVED = Path(__file__).parents[1] / "assets" / "before_0_2"


@pytest.mark.parametrize("kind", ["pairwise", "outcome", "process"])
def test_ids_and_scores_are_as_they_were(kind: str) -> None:
    expected: dict[str, Any] = json.loads((SAVED / kind / "expected.json").read_text("utf-8"))
    scorer = load_scorer(SAVED / kind, device="cpu")
    assert scorer.readout.kind == ("scalar" if kind == "pairwise" else kind)
    sent: list[list[int]] = []
    run = scorer._runner._run

    def spy(ids: Any, *rest: Any) -> Any:
        sent.extend(map(list, ids))
        return run(ids, *rest)

    scorer._runner._run = spy  # type: ignore[method-assign]
    scores = scorer.score(expected["rows"])
    assert sent == expected["input_ids"]
    assert scores.reasons == [None] * len(expected["rows"])
    found, then = scores.raw, np.array(list(map(float, expected["raw"])))
    print(f"{kind}: the scores differ by at most {np.abs(found - then).max():.1e}")
    np.testing.assert_allclose(found, then, atol=1e-5, rtol=0)
    assert np.std(then) > 1e-2
    if isinstance(scores, TokenScores):
        assert scores.places == expected["places"]
        for one, other in zip(scores.logits, expected["logits"], strict=True):
            np.testing.assert_allclose(one, np.array(other, dtype=np.float64), atol=1e-5)
    else:
        np.testing.assert_allclose(scores.z, np.array(list(map(float, expected["z"]))), atol=1e-5)


@pytest.mark.parametrize("kind", ["pairwise", "outcome", "process"])
def test_the_manifest_is_written_as_it_was(kind: str, tmp_path: Path) -> None:
    """A model that is loaded and saved again keeps its manifest, but for versions and date."""
    from companion import save_reward_model

    save_reward_model(load_reward_model(SAVED / kind), tmp_path)
    before, after = (
        json.loads((folder / "reward_manifest.json").read_text("utf-8"))
        for folder in (SAVED / kind, tmp_path)
    )
    assert list(before) == list(after)
    for manifest in (before, after):
        del manifest["versions"], manifest["created"]
    assert before == after
    weights = "model.safetensors"
    assert (tmp_path / weights).read_bytes() == (SAVED / kind / weights).read_bytes()
