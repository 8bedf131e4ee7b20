"""``companion score`` and ``companion evaluate`` for outcome and process models, and rankings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, roc_auc_score

from companion import (
    RewardManifest,
    evaluate_rankings,
    evaluate_tokens,
    load_base,
    save_reward_model,
)
from companion.cli.main import main
from companion.errors import DataError
from companion.models import TokenReadout
from companion.scoring import (
    RewardScorer,
    TokenScorer,
    load_scorer,
    model_kind,
    score_file,
)

SEPARATOR = " so "
READOUTS = {
    "outcome": TokenReadout("outcome", 1, "last"),
    "process": TokenReadout("process", 3, "min", separator=SEPARATOR, threshold=0.5),
    "binary": TokenReadout("process", 1, "min", separator=SEPARATOR, threshold=0.5),
}
WORDS = ("right", "wrong", "hello", "good", "bad", "3")


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One saved model of each kind, with a random head."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "model"
            readout = READOUTS[kind]
            base = load_base(tiny_base, labels=readout.labels, head_std=0.1)
            save_reward_model(base, made[kind], RewardManifest(readout=readout.to_dict()))
        return made[kind]

    return make


def solution(i: int) -> dict[str, Any]:
    steps = [f"{WORDS[(i + k) % 6]} {WORDS[(2 * i + k) % 5]}" for k in range(1 + i % 4)]
    return {"id": f"s{i}", "prompt": f"Ana has {i % 20} pens", "completions": steps}


def in_one_piece(i: int) -> dict[str, Any]:
    row = solution(i)
    return {"completion": SEPARATOR.join(row.pop("completions")), **row}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(model: Path, source: Path, output: Path, *more: str) -> int:
    paths = ["--model", str(model), "--input", str(source), "--output", str(output)]
    return main(["score", *paths, "--device", "cpu", *more])


# ---------------------------------------------------------------------- score


def test_the_manifest_says_which_scorer(folders: Any, tiny_reward: Path) -> None:
    assert [model_kind(folders(k)) for k in ("outcome", "process")] == ["outcome", "process"]
    assert isinstance(load_scorer(folders("outcome"), device="cpu"), TokenScorer)
    assert model_kind(tiny_reward) == "scalar"
    assert isinstance(load_scorer(tiny_reward, device="cpu"), RewardScorer)


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_score_writes_the_values_behind_the_score(
    folders: Any, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [in_one_piece(i) for i in range(11)]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert score(folders(kind), source, output, "--chunk_rows", "4") == 0
    written = read(output)
    assert [r["id"] for r in written] == [r["id"] for r in rows]
    scores = TokenScorer.from_pretrained(folders(kind), device="cpu").score(rows)
    name = "token_scores" if kind == "outcome" else "step_scores"
    for i, record in enumerate(written):
        np.testing.assert_allclose(record[name], scores.values[i], atol=1e-6)
        picked = record[name][-1] if kind == "outcome" else min(record[name])
        assert record["score"] == pytest.approx(picked)
        if kind == "process":
            assert len(record["step_scores"]) == 1 + i % 4
            np.testing.assert_allclose(record["step_wrong"], scores.wrong[i], atol=1e-6)
            above = [k for k, wrong in enumerate(record["step_wrong"]) if wrong > 0.5]
            assert record["first_error"] == (above[0] if above else None)
    if kind == "process":
        assert {type(r["first_error"]) for r in written} == {int, type(None)}
    # a second run has nothing to do; a torn output goes on
    before = output.read_bytes()
    output.write_bytes(b"".join(before.splitlines(keepends=True)[:5]) + b'{"index": 5')
    assert score(folders(kind), source, output, "--chunk_rows", "4") == 0
    assert "5 done before, 6 scored now" in capsys.readouterr().err
    again = read(output)
    assert [r["id"] for r in again] == [r["id"] for r in rows]
    for one, other in zip(written, again, strict=True):
        np.testing.assert_allclose(one[name], other[name], atol=1e-6)


def test_another_readout_is_another_run(folders: Any, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", [in_one_piece(3)]), tmp_path / "out.jsonl"
    score_file(TokenScorer.from_pretrained(folders("outcome"), device="cpu"), source, output)
    mean = TokenScorer.from_pretrained(folders("outcome"), device="cpu", aggregation="mean")
    with pytest.raises(DataError, match="begun with another readout"):
        score_file(mean, source, output)


def test_all_forms_of_a_solution_have_one_score(folders: Any) -> None:
    row = in_one_piece(3)
    prompt = {"role": "user", "content": row["prompt"]}
    answer = {"role": "assistant", "content": row["completion"]}
    forms = [
        row,
        {"prompt": [prompt], "completion": [answer]},
        {"messages": [prompt, answer]},
        [prompt, answer],
    ]
    for kind in ("outcome", "process"):
        scorer = TokenScorer.from_pretrained(folders(kind), device="cpu")
        raw = scorer.score(forms).raw
        np.testing.assert_allclose(raw, raw[0], atol=1e-6)
        renamed = [{"prompt": row["prompt"], "answer": row["completion"]}]
        assert scorer.score(renamed, field="answer").raw[0] == pytest.approx(raw[0], abs=1e-6)
        cut = [{**row, "terminated": False}]
        assert scorer.score([row], terminated=False).raw == pytest.approx(scorer.score(cut).raw)
        assert abs(scorer.score(cut).raw[0] - raw[0]) > 1e-6
    # what follows the steps is no step, and closes the last one by the separator
    going_on = [{**solution(3), "rest": ["and 4"]}, {**solution(3), "terminated": False}]
    first, second = scorer.score(going_on).raw
    assert first == second


def test_rows_that_cannot_be_scored_are_named(
    folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        in_one_piece(0),
        {"prompt": "Ana", "completion": ""},
        {"text": "Ana has 3 pens"},
        {"prompt": "Ana", "completions": ["a", 3]},
        {"prompt": "Ana"},
        {**in_one_piece(1), "terminated": "no"},
        {"prompt": "Ana", "completion": "good " * 60},
    ]
    source = write(tmp_path / "in.jsonl", rows)
    for kind in ("outcome", "process"):
        output = tmp_path / f"{kind}.jsonl"
        assert score(folders(kind), source, output) == 2
        assert "in.jsonl line 2" in capsys.readouterr().err
        more = ("--on_error", "skip", "--overwrite", "--max_length", "50")
        assert score(folders(kind), source, output, *more) == 0
        written = read(output)
        assert [r["score"] is None for r in written] == [False] + [True] * 6
        assert "no prompt, so nothing says" in written[2]["error"]
        assert "'terminated' is 'no'" in written[5]["error"]
        assert written[6]["error"] == "longer than max_length=50 tokens"
    assert "is no list of texts" in written[3]["error"]
    assert "neither 'completions' nor" in written[4]["error"]


# ---------------------------------------------------------------------- evaluate


def evaluate(model: Path, data: Path, *more: str) -> int:
    return main(["evaluate", "--model", str(model), "--dataset_name", str(data), *more])


def test_evaluate_an_outcome_model(
    folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {**in_one_piece(i), "label": i % 3 > 0, "correct": i % 3 > 0 or i == 0} for i in range(40)
    ]
    rows.append({"prompt": "Ana", "completion": "good " * 60, "label": True, "correct": True})
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.json"
    more = ("--device", "cpu", "--max_length", "50", "--json", str(out))
    assert evaluate(folders("outcome"), data, *more) == 0
    captured = capsys.readouterr()
    assert "AUC by aggregation" in captured.out
    assert "dropped 1 of 41 outcomes: longer than max_length=50 tokens" in captured.err
    saved = json.loads(out.read_text())
    found = saved["metrics"]
    assert saved["info"]["rows"] == "outcomes"
    # by scikit-learn, from the scorer's numbers
    scorer = TokenScorer.from_pretrained(folders("outcome"), device="cpu")
    scores, labels = scorer.score(rows[:40]), [row["label"] for row in rows[:40]]
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores.raw))
    assert found["brier"] == pytest.approx(brier_score_loss(labels, scores.raw))
    for how, reduce in (("mean", np.mean), ("min", np.min), ("product", np.prod)):
        by = [reduce(values) for values in scores.values]
        assert found["auc_by_aggregation"][how] == pytest.approx(roc_auc_score(labels, by))
    length = roc_auc_score(labels, scores.n_tokens)
    assert found["length_auc"] == pytest.approx(max(length, 1 - length))
    assert found["majority"] == pytest.approx(np.mean(labels))
    assert found["limit_auc"] == pytest.approx(
        roc_auc_score(labels, [row["correct"] for row in rows[:40]])
    )
    for name in ("auc", "accuracy", "brier"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high
    assert (found["n"], found["n_rows"], found["n_prompts"]) == (40, 41, 20)


@pytest.mark.parametrize("kind", ["process", "binary"])
def test_evaluate_a_process_model(
    folders: Any, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = itertools.cycle([1, 1, -1, 0, 1, None, 1])
    rows = []
    for i in range(30):
        row = solution(i)
        labels = [next(choices) for _ in row["completions"]]
        rows.append({**row, "labels": labels, "true_labels": [x or 1 for x in labels]})
    rows.append({**solution(2), "labels": [None] * 3, "true_labels": [1] * 3})
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.json"
    assert evaluate(folders(kind), data, "--device", "cpu", "--json", str(out)) == 0
    captured = capsys.readouterr()
    assert "first-error F1" in captured.out
    assert "steps: no step has a label" in captured.err
    found = json.loads(out.read_text())["metrics"]
    # by hand, from what `companion score` writes
    assert score(folders(kind), data, tmp_path / "scores.jsonl") == 0
    wrong, bad, named, passed = [], [], [], []
    threshold = READOUTS[kind].threshold
    for row, record in zip(rows, read(tmp_path / "scores.jsonl"), strict=True):
        pairs = [
            (p, label == -1)
            for p, label in zip(record["step_wrong"], row["labels"], strict=True)
            if label is not None
        ]
        if not pairs:
            continue
        wrong += [p for p, _ in pairs]
        bad += [b for _, b in pairs]
        first = next((k for k, (_, b) in enumerate(pairs) if b), None)
        guess = next((k for k, (p, _) in enumerate(pairs) if p > threshold), None)
        (named if first is not None else passed).append(guess == first)
    both = [float(np.mean(named)), float(np.mean(passed))]
    f1 = 0.0 if not sum(both) else 2 * both[0] * both[1] / sum(both)
    assert found["first_error"]["first_error_f1"] == pytest.approx(f1)
    assert found["wrong_auc"] == pytest.approx(roc_auc_score(bad, wrong))
    assert found["brier"] == pytest.approx(brier_score_loss(bad, wrong))
    assert found["n_steps"] == len(bad)
    assert found["limit_f1"] == 1.0
    low, high = found["first_error_interval"]
    assert low <= f1 <= high
    assert 0.5 <= found["position_auc"] <= 1


def test_soft_labels_are_evaluated_by_their_half(folders: Any) -> None:
    rows = [
        {**solution(i), "labels": [(7 * i + k) % 10 / 10 for k in range(1 + i % 4)]}
        for i in range(20)
    ]
    hard = [{**row, "labels": [1 if x > 0.5 else -1 for x in row["labels"]]} for row in rows]
    scorer = TokenScorer.from_pretrained(folders("binary"), device="cpu")
    assert evaluate_tokens(scorer, rows).metrics == evaluate_tokens(scorer, hard).metrics
    three = TokenScorer.from_pretrained(folders("process"), device="cpu")
    with pytest.raises(DataError, match=r"row 0, labels\[0\]"):
        evaluate_tokens(three, [{**rows[0], "labels": [0.3]}])


def test_evaluate_refuses_what_does_not_fit(
    folders: Any, tiny_reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    outcomes = write(tmp_path / "outcomes.jsonl", [{**in_one_piece(1), "label": True}])
    report = ("--report", str(tmp_path / "report.html"))
    for arguments, message in (
        ((folders("outcome"), pairs), "do not fit outcomes"),
        ((tiny_reward, outcomes), "holds outcomes, but"),
        ((folders("outcome"), outcomes, *report), "no HTML report for a model of the kind outcome"),
        ((folders("process"), outcomes), "do not fit steps"),
    ):
        assert evaluate(*arguments) == 2
        assert message in capsys.readouterr().err
    scorer = TokenScorer.from_pretrained(folders("outcome"), device="cpu")
    with pytest.raises(DataError, match="no outcomes"):
        evaluate_tokens(scorer, [])
    with pytest.raises(DataError, match="row 0, field 'label'"):
        evaluate_tokens(scorer, [in_one_piece(1)])


# ---------------------------------------------------------------------- rankings


def rankings(n: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(n):
        size = 3 + i % 3
        texts = [f"the answer is {WORDS[(i + k) % 6]} {k}" for k in range(size)]
        ranks: list[Any] = (torch.randperm(size, generator=generator) + 1).tolist()
        if i % 4 == 2:
            ranks[0] = None
        if i % 4 == 1:
            ranks[-1] = ranks[0]
        rewards = [-float(r or 9) for r in ranks]
        rows.append(
            {"prompt": f"Ana has {i}", "completions": texts, "ranks": ranks, "rewards": rewards}
        )
    return rows


def test_evaluate_on_rankings_is_evaluate_on_their_pairs(
    tiny_reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from companion import evaluate_pairs, load_rows

    data, out = write(tmp_path / "rankings.jsonl", rankings(14)), tmp_path / "out.json"
    report = tmp_path / "report.html"
    more = ("--device", "cpu", "--json", str(out), "--report", str(report))
    assert evaluate(tiny_reward, data, *more) == 0
    assert "best of a ranking picked" in capsys.readouterr().out
    assert "<svg" in report.read_text()
    found = json.loads(out.read_text())["metrics"]
    scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu")
    expected = evaluate_pairs(scorer, load_rows(data, kind="pairs")).metrics
    picks = found.pop("rankings")
    assert set(found) == set(expected)
    for name in ("n", "n_prompts", "accuracy", "ties"):
        assert found[name] == expected[name]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert found["limit"]["rows"]["loss"] == pytest.approx(expected["limit"]["rows"]["loss"])

    best, lot = [], []
    for row in rankings(14):
        kept = [k for k, rank in enumerate(row["ranks"]) if rank is not None]
        texts = [{"prompt": row["prompt"], "completion": row["completions"][k]} for k in kept]
        ranks = [row["ranks"][k] for k in kept]
        best.append(ranks[int(scorer.score(texts).raw.argmax())] == min(ranks))
        lot.append(ranks.count(min(ranks)) / len(ranks))
    assert picks["best_is_best"] == pytest.approx(np.mean(best))
    assert picks["random"] == pytest.approx(np.mean(lot))
    assert picks["limit"] == 1.0
    assert picks["interval"][0] < picks["best_is_best"] < picks["interval"][1]


def test_rankings_that_cannot_be_scored_are_counted(tiny_reward: Path) -> None:
    scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu", max_length=30)
    rows = rankings(5)
    rows[2]["completions"][1] = "good " * 60
    result = evaluate_rankings(scorer, rows)
    assert result.metrics["rankings"]["n"] == 4
    assert result.metrics["rankings"]["dropped"] == 1
    assert result.metrics["dropped"]["reasons"] == {
        "longer than max_length=30 tokens": result.metrics["dropped"]["total"]
    }
    assert result.metrics["dropped"]["total"] > 0
    with pytest.raises(DataError, match="no ranking"):
        evaluate_rankings(scorer, [])
    tied = [{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 1]}]
    with pytest.raises(DataError, match="ranked above"):
        evaluate_rankings(scorer, tied)
