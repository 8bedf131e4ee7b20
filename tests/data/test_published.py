"""Rows in the columns of public data sets: one pair has the same token ids in all of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from companion import RewardFormatter, load_rows, load_rows_with_report, write_rows
from companion.cli.main import main
from companion.data.writing import plain_row
from companion.errors import DataError

ASK, GOOD, BAD = "What is 3 plus 1?", "It is 4.", "It is 3."


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def block(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "image": None}]


def share(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


USER, YES, NO = said("user", ASK), said("assistant", GOOD), said("assistant", BAD)

#: name -> the pair in that schema
PAIRS: dict[str, dict[str, Any]] = {
    "messages": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "RewardBench 2": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "subset": "Math"},
    "HelpSteer3": {
        "context": [USER],
        "response1": GOOD,
        "response2": BAD,
        "overall_preference": -2,
        "individual_preference": [{"score": -2, "reasoning": "right", "feedback_1": "x"}],
    },
    "HelpSteer3 turned": {
        "context": [USER],
        "response1": BAD,
        "response2": GOOD,
        "overall_preference": 1,
    },
    "HelpSteer2": {
        "messages": [USER],
        "response_1": BAD,
        "response_2": GOOD,
        "preference_strength": 3,
    },
    "PKU": {
        "prompt": [USER],
        "response_0": BAD,
        "response_1": GOOD,
        "better_response_id": 1,
        "is_response_0_safe": True,
    },
    "arena": {
        "question_id": "x",
        "model_a": "m",
        "model_b": "n",
        "winner": "model_b",
        "conversation_a": [USER, NO],
        "conversation_b": [USER, YES],
        "turn": 1,
    },
    "arena with blocks": {
        "winner": "model_a",
        "conversation_a": [said("user", block(ASK)), said("assistant", block(GOOD))],
        "conversation_b": [said("user", block(ASK)), said("assistant", block(BAD))],
    },
    "arena as numbers": {
        "prompt": json.dumps([ASK]),
        "response_a": json.dumps([BAD]),
        "response_b": json.dumps([GOOD]),
        "winner_model_a": 0,
        "winner_model_b": 1,
        "winner_tie": 0,
    },
    "blocks": {
        "prompt": [said("user", block("What is 3") + block(" plus 1?"))],
        "chosen": [said("assistant", block(GOOD))],
        "rejected": [said("assistant", block(BAD))],
    },
    "LLaMA-Factory": {
        "conversations": [share("human", ASK)],
        "chosen": share("gpt", GOOD),
        "rejected": share("gpt", BAD),
    },
    "ms-swift": {"messages": [USER, YES], "rejected_response": BAD},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_pair_has_the_same_ids_in_every_schema(
    suffix: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    formatter = RewardFormatter(tiny_tokenizer)
    want = [side.input_ids for side in formatter.encode_pair(PAIRS["messages"]) or ()]
    assert want[0] != want[1]
    for name, row in PAIRS.items():
        write_rows([row, row], tmp_path / f"{name}{suffix}")
        dataset, report = load_rows_with_report(tmp_path / f"{name}{suffix}", kind="auto")
        assert (report.kind, len(dataset)) == ("pairs", 2), name
        got = [side.input_ids for side in formatter.encode_pair(dataset[0]) or ()]
        assert got == want, name
        # reading again what was read changes nothing
        again, report = load_rows_with_report(dataset)
        assert [plain_row(r) for r in again] == [plain_row(r) for r in dataset], name


def test_a_verdict_is_that_of_the_column_that_is_named() -> None:
    row = PAIRS["PKU"] | {"safer_response_id": 0}
    dataset, report = load_rows_with_report([row])
    assert dataset[0]["chosen"] == [YES]
    words = "not of 'safer_response_id' (which is read with --columns better_response_id=)"
    assert any(words in note for note in report.notes)
    (found,) = load_rows([row], columns={"better_response_id": ""})
    assert found["chosen"] == [NO]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("HelpSteer3", {"overall_preference": 0}),
        ("HelpSteer2", {"preference_strength": 0}),
        ("arena", {"winner": "tie (bothbad)"}),
        ("arena", {"winner": "both_bad"}),
        ("arena as numbers", {"winner_model_b": 0, "winner_tie": 1}),
    ],
)
def test_ties_give_no_pair_and_are_counted(name: str, change: dict[str, Any]) -> None:
    dataset, report = load_rows_with_report([PAIRS[name], PAIRS[name] | change])
    assert (len(dataset), report.left_out) == (1, {"ties": 1})


@pytest.mark.parametrize(
    ("name", "change", "reason", "field"),
    [
        ("HelpSteer3", {"overall_preference": 4}, "unknown preference", "overall_preference"),
        ("HelpSteer3", {"overall_preference": "-2"}, "unknown preference", "overall_preference"),
        ("HelpSteer3", {"overall_preference": None}, "null", "overall_preference"),
        ("HelpSteer3", {"response2": None}, "null", "response2"),
        ("PKU", {"better_response_id": 2}, "unknown preference", "better_response_id"),
        ("PKU", {"better_response_id": True}, "unknown preference", "better_response_id"),
        ("arena", {"winner": "model_c"}, "unknown preference", "winner"),
        ("arena as numbers", {"winner_tie": 1}, "unknown preference", "winner_model_a"),
        ("arena as numbers", {"response_a": '["a", "b"]'}, "lengths differ", "response_a"),
        ("arena as numbers", {"response_a": "[null]"}, "null", "response_a"),
        ("RewardBench 2", {"rejected": ["", BAD]}, "empty completion", "rejected[0]"),
        ("RewardBench 2", {"rejected": [GOOD]}, "chosen equals rejected", "chosen[0]"),
        (
            "blocks",
            {"prompt": [said("user", [{"type": "image", "url": "x"}])]},
            "not text",
            "prompt",
        ),
    ],
)
def test_what_is_not_whole_is_refused(
    name: str, change: dict[str, Any], reason: str, field: str
) -> None:
    rows = [PAIRS[name], PAIRS[name] | change]
    with pytest.raises(DataError, match="Cure: ") as caught:
        load_rows(rows)
    assert f"row 1, field {field!r}: {reason}" in caught.value.what
    assert len(load_rows(rows, on_error="skip")) == 1


def test_strengths_are_margins_if_they_are_asked_for() -> None:
    rows = [PAIRS["HelpSteer3"], PAIRS["HelpSteer3 turned"]]
    assert load_rows(rows, margins="ratings")["margin"][:] == [2, 1]
    assert "margin" not in load_rows(rows).column_names


def test_several_chosen_and_rejected() -> None:
    row = {"prompt": "Name a colour.", "chosen": ["Red.", "Blue."], "rejected": ["Dog.", "Cat."]}
    row |= {"id": "t", "num_correct": 2}
    found = load_rows([row])
    pairs = [(one["chosen"], one["rejected"]) for one in found]
    assert pairs == [(a, b) for a in row["chosen"] for b in row["rejected"]]
    assert found["id"][:] == ["t/0>0", "t/0>1", "t/1>0", "t/1>1"]
    (ranking,) = load_rows([row], kind="rankings")
    assert ranking["completions"] == ["Red.", "Blue.", "Dog.", "Cat."]
    assert ranking["ranks"] == [1, 1, 2, 2]
    # the pairs of the ranking are the pairs of the row
    again = load_rows([ranking])
    assert [(one["chosen"], one["rejected"]) for one in again] == pairs
    # messages; and one chosen against three
    turns = {"prompt": [USER], "chosen": [[YES]], "rejected": [[NO], [said("assistant", "5.")]]}
    assert [one["rejected"] for one in load_rows([turns])] == turns["rejected"]


def test_scores_are_compared_within_a_prompt() -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    rows = [
        {"prompt": f"p{i}", "response": f"p{i} r{j}", "score": rng.choice([0.1, 0.5, 0.5, 0.9])}
        for i in range(6)
        for j in range(rng.choice([1, 2, 3, 4]))
    ]
    rng.shuffle(rows)
    rows += [
        {"prompt": "q", "response": "x", "score": 1},
        {"prompt": "q", "response": "y"} | {"score": 0},
    ]
    want = {
        (a["prompt"], a["response"], b["response"])
        for a in rows
        for b in rows
        if a["prompt"] == b["prompt"] and a["score"] > b["score"]
    }
    pairs, report = load_rows_with_report(rows)
    assert {(one["prompt"], one["chosen"], one["rejected"]) for one in pairs} == want
    assert len(pairs) == len(want)
    assert report.rows_read == len(rows)
    prompts = [row["prompt"] for row in rows]
    alone = sum(prompts.count(prompt) == 1 for prompt in set(prompts))
    assert report.left_out["answers that are alone with their prompt"] == alone
    margins = load_rows(rows, margins="ratings")
    score = {row["response"]: row["score"] for row in rows}
    assert all(
        one["margin"] == pytest.approx(score[one["chosen"]] - score[one["rejected"]])
        for one in margins
    )
    assert len(load_rows(rows, kind="scores")) == len(rows)
    assert sum(map(len, load_rows(rows, kind="rankings")["completions"])) == len(rows) - alone


def test_scores_without_rivals_and_bad_scores() -> None:
    one = {"prompt": "p", "completion": "a", "score": 0.8}
    assert load_rows_with_report([one], kind="auto")[1].kind == "scores"
    with pytest.raises(DataError, match="the answers to one prompt are compared"):
        load_rows([one])
    with pytest.raises(DataError, match=r"do not fit outcomes.*\n.*these look like scores"):
        load_rows([one], kind="outcomes")
    bad = [one, one | {"completion": "b", "score": "x"}, one | {"completion": "c", "score": 0.1}]
    with pytest.raises(DataError, match=r"1 of 3 rows.*\n.*row 1, field 'score'"):
        load_rows(bad)
    dataset, report = load_rows_with_report(bad, on_error="skip")
    assert (len(dataset), report.rows_read, report.bad) == (1, 3, 1)


def test_labels_0_and_1() -> None:
    rows = [{"prompt": "p", "completion": text, "label": i} for i, text in enumerate("ab")]
    dataset, report = load_rows_with_report(rows, kind="auto")
    assert (report.kind, dataset["label"][:]) == ("outcomes", [False, True])
    assert report.notes["labels 1 and 0 read as right and wrong"] == 2


# ---------------------------------------------------------------- steps


def rated(text: str, rating: int | None) -> dict[str, Any]:
    return {"text": text, "rating": rating, "flagged": False}


PRM = {
    "labeler": "x",
    "question": {"problem": ASK, "ground_truth_answer": "4"},
    "label": {
        "steps": [
            {
                "completions": [rated("Add.", 1), rated("Take away.", -1)],
                "human_completion": None,
                "chosen_completion": 0,
            },
            {
                "completions": [rated("I count.", 0)],
                "human_completion": {"text": "One more is 4.", "rating": None},
                "chosen_completion": None,
            },
            {"completions": [rated(GOOD, 1)], "chosen_completion": 0},
        ],
        "finish_reason": "solution",
    },
}


def test_prm800k_counts_every_rating_once() -> None:
    found = load_rows([PRM], kind="auto")
    rows = [(one["completions"], one["labels"]) for one in found]
    assert rows == [
        (["Add.", "One more is 4.", GOOD], [1, None, 1]),
        (["Take away."], [-1]),
        (["Add.", "I count."], [None, 0]),
    ]
    assert set(found["prompt"]) == {ASK}
    assert found[0]["finish_reason"] == "solution"
    given = [
        one["rating"]
        for step in PRM["label"]["steps"]
        for one in step["completions"]  # type: ignore[index]
    ]
    kept = [label for _, labels in rows for label in labels if label is not None]
    assert sorted(kept) == sorted(given)


def test_prm800k_that_ends_early_or_has_no_rating() -> None:
    steps = [{"completions": [rated("No.", -1), rated("Nor this.", -1)], "chosen_completion": None}]
    found = load_rows([{**PRM, "label": {"steps": steps}}], kind="steps")
    assert [one["labels"] for one in found] == [[-1], [-1]]
    steps = [{"completions": [rated("No.", None)], "chosen_completion": 0}]
    with pytest.raises(DataError, match=r"field 'label\.steps': no ratings"):
        load_rows([PRM, {**PRM, "label": {"steps": steps}}], kind="steps")


def test_math_shepherd() -> None:
    row = {
        "input": f"{ASK} Step 1: One more. ки\nStep 2: It is 5. ки",
        "label": f"{ASK} Step 1: One more. +\nStep 2: It is 5. -",
        "task": "GSM8K",
    }
    (found,) = load_rows([row], kind="auto")
    assert plain_row(found) == {
        "prompt": ASK,
        "completions": ["Step 1: One more.", "Step 2: It is 5."],
        "labels": [1, -1],
        "task": "GSM8K",
    }
    for change, field in (
        ({"label": row["label"].replace("5", "4")}, "label"),
        ({"label": row["label"].replace(" -", " ?")}, "label"),
        ({"input": row["input"] + " So"}, "label"),
        ({k: v.replace("Step 1:", "First:") for k, v in row.items()}, "input"),
    ):
        with pytest.raises(DataError, match=f"row 1, field {field!r}"):
            load_rows([row, row | change], kind="steps")


def test_steps_are_the_same_in_every_schema() -> None:
    texts, labels = ["Step 1: One more.", "Step 2: It is 4."], [1, -1]
    prm = [
        {"completions": [rated(t, n)], "chosen_completion": 0}
        for t, n in zip(texts, labels, strict=True)
    ]
    rows = [
        {"prompt": ASK, "completions": texts, "labels": labels},
        {"prompt": ASK, "completions": texts, "label": [True, False]},
        {"question": {"problem": ASK}, "label": {"steps": prm}},
        {
            "input": " ".join([ASK, *(f"{text} ки\n" for text in texts)]),
            "label": " ".join(
                [
                    ASK,
                    *(f"{t} {'+' if n > 0 else '-'}\n" for t, n in zip(texts, labels, strict=True)),
                ]
            ),
        },
    ]
    for row in rows:
        dataset, report = load_rows_with_report([row], kind="auto")
        assert (report.kind, plain_row(dataset[0])) == ("steps", rows[0])


# ---------------------------------------------------------------- pairs that look like prompts


@pytest.mark.parametrize(
    "columns",
    [
        ("answer_a", "answer_b"),
        ("response_2", "response_3"),
        ("better_answer", "worse_answer"),
        ("winning_reply", "rejection"),
        ("output1", "output2"),
    ],
)
def test_pairs_never_pass_as_prompts(
    columns: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(
        [{"prompt": "p", **dict(zip(columns, "ab", strict=True))}], tmp_path / "x.jsonl"
    )
    assert file == 1
    assert main(["data", "check", str(tmp_path / "x.jsonl")]) == 2
    said_there = capsys.readouterr().err
    assert "are these pairs?" in said_there
    assert columns[1] in said_there
    # said so, they are
    assert main(["data", "check", str(tmp_path / "x.jsonl"), "--kind", "prompts"]) == 0
