"""What runs on a scorer here runs on one over HTTP, and gives the figures of the one here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from companion import evaluate_pairs, evaluate_rankings, evaluate_tokens, rank_file
from companion.errors import DataError, ServiceError
from companion.models import (
    ReferenceStats,
    RewardManifest,
    TokenReadout,
    load_base,
    load_reward_model,
    save_reward_model,
)
from companion.scoring import (
    RemoteScorer,
    RewardScorer,
    TokenScores,
    load_scorer,
    score_file,
)
from companion.tutor import make_rows

pytestmark = pytest.mark.serving
TUTOR = Path(__file__).parents[2] / "companion" / "assets" / "tutor-base"
READOUTS = {
    "outcome": TokenReadout("outcome", 1, "mean"),
    "process": TokenReadout("process", 3, "min", separator="\n", threshold=0.4),
}
#: kind of rows -> what measures a model on them
MEASURES = {
    "pairs": evaluate_pairs,
    "canaries": evaluate_pairs,
    "rankings": evaluate_rankings,
    "outcomes": evaluate_tokens,
    "steps": evaluate_tokens,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of each kind on the tutor's base, with a random head."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            readout = READOUTS.get(kind)
            base = load_base(TUTOR, labels=None if readout is None else readout.labels)
            manifest = RewardManifest(temperature=2.0)
            manifest.reference = ReferenceStats.from_scores(np.linspace(-3, 3, 101), "a grid")
            base.readout = readout or base.readout
            made[kind] = tmp_path_factory.mktemp(kind)
            save_reward_model(base, made[kind], manifest)
        return made[kind]

    return get


def kind_of(rows: str) -> str:
    return {"outcomes": "outcome", "steps": "process"}.get(rows, "scalar")


@pytest.mark.parametrize(
    ("rows", "protocol"),
    [
        *(("pairs", "classify"), ("canaries", "companion"), ("rankings", "classify")),
        *(("outcomes", "companion"), ("steps", "companion")),
    ],
)
def test_an_evaluation_over_http_is_the_one_here(
    rows: str, protocol: Any, models: Any, serve: Any
) -> None:
    folder = models(kind_of(rows))
    here = load_scorer(folder, device="cpu")
    service = serve(load_scorer(folder, device="cpu"))
    there = RemoteScorer.from_pretrained(service.url, folder, protocol=protocol, batch_size=1000)
    data = make_rows(rows, 24, seed=5)
    done: list[int] = []
    found = MEASURES[rows](there, data, progress=done.append)
    expected = MEASURES[rows](here, data)
    assert found.metrics == expected.metrics
    assert sum(done) == there.counts["texts"] > 0
    assert there.counts["requests"] == 1
    # however the texts are cut into requests
    few = RemoteScorer.from_pretrained(service.url, folder, protocol=protocol, batch_size=7)
    again = MEASURES[rows](few, data)
    close(again.metrics, expected.metrics)


def close(found: Any, expected: Any) -> None:
    """Equal, numbers within 1e-6."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            close(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-6)
    else:
        assert found == expected


@pytest.mark.parametrize("kind", ["scalar", "outcome", "process"])
def test_scores_over_http_are_the_ones_here(kind: str, models: Any, serve: Any) -> None:
    folder = models(kind)
    here = load_scorer(folder, device="cpu")
    service = serve(load_scorer(folder, device="cpu"))
    there = RemoteScorer.from_pretrained(service.url, folder, protocol="companion")
    pairs = make_rows("pairs", 9, seed=5)
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs]
    rows.append({**rows[0], "terminated": False})
    rows.append({"prompt": rows[0]["prompt"], "completion": ""})
    rows.append({"prompt": rows[0]["prompt"], "completion": "3 " * 9000})
    one, other = here.score(rows, on_error="skip"), there.score(rows, on_error="skip")
    np.testing.assert_array_equal(one.raw, other.raw)
    np.testing.assert_array_equal(one.z, other.z)
    np.testing.assert_array_equal(one.n_tokens, other.n_tokens)
    assert one.reasons == other.reasons
    assert other.n_dropped == 2
    assert [one.record(i) for i in range(9)] == [other.record(i) for i in range(9)]
    assert isinstance(other, TokenScores) == (kind != "scalar")
    np.testing.assert_array_equal(here.score_pairs(pairs).chosen, there.score_pairs(pairs).chosen)
    np.testing.assert_allclose(there.score_pairs(pairs).chosen, one.raw[:9], atol=1e-6)
    for name in ("reference", "manifest", "readout", "max_positions", "notes"):
        assert getattr(here, name) == getattr(there, name)
    assert there.tokenizer is there.formatter.tokenizer


def test_files_are_scored_and_ranked_over_http(models: Any, serve: Any, tmp_path: Path) -> None:
    folder = models("scalar")
    here = RewardScorer.from_pretrained(folder, device="cpu")
    there = RemoteScorer.from_pretrained(serve(here).url, folder)
    source = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]}
        for row in make_rows("pairs", 20, seed=5)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(
            json.dumps({"prompt": row["prompt"], "completion": row["completions"][0]}) + "\n"
            for row in rows
        )
    )
    written = {}
    for name, scorer in (("here", here), ("there", there)):
        ranks = tmp_path / f"{name}.ranks.jsonl"
        report = rank_file(scorer, source, tmp_path / f"{name}.jsonl", ranks_path=ranks)
        assert report.best == 20
        scored = tmp_path / f"{name}.scores.jsonl"
        score_file(scorer, texts, scored)
        written[name] = [
            [json.loads(line) for line in file.read_text().splitlines()]
            for file in (tmp_path / f"{name}.jsonl", ranks, scored)
        ]
    close(written["there"], written["here"])
    # a run goes on with the same model only
    assert score_file(there, texts, tmp_path / "there.scores.jsonl").scored == 0
    with pytest.raises(DataError, match="begun with another model"):
        score_file(here, texts, tmp_path / "there.scores.jsonl")


@pytest.mark.parametrize("kind", ["scalar", "process"])
def test_a_reward_function_over_http(kind: str, models: Any, serve: Any) -> None:
    here = load_scorer(models(kind), device="cpu")
    service = serve(load_scorer(models(kind), device="cpu"))
    there = RemoteScorer.from_pretrained(service.url, models(kind), protocol="companion")
    rows = make_rows("pairs", 6, seed=5)
    asked = {
        "prompts": [row["prompt"] for row in rows],
        "completions": [row["chosen"] for row in rows],
    }
    assert there.as_reward_func(transform="z")(**asked) == here.as_reward_func(transform="z")(
        **asked
    )


def test_answers_that_are_no_token_values_are_errors(models: Any, serve: Any) -> None:
    folder = models("process")
    service = serve(load_scorer(folder, device="cpu"))
    with pytest.raises(DataError, match="use protocol='companion'"):
        RemoteScorer.from_pretrained(service.url, folder, protocol="classify")
    there = RemoteScorer.from_pretrained(service.url, folder, protocol="companion")
    rows = make_rows("steps", 2, seed=5)
    for change, message in (
        (lambda a: {"scores": [0.0, 0.0]}, "token values"),
        (lambda a: {"logits": a["logits"][:1]}, "token values"),
        (lambda a: {"logits": [[place[:1] for place in t] for t in a["logits"]]}, "for .* places"),
    ):
        service.change = change
        with pytest.raises(ServiceError, match=message):
            there.score(rows, on_error="skip")
    service.change = lambda a: {"logits": [[[None] * 3 for _ in t] for t in a["logits"]]}
    assert there.score(rows, on_error="skip").reasons == ["a value is not finite"] * 2


def test_a_scorer_without_a_manifest(tiny_reward: Path, serve: Any) -> None:
    scorer = RewardScorer(load_reward_model(tiny_reward))
    there = RemoteScorer(serve(scorer).url, scorer.formatter)
    assert there.manifest is None
    assert there.reference is None
    assert there.readout.kind == "scalar"
    np.testing.assert_array_equal(there.score(["Ana has 3"]).raw, scorer.score(["Ana has 3"]).raw)
