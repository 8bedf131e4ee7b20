"""Every form that a file can have becomes the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from companion import load_rows, load_rows_with_report, write_rows
from companion.data.messages import parse_transcript
from companion.data.writing import plain_row
from companion.errors import DataError

USER = [{"role": "user", "content": "What is 2 + 2?"}]
GOOD = [{"role": "assistant", "content": "4"}]
BAD = [{"role": "assistant", "content": "5"}]


def rows_of(source: Any, **arguments: Any) -> list[dict[str, Any]]:
    return [plain_row(row) for row in load_rows(source, **arguments)]


# ---------------------------------------------------------------- preferences


def test_conversations_with_an_implicit_prompt() -> None:
    row = {"chosen": USER + GOOD, "rejected": USER + BAD, "id": "x"}
    explicit = {"prompt": USER, "chosen": GOOD, "rejected": BAD, "id": "x"}
    assert rows_of([row]) == [explicit]
    # several shared turns; completions of several turns
    longer = [*USER, *BAD, {"role": "user", "content": "No."}]
    row = {"chosen": longer + GOOD, "rejected": longer + BAD + USER + GOOD}
    (out,) = rows_of([row])
    assert (out["prompt"], out["chosen"], out["rejected"]) == (longer, GOOD, BAD + USER + GOOD)
    # one is the beginning of the other: each keeps a last turn
    row = {"chosen": USER + GOOD + USER + BAD, "rejected": USER + GOOD}
    (out,) = rows_of([row])
    assert out == {"prompt": USER, "chosen": GOOD + USER + BAD, "rejected": GOOD}


def test_a_prompt_that_the_completions_repeat_is_taken_out() -> None:
    whole = {"chosen": USER + GOOD, "rejected": USER + BAD}
    want = {"prompt": USER, "chosen": GOOD, "rejected": BAD}
    assert rows_of([{"prompt": USER, **whole}]) == [want]
    assert rows_of([{"prompt": "What is 2 + 2?", **whole}]) == [want]  # UltraFeedback binarized


def test_text_beside_messages_becomes_a_message() -> None:
    want = {"prompt": USER, "chosen": GOOD, "rejected": BAD}
    row = {"prompt": USER[0]["content"], "chosen": GOOD, "rejected": BAD}
    dataset, report = load_rows_with_report([row])
    assert [plain_row(r) for r in dataset] == [want]
    assert report.notes["prompt text made a user message"] == 1
    assert rows_of([{"prompt": USER, "chosen": "4", "rejected": "5"}]) == [want]
    (out,) = rows_of([{"prompt": USER, "completion": "4", "label": True}], kind="outcomes")
    assert out["completion"] == GOOD


def test_text_without_a_prompt_stays_as_it_is() -> None:
    """A character prefix would cut words: 'bl' of blue and black (the wrong implementation)."""
    from trl.data_utils import extract_prompt

    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    assert rows_of([row]) == [row]
    assert extract_prompt(row)["prompt"] == "The sky is bl"


def test_sharegpt_messages() -> None:
    def share(role: str, text: str) -> dict[str, str]:
        return {"from": role, "value": text}

    user = share("human", "What is 2 + 2?")
    row = {"chosen": [user, share("gpt", "4")], "rejected": [user, share("gpt", "5")]}
    assert rows_of([row]) == [{"prompt": USER, "chosen": GOOD, "rejected": BAD}]


def test_null_keys_of_messages_do_not_reach_the_template(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add"}}
    tool = [
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "name": "add"},
    ]
    rows = [
        {"prompt": USER, "chosen": GOOD, "rejected": BAD},
        {"prompt": tool, "chosen": GOOD, "rejected": BAD},
    ]
    dataset = load_rows(rows)
    assert dataset[0]["prompt"][0]["name"] is None  # what Arrow does
    assert [plain_row(row) for row in dataset] == rows
    path = tmp_path / "x.parquet"
    write_rows(dataset, path)
    assert rows_of(path) == rows


def test_transcripts_of_hh_rlhf() -> None:
    start = "\n\nHuman: Hi: there\n\nAssistant: Hello.\n\nHuman: 2 + 2?\n\nAssistant:"
    want = {
        "prompt": [
            {"role": "user", "content": "Hi: there"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "2 + 2?"},
        ],
        "chosen": GOOD,
        "rejected": BAD,
    }
    assert rows_of([{"chosen": start + " 4", "rejected": start + " 5 "}]) == [want]
    assert rows_of([{"prompt": start, "chosen": " 4", "rejected": " 5"}]) == [want]
    both = {"prompt": start, "chosen": start + " 4", "rejected": start + " 5"}
    assert rows_of([both]) == [want]
    with pytest.raises(DataError, match="field 'rejected': empty completion"):
        load_rows([{"chosen": start + " 4", "rejected": start}])


@given(
    turns=st.lists(
        st.text(alphabet="ab \nHuman:Assistant", min_size=1)
        .map(str.strip)
        .filter(lambda text: text and "Human:" not in text and "Assistant:" not in text),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_transcripts_go_there_and_back(turns: list[str]) -> None:
    names = ("Human", "Assistant")
    text = "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns))
    parsed = parse_transcript(text, "chosen")
    assert [message["content"] for message in parsed] == turns
    assert [m["role"] for m in parsed] == [("user", "assistant")[i % 2] for i in range(len(turns))]


def test_margins() -> None:
    rated = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 5, "score_rejected": 2}
    (out,) = rows_of([rated], margins="ratings")  # Llama 2's example: 5 against 2 is 3
    assert out["margin"] == 3.0
    dataset, report = load_rows_with_report([rated])
    assert "margin" not in dataset.column_names
    assert any("margins='ratings'" in note for note in report.notes)
    (out,) = rows_of([rated | {"margin": 7}])
    assert out["margin"] == 7.0
    assert "margin" not in rows_of([rated | {"margin": 7}], margins="none")[0]
    with pytest.raises(DataError, match="'score_chosen': missing field"):
        load_rows([{"prompt": "p", "chosen": "a", "rejected": "b"}], margins="ratings")
    with pytest.raises(DataError, match="'score_chosen': rating not finite"):
        load_rows([rated | {"score_chosen": float("inf")}], margins="ratings")


def test_columns_are_renamed_and_others_kept(tmp_path: Path) -> None:
    rows = [{"question": "p", "good": "a", "bad": "b", "subset": "s", "probability": 0.7}]
    names = {"question": "prompt", "good": "chosen", "bad": "rejected"}
    want = {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "s", "probability": 0.7}
    for name in ("x.jsonl", "x.csv"):
        write_rows(rows, tmp_path / name)
        assert rows_of(tmp_path / name, columns=names) == [want]
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    write_rows([want], tmp_path / "y.csv")
    (out,) = rows_of(tmp_path / "y.csv", columns=swapped)
    assert (out["chosen"], out["rejected"]) == ("b", "a")


# ---------------------------------------------------------------- rankings and ratings

ULTRA = {
    "instruction": "p",
    "models": ["m0", "m1", "m2"],
    "completions": [
        {"response": "a", "overall_score": 7.5, "model": "m0"},
        {"response": "b", "overall_score": 9.0, "model": "m1"},
        {"response": "c", "overall_score": 7.5, "model": "m2"},
    ],
}


def test_ratings_become_rankings_and_pairs_with_margins() -> None:
    (ranking,) = rows_of([ULTRA], kind="rankings")
    assert ranking["completions"] == ["a", "b", "c"]
    assert ranking["ranks"] == [2.0, 1.0, 2.0]
    dataset, report = load_rows_with_report([ULTRA], margins="ratings")
    pairs = [(row["chosen"], row["rejected"], row["margin"]) for row in dataset]
    assert pairs == [("b", "a", 1.5), ("b", "c", 1.5)]
    assert report.left_out == {"pairs with tied ranks": 1}
    assert any("not model" in note for note in report.notes)
    lists = {"prompt": "p", "completions": ["a", "b", "c"], "ratings": [7.5, 9.0, 7.5]}
    assert rows_of([lists], kind="rankings")[0]["ranks"] == [2.0, 1.0, 2.0]


@given(ranks=st.lists(st.integers(1, 4), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_a_ranking_gives_each_untied_pair_once(ranks: list[int]) -> None:
    texts = [f"t{i}" for i in range(len(ranks))]
    rows = [
        {"prompt": "p", "completions": texts, "ranks": ranks},
        {"prompt": "q", "completions": ["x", "y"], "ranks": [1, 2]},  # so that a pair is left
    ]
    dataset, report = load_rows_with_report(rows)
    got = {(row["chosen"], row["rejected"]) for row in dataset if row["prompt"] == "p"}
    given_ranks = dict(zip(texts, ranks, strict=True))
    better = {(a, b) for a in texts for b in texts if given_ranks[a] < given_ranks[b]}
    assert got == better
    k = len(ranks)
    assert len(got) + report.left_out["pairs with tied ranks"] == k * (k - 1) // 2


def test_a_ranking_keeps_gold_rewards_and_ids_in_its_pairs() -> None:
    row = {
        "prompt": USER,
        "completions": [BAD, GOOD],
        "ranks": [2, 1],
        "rewards": [-1.0, 2.0],
        "id": "r1",
    }
    (pair,) = rows_of([row])
    assert pair == {
        "prompt": USER,
        "chosen": GOOD,
        "rejected": BAD,
        "id": "r1/1>0",
        "reward_chosen": 2.0,
        "reward_rejected": -1.0,
    }
    same = row | {"completions": [GOOD, GOOD]}
    with pytest.raises(DataError, match="1 pairs of equal completions"):
        load_rows([same])


# ---------------------------------------------------------------- judgements, steps


def test_judgements_become_pairs_and_ties_are_counted() -> None:
    base = {"prompt": "p", "a": "first", "b": "second", "annotator": "human1"}
    rows = [base | {"preference": verdict} for verdict in ("a", "b", "tie", "A")]
    dataset, report = load_rows_with_report(rows)
    assert dataset["chosen"][:] == ["first", "second", "first"]
    assert report.left_out == {"ties": 1}
    assert set(dataset["annotator"]) == {"human1"}
    arena = {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "model_b"}
    assert rows_of([arena])[0]["chosen"] == "y"
    with pytest.raises(DataError, match=r"field 'preference': unknown preference \(1\)"):
        load_rows([base | {"preference": 1}])
    with pytest.raises(DataError, match="field 'b': empty completion"):
        load_rows([base | {"preference": "a", "b": ""}])
    with pytest.raises(DataError, match="field 'b': missing field"):
        load_rows([rows[0], {k: v for k, v in rows[0].items() if k != "b"}])
    with pytest.raises(DataError, match="2 ties"):
        load_rows([rows[2]] * 2)


def test_a_label_is_a_verdict_where_nothing_else_is() -> None:
    base = {"prompt": "p", "a": "first", "b": "second"}
    dataset, report = load_rows_with_report(
        [base | {"label": v} for v in ("a", "b", "tie")], kind="auto"
    )
    assert dataset["chosen"][:] == ["first", "second"]
    assert (report.kind, report.left_out) == ("pairs", {"ties": 1})
    with pytest.raises(DataError, match=r"field 'label': unknown preference \(0\)"):
        load_rows([base | {"label": 0}])
    # beside a preference it may be anything; if it is a verdict, it must be the same one
    assert rows_of([base | {"preference": "b", "label": 3}])[0]["chosen"] == "second"
    with pytest.raises(DataError, match="verdicts disagree"):
        load_rows([base | {"preference": "b", "label": "a"}])
    # beside a completion it says whether that is right
    outcome = {"prompt": "p", "completion": "x", "label": True, "a": "y", "b": "z"}
    assert load_rows_with_report([outcome], kind="auto")[1].kind == "outcomes"


def test_step_labels() -> None:
    rows = [
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
        {"prompt": "p", "completions": ["a", "b"], "labels": [None, True]},
    ]
    assert [row["labels"] for row in rows_of(rows, kind="steps")] == [[1, -1], [None, 1]]
    # 0 for 'wrong' would be read as 'neutral' in silence: it is not silent
    zero_one = [{"prompt": "p", "completions": ["a", "b"], "labels": [1, 0]}]
    _, report = load_rows_with_report(zero_one, kind="steps")
    assert any("no -1 in the file" in note for note in report.notes)
    minus = {"prompt": "p", "completions": ["a"], "labels": [-1]}
    _, report = load_rows_with_report([*zero_one, minus], kind="steps")
    assert not report.notes


def test_classes_and_probabilities_are_not_mixed() -> None:
    """Arrow would make -1.0 of -1, which is no probability."""
    rows = [{"prompt": "p", "completions": ["a", "b"], "labels": x} for x in ([1, -1], [0.5, 1])]
    with pytest.raises(
        DataError, match=r"field 'labels': mixed types \(probabilities here, classes"
    ):
        load_rows(rows, kind="steps")
    rows[0]["labels"] = [1, 0]  # which may be probabilities, written by JSON
    assert load_rows(rows, kind="steps")["labels"][:] == [[1, 0], [0.5, 1]]


def test_load_report_counts_everything() -> None:
    base = {"prompt": "p", "a": "x", "b": "y"}
    rows = [base | {"preference": v} for v in ("a", "tie", "what", "b")]
    dataset, report = load_rows_with_report(rows, on_error="skip")
    d = report.as_dict()
    assert d["rows_read"] == 4
    assert d["rows_kept"] == len(dataset) == 2
    assert d["skipped"] == {"unknown preference": 1}
    assert d["left_out"] == {"ties": 1}
    assert json.loads(json.dumps(d)) == d
