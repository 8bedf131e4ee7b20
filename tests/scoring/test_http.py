"""What runs on a scorer here runs on one over HTTP, and gives the figures of the one here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from companion import evaluate_pairs, evaluate_rankings, evaluate_tokens, rank_file
from companion.cli.main import main
from companion.errors import DataError, ReadoutError, ServiceError
from companion.formatting import Encoded, EncodedSteps
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
PAIRS = make_rows("pairs", 20, seed=5)
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
    # and to however many servers
    other = serve(load_scorer(folder, device="cpu"))
    urls = [service.url, other.url]
    both = RemoteScorer.from_pretrained(urls, folder, protocol=protocol, batch_size=7)
    close(MEASURES[rows](both, data).metrics, expected.metrics)
    assert other.bodies


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


def test_a_file_does_not_go_on_with_another_version(
    models: Any, serve: Any, tmp_path: Path
) -> None:
    service = serve(load_scorer(models("scalar"), device="cpu"))
    source, target = tmp_path / "texts.jsonl", tmp_path / "scores.jsonl"
    rows = [json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) for r in PAIRS]
    source.write_text("\n".join(rows[:5]) + "\n")

    def scorer() -> RemoteScorer:
        return RemoteScorer.from_pretrained(service.url, models("scalar"), protocol="companion")

    assert score_file(scorer(), source, target).scored == 5
    assert score_file(scorer(), source, target).resumed_at == 5
    service.version = "another"
    with pytest.raises(DataError, match="begun with another model"):
        score_file(scorer(), source, target)
    # half-way: nothing of the new version is written
    begun = scorer()
    target.unlink()

    def restart(answer: Any) -> Any:
        service.version = "a third"
        return answer

    service.change = restart
    with pytest.raises(ServiceError, match=r"a third.*another") as caught:
        score_file(begun, source, target, chunk_rows=2)
    assert "new scorer" in str(caught.value)
    assert len(target.read_text().splitlines()) == 2


@pytest.mark.parametrize("kind", ["scalar", "process"])
def test_commands_over_http_write_what_they_write_here(
    kind: str,
    models: Any,
    serve: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = str(models(kind))
    services = [serve(load_scorer(folder, device="cpu")) for _ in range(2)]
    monkeypatch.setenv("SOME_KEY", "secret")
    where = ["--url", services[0].url, "--url", services[1].url, "--protocol", "companion"]
    where += ["--api_key_env", "SOME_KEY"]
    rows = make_rows("steps" if kind == "process" else "pairs", 20, seed=5)
    texts, data = tmp_path / "texts.jsonl", tmp_path / "data.jsonl"
    lines = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
    written = {}
    for name, flags in (("here", ["--device", "cpu"]), ("there", where)):
        target, figures = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"
        score = ["score", "--model", folder, "--input", str(texts), "--output", str(target)]
        score += ["--chunk_rows", "1"]
        assert main([*score, *flags]) == 0
        assert main([*score, *flags]) == 0  # nothing is left to do
        assert "20 done before, 0 scored now" in capsys.readouterr().err
        evaluate = ["evaluate", "--model", folder, "--dataset_name", str(data)]
        assert main([*evaluate, "--json", str(figures), *flags]) == 0
        metrics = json.loads(figures.read_text())["metrics"]
        written[name] = [[json.loads(line) for line in target.read_text().splitlines()], metrics]
        if kind == "scalar":
            ranked = tmp_path / f"{name}.best.jsonl"
            given = tmp_path / "completions.jsonl"
            lines = [
                {"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]]} for r in PAIRS
            ]
            given.write_text("".join(json.dumps(line) + "\n" for line in lines))
            rank = ["rank", "--model", folder, "--input", str(given), "--output", str(ranked)]
            assert main([*rank, *flags]) == 0
            written[name].append([json.loads(line) for line in ranked.read_text().splitlines()])
    close(written["there"], written["here"])
    for service in services:
        assert {headers["Authorization"] for headers in service.headers} == {"Bearer secret"}


@pytest.mark.parametrize("command", ["score", "evaluate", "rank"])
def test_flags_that_are_for_another_place_are_refused(
    command: str, models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(dict(row)) + "\n" for row in PAIRS))
    files = ["--dataset_name", str(data)]
    if command != "evaluate":
        files = ["--input", str(data), "--output", str(tmp_path / "out.jsonl")]
    asked = [command, "--model", str(models("scalar")), *files]
    remote = ["--url", "http://127.0.0.1:9"]
    local = [["--device", "cpu"], ["--dtype", "float32"], ["--max_tokens_per_batch", "9"]]
    if command != "rank":
        local.append(["--packing", "off"])
    if command == "score":
        local.append(["--compile"])
    for flag in local:
        assert main([*asked, *remote, *flag]) == 2
        assert f"{flag[0]} is for a model that is loaded here" in capsys.readouterr().err
    for flag in (["--protocol", "classify"], ["--api_key_env", "X"]):
        assert main([*asked, *flag]) == 2
        assert f"{flag[0]} says something of a server" in capsys.readouterr().err
    assert main([*asked, *remote, "--api_key_env", "NO_SUCH_KEY"]) == 2
    assert "no NO_SUCH_KEY" in capsys.readouterr().err


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
        (lambda a: a | {"rewards": a.pop("results")}, "token values"),
        (lambda a: a | {"results": a["results"][:1]}, "token values"),
        (each(lambda r: {"logits": [place[:1] for place in r["logits"]]}), "for .* places"),
        (each(lambda r: {"logits": r["logits"][:-1]}), "for .* places"),
        (each(lambda r: {"places": [p - 1 for p in r["places"]]}), "other places"),
        (each(lambda r: {"n_tokens": r["n_tokens"] + 1}), "were scored"),
        (each(lambda r: {"logits": [[None] * 3 for _ in r["logits"]]}), "no reason says why"),
    ):
        service.change = change
        with pytest.raises(ServiceError, match=message):
            there.score(rows, on_error="skip")
    service.change = each(lambda r: {"logits": None, "reason": "overflow in layer 3"})
    assert there.score(rows, on_error="skip").reasons == ["overflow in layer 3"] * 2
    with pytest.raises(ReadoutError, match="row 0: overflow in layer 3; 2 such"):
        there.score(rows)
    text = EncodedSteps(Encoded([1, 5, 6], 1, True), [1, 2])
    assert torch.stack(there.logits([text])).isnan().all()  # whoever asks for logits gets logits


def each(change: Any) -> Any:
    """A change to each text's answer."""
    return lambda a: a | {"results": [result | change(result) for result in a["results"]]}


def test_a_scorer_without_a_manifest(tiny_reward: Path, serve: Any) -> None:
    scorer = RewardScorer(load_reward_model(tiny_reward))
    there = RemoteScorer(serve(scorer).url, scorer.formatter)
    assert there.manifest is None
    assert there.reference is None
    assert there.readout.kind == "scalar"
    np.testing.assert_array_equal(there.score(["Ana has 3"]).raw, scorer.score(["Ana has 3"]).raw)
