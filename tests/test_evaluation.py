"""Evaluating a scorer on rows, its tables, and ``companion evaluate``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from companion.cli.main import main
from companion.errors import DataError
from companion.evaluation import (
    PairEvaluation,
    evaluate_pairs,
    format_table,
    gold_probability,
    pairwise_metrics,
    subset_rows,
    summary_rows,
)


class FakeScorer:
    """Scores a text by a table; what is not in it cannot be scored."""

    def __init__(self, table: Mapping[str, float], temperature: float | None = None) -> None:
        self.table = table
        self.manifest = SimpleNamespace(temperature=temperature)

    def score_pairs(self, rows: Sequence[Mapping[str, Any]], **_: Any) -> Any:
        kept = [row["chosen"] in self.table and row["rejected"] in self.table for row in rows]
        sides = {
            side: np.array(
                [self.table[r[side]] if k else np.nan for r, k in zip(rows, kept, strict=True)]
            )
            for side in ("chosen", "rejected")
        }
        return SimpleNamespace(
            **sides,
            chosen_tokens=np.array([len(r["chosen"]) for r in rows]),
            rejected_tokens=np.array([len(r["rejected"]) for r in rows]),
            reasons=[None if k else "too long" for k in kept],
        )


ROWS = [
    {"prompt": "p", "chosen": "good", "rejected": "bad", "subset": "a", "probability": 0.9},
    {"prompt": "p", "chosen": "bad", "rejected": "good", "subset": "a", "probability": 0.1},
    {"prompt": "q", "chosen": "good", "rejected": "poor", "subset": "b", "probability": 0.7},
    {"prompt": "r", "chosen": "unknown", "rejected": "bad", "subset": "b", "probability": 0.5},
]
TABLE = {"good": 1.0, "poor": 0.5, "bad": -1.0}


@pytest.fixture
def result() -> PairEvaluation:
    return evaluate_pairs(FakeScorer(TABLE, temperature=2.0), ROWS, info={"model": "m"})


def test_evaluation_is_the_metrics_of_the_scores(result: PairEvaluation) -> None:
    want = pairwise_metrics(
        [1.0, -1.0, 1.0, math.nan],
        [-1.0, 1.0, 0.5, math.nan],
        chosen_lengths=[4, 3, 4, 7],
        rejected_lengths=[3, 4, 4, 3],
        subsets=["a", "a", "b", "b"],
        groups=["p", "p", "q", "r"],
        probability=[0.9, 0.1, 0.7, 0.5],
        reasons=[None, None, None, "too long"],
        temperature=2.0,
    )
    assert result.metrics == want
    assert result.metrics["n_prompts"] == 2
    assert result.metrics["at_temperature"]["temperature"] == 2.0
    assert result.metrics["dropped"] == {"total": 1, "reasons": {"too long": 1}}
    assert result.info["limit_from"] == "probability"
    assert np.isnan(result.margins[3])


def test_the_given_temperature_stands_above_the_manifests() -> None:
    scorer = FakeScorer(TABLE, temperature=2.0)
    assert evaluate_pairs(scorer, ROWS, temperature=3.0).metrics["at_temperature"][
        "temperature"
    ] == pytest.approx(3.0)
    none = evaluate_pairs(FakeScorer(TABLE), ROWS).metrics
    assert none["at_temperature"] is None


def test_rows_without_subset_or_truth() -> None:
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in ROWS[:3]]
    got = evaluate_pairs(FakeScorer(TABLE), rows)
    assert got.metrics["subsets"] == {}
    assert got.metrics["limit"] is None
    assert got.probability is None
    some = [*rows, {**rows[0], "subset": "s"}]
    assert set(evaluate_pairs(FakeScorer(TABLE), some).metrics["subsets"]) == {"(none)", "s"}


def test_gold_probability() -> None:
    p, source = gold_probability([{"reward_chosen": 2.0, "reward_rejected": 0.5}])
    assert source == "reward_chosen - reward_rejected"
    assert p is not None
    assert p.tolist() == pytest.approx([1 / (1 + math.exp(-1.5))])
    # the probability, which knows of label noise, stands above the rewards
    both = [{"probability": 0.6, "reward_chosen": 2.0, "reward_rejected": 0.5}]
    assert gold_probability(both)[0] == pytest.approx([0.6])
    assert gold_probability([{"chosen": "a"}]) == (None, None)
    assert gold_probability([]) == (None, None)
    for bad in ({"probability": None}, {"probability": math.nan}, {}):
        with pytest.raises(DataError, match="row 1"):
            gold_probability([{"probability": 0.6}, bad])
    with pytest.raises(DataError, match="row 1"):
        gold_probability([{"probability": 0.6}, {"probability": 1.6}])


def test_nothing_to_evaluate() -> None:
    with pytest.raises(DataError, match="no pair"):
        evaluate_pairs(FakeScorer(TABLE), [])
    with pytest.raises(DataError, match="too long"):
        evaluate_pairs(FakeScorer({}), ROWS)


def test_json_is_strict_and_complete(result: PairEvaluation, tmp_path: Path) -> None:
    result.info["odd"] = math.inf
    path = result.save(tmp_path / "new" / "out.json")
    loaded = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert loaded["metrics"] == result.metrics
    assert loaded["info"]["odd"] is None
    assert loaded["info"]["model"] == "m"


def test_tables(result: PairEvaluation) -> None:
    rows = {name: (ours, limit) for name, ours, limit in summary_rows(result.metrics)}
    assert rows["pairs scored"][0] == "3 (2 prompts)"
    assert rows["rows dropped"][0] == "1"
    assert rows["accuracy [95%]"][0].startswith("66.7% [")
    assert rows["accuracy [95%]"][1] == "66.7%"
    assert "loss at T = 2.00" in rows
    head, *body = subset_rows(result.metrics)
    assert [row[0] for row in body] == ["a", "b"]
    assert all(len(row) == len(head) for row in body)
    text = result.table()
    assert "longer wins" in text
    assert "both" not in text
    # the limit is what the figures say it is
    other = {"rows": {"accuracy": 0.123, "loss": 0.5, "brier": 0.1}}
    assert ("accuracy [95%]", rows["accuracy [95%]"][0], "12.3%") in summary_rows(
        result.metrics | {"limit": other}
    )
    no_limit = summary_rows(
        evaluate_pairs(FakeScorer(TABLE), [ROWS[0] | {"probability": None}]).metrics
    )
    assert {row[0]: row[2] for row in no_limit}["accuracy [95%]"] == "–"


def test_format_table_aligns() -> None:
    lines = format_table(("a", "bb"), [("xyz", "1"), ("x", "22222")]).splitlines()
    assert lines[0] == "a       bb"
    assert lines[2:] == ["xyz      1", "x    22222"]


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    texts = ["yes", "no", "Ana has 3 boxes", "the answer is 5", "good", "bad thanks"]
    with path.open("w") as file:
        for number in range(12):
            prompt = [{"role": "user", "content": f"how many pens {number}"}]
            sides = {
                side: [{"role": "assistant", "content": texts[(number + shift) % len(texts)]}]
                for side, shift in (("chosen", 0), ("rejected", 1))
            }
            row = {"prompt": prompt, **sides, "subset": "ab"[number % 2], "probability": 0.75}
            file.write(json.dumps(row) + "\n")
    return path


def test_command(
    tiny_reward: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "deep" / "out.json", tmp_path / "report.html"
    arguments = ["--model", str(tiny_reward), "--dataset_name", str(pairs_file), "--device", "cpu"]
    code = main(["evaluate", *arguments, "--json", str(out), "--report", str(report)])
    assert code == 0
    printed = capsys.readouterr().out
    assert "accuracy [95%]" in printed
    assert "subset" in printed
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics["n"] == 12
    assert set(metrics["subsets"]) == {"a", "b"}
    assert metrics["limit"]["expected"]["accuracy"] == 0.75

    # the figures are those of the scorer's scores
    from companion import RewardScorer

    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    scores = RewardScorer.from_pretrained(tiny_reward, device="cpu").score_pairs(rows)
    gap = scores.chosen - scores.rejected
    assert metrics["accuracy"] == pytest.approx((gap > 0).mean())
    assert metrics["loss"] == pytest.approx(np.logaddexp(0, -gap).mean())
    assert "<svg" in report.read_text()

    assert main(["evaluate", *arguments, "--limit", "5"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"pairs scored +5 ", printed)


def test_bad_rows_are_skipped_counted_and_named(
    tiny_reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(role: str, text: str, **more: Any) -> list[dict[str, Any]]:
        return [{"role": role, "content": text, **more}]

    rows = [
        {
            "prompt": said("user", f"Ana has {i}"),
            "chosen": said("assistant", "boxes"),
            "rejected": said("assistant", "no"),
        }
        for i in range(6)
    ]
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"x": "boxes"}}}]
    unwritten = rows[0] | {"chosen": said("assistant", "", tool_calls=calls)}
    bad = [
        json.dumps(unwritten),  # (the template leaves it out)
        json.dumps(rows[1] | {"chosen": None}),
        json.dumps(rows[1])[:-1] + ', "id": NaN}',
        json.dumps(rows[1])[:-1] + ', "id": ' + "9" * 5000 + "}",
        json.dumps(rows[1] | {"extra": "\ud800"}),
        "{",
    ]
    good = [json.dumps(row) for row in rows]
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    mixed = [line for two in zip(good, bad, strict=True) for line in two]
    (tmp_path / "mixed.jsonl").write_text("\n".join(mixed))
    found = {}
    for name, more in (("good", []), ("mixed", ["--on_error", "skip"])):
        data = ["--dataset_name", str(tmp_path / f"{name}.jsonl"), "--device", "cpu"]
        out = ["--json", str(tmp_path / f"{name}.json")]
        assert main(["evaluate", "--model", str(tiny_reward), *data, *out, *more]) == 0
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    want, got = (found[name]["metrics"] for name in ("good", "mixed"))
    assert (got["n"], got["accuracy"], got["loss"]) == (6, want["accuracy"], want["loss"])
    assert found["mixed"]["info"]["skipped"] == {"null": 1, "malformed JSON": 4}
    assert "1 of 7 pairs: row 1, 'chosen': the chat template leaves out" in capsys.readouterr().err
    data = ["--dataset_name", str(tmp_path / "mixed.jsonl"), "--device", "cpu"]
    assert main(["evaluate", "--model", str(tiny_reward), *data]) == 2
    assert "5 of 12 rows cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["scores", "several"])
def test_answers_with_scores_and_several_sides_are_evaluated(
    kind: str, tiny_reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"Ana {i}", "response": text, "score": score}
        for i in range(3)
        for text, score in (("boxes", 1), ("no", 0), ("3", 0))
    ]
    if kind == "several":
        sides = {"chosen": ["boxes"], "rejected": ["no", "3"]}
        rows = [{"prompt": f"Ana {i}", **sides} for i in range(3)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--dataset_name", str(path), "--device", "cpu"]
    assert main(["evaluate", "--model", str(tiny_reward), *data]) == 0
    assert re.search(r"pairs scored +6 ", capsys.readouterr().out)


def test_command_refuses(
    tiny_reward: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ["--model", str(tiny_reward), "--dataset_name", str(pairs_file), "--device", "cpu"]
    for arguments, word in (
        ([*good[:2], "--dataset_name", str(tmp_path / "missing.jsonl")], "missing.jsonl"),
        (["--model", str(tmp_path / "nowhere"), *good[2:]], "nowhere"),
        ([*good, "--json", str(tmp_path)], "is a folder"),
        ([*good, "--json", str(pairs_file / "x.json")], "cannot write"),
        ([*good, "--limit", "0"], "limit"),
        ([*good, "--max_length", "2"], "none of the 12 pairs"),
    ):
        assert main(["evaluate", *arguments]) == 2, arguments
        assert word in capsys.readouterr().err
