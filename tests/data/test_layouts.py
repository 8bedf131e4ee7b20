"""A prompt is found under whatever name it has, once; or the row is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from companion import RewardFormatter, load_rows, load_rows_with_report
from companion.cli.main import main
from companion.data.writing import plain_row
from companion.errors import DataError
from companion.layouts import columns_of, text_after, turns_after, with_prompt
from companion.training.config import DataArguments
from companion.training.run import load_sets
from companion.tutor import KINDS, make_rows

ASK = "What is 3 plus 1?"
TEXT = {"chosen": "It is 4.", "rejected": "It is 3."}


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def share(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


USER, GOOD, BAD = said("user", ASK), said("assistant", "It is 4."), said("assistant", "It is 3.")
SYSTEM = said("system", "Be brief.")
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
BRIEF = CHAT | {"prompt": [SYSTEM, USER]}
EARLIER = [said("user", "Hi"), said("assistant", "Hello.")]

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpaca": (
        {"instruction": "Add one.", "input": "3", **TEXT},
        {"prompt": "Add one.\n3", **TEXT},
    ),
    "alpaca without input": (
        {"instruction": ASK, "input": "", "system": "", "history": [], **TEXT},
        {"prompt": ASK, "input": "", "system": "", "history": [], **TEXT},
    ),
    "llama-factory": (
        {
            "instruction": "What is 3",
            "input": "plus 1?",
            "system": "Be brief.",
            "history": [["Hi", "Hello."]],
            **TEXT,
        },
        CHAT | {"prompt": [SYSTEM, *EARLIER, said("user", "What is 3\nplus 1?")]},
    ),
    "llama-factory sharegpt": (
        {
            "conversations": [share("human", ASK)],
            "chosen": share("gpt", "It is 4."),
            "rejected": share("gpt", "It is 3."),
            "system": "Be brief.",
        },
        BRIEF,
    ),
    "ms-swift": ({"messages": [USER, GOOD], "rejected_response": "It is 3."}, CHAT),
    "ms-swift messages": (
        {"messages": [SYSTEM, USER, GOOD], "rejected_messages": [SYSTEM, USER, BAD]},
        BRIEF,
    ),
    "ms-swift 2": (
        {"query": ASK, "response": "It is 4.", "rejected_response": "It is 3.", "history": None},
        {"prompt": ASK, "history": None, **TEXT},
    ),
    "sharegpt": (
        {"conversations": [share("system", "Be brief."), share("human", ASK)], **TEXT},
        BRIEF,
    ),
    "axolotl": ({"system": "Be brief.", "question": ASK, **TEXT}, BRIEF),
    "axolotl chat": ({"system": "Be brief.", "prompt": ASK, **TEXT}, BRIEF),
    "axolotl argilla": (
        {
            "instruction": ASK,
            "chosen_response": "It is 4.",
            "rejected_response": "It is 3.",
        },
        {"prompt": ASK, **TEXT},
    ),
    "helpsteer": ({"context": [USER], **TEXT}, CHAT),
    "messages": ({"messages": [USER], **TEXT}, CHAT),
    "system beside whole conversations": (
        {"system": "Be brief.", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        BRIEF,
    ),
}


def only(row: Any) -> dict[str, Any]:
    return {key: plain_row(row)[key] for key in ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_known_layouts(name: str, tiny_tokenizer: Any) -> None:
    row, want = LAYOUTS[name]
    dataset, report = load_rows_with_report([row, row])
    assert [only(found) for found in dataset] == [only(want)] * 2
    assert report.notes, "it is said"
    assert set(report.notes.values()) == {2}
    # reading it again changes nothing
    _, again = load_rows_with_report(dataset)
    assert not again.notes
    # and a row that is handed to the formatter has the ids of the one from the file
    formatter = RewardFormatter(tiny_tokenizer)
    assert formatter.encode_pair(row) == formatter.encode_pair(dataset[0])
    assert formatter.counts.prompts_found == 1


def test_outcomes_steps_rankings_and_prompts() -> None:
    (found,) = load_rows([{"question": ASK, "completion": "4.", "label": True}], kind="outcomes")
    assert (found["prompt"], found["completion"]) == (ASK, "4.")
    alpaca = {"instruction": ASK, "input": "", "output": "4.", "label": True}
    assert load_rows([alpaca], kind="outcomes")[0]["completion"] == "4."
    (found,) = load_rows([{"query": ASK, "completions": ["a"], "labels": [1]}], kind="steps")
    assert found["prompt"] == ASK
    ranking = {"messages": [USER], "completions": ["a", "b"], "ranks": [1, 2]}
    assert load_rows([ranking], kind="rankings")[0]["prompt"] == [USER]
    judged = {"question": ASK, "a": "It is 4.", "b": "It is 3.", "preference": "a"}
    assert only(load_rows([judged])[0]) == {"prompt": ASK, **TEXT}
    gsm = {"question": ASK, "answer": "4", "system": "Be brief."}
    (found,) = load_rows([gsm], kind="prompts")
    assert (found["prompt"], found["answer"]) == ([SYSTEM, USER], "4")


def test_a_system_message_in_some_rows_makes_all_of_them_conversations() -> None:
    base = {"instruction": ASK, **TEXT}
    rows = [base, base | {"system": ""}, base | {"system": "Be brief."}]
    assert [only(row) for row in load_rows(rows)] == [CHAT, CHAT, BRIEF]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"context": "Ana has 3.", **TEXT}, "context"),
        ({"problem": ASK, **TEXT}, "problem"),
        ({"history": "Ana: hi", **TEXT}, "history"),
        ({"prompt": "How many?", "context": "Ana has 3 pens.", **TEXT}, "context"),
        ({"prompt": ASK, "instruction": "Answer as a pirate.", **TEXT}, "instruction"),
        ({"question": "How many?", "context": "Ana has 3 pens.", **TEXT}, "context"),
        ({"prompt": ASK, "messages": EARLIER, **TEXT}, "messages"),
        ({"messages": [USER, said("assistant", "Five.")], **TEXT}, "messages"),
        ({"system": "Be brief.", **TEXT}, "system"),
        ({"prompt": ASK, "system": ["Be brief."], **TEXT}, "system"),
        ({"text": ASK, **TEXT}, "text"),
        ({"prompt": [SYSTEM, USER], "system": "Be a pirate.", **TEXT}, "system"),
        ({"prompt": None, **TEXT}, "prompt"),
    ],
)
def test_what_may_be_the_prompt_is_refused(
    row: dict[str, Any], field: str, tiny_tokenizer: Any
) -> None:
    with pytest.raises(DataError, match=f"field '{field}': ") as caught:
        load_rows([row])
    assert "--columns" in str(caught.value.cure) or field == "prompt"
    with pytest.raises(DataError, match=f"row 0, field '{field}': "):
        RewardFormatter(tiny_tokenizer).encode_pair(row)
    left_out = load_rows([row], columns={field: ""})  # as the cure says
    assert field not in left_out.column_names


def test_no_false_alarms(tiny_tokenizer: Any) -> None:
    formatter = RewardFormatter(tiny_tokenizer)
    extras = {
        "id": "x", "subset": "s", "source": "a long text of where it is from", "licence": "MIT",
        "category": "maths", "reward_chosen": 1.0, "annotator": "human1", "task": "GSM8K",
        "answer": "4", "solution": "3 + 1 = 4", "score_chosen": 2, "score_rejected": 1,
        "metadata": {"question": "another"}, "title": "A title", "model": "m", "url": "http://x",
    }  # fmt: skip
    whole = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    for row in (
        {"prompt": ASK, **TEXT, **extras},
        {**TEXT, **extras},
        {**CHAT, **extras},
        {**whole, **extras},
        # copies: UltraFeedback binarized, Argilla, prompts that were made of a question
        {"prompt": ASK, **whole, "messages": [USER, GOOD]},
        {**whole, "messages": [USER, GOOD], "instruction": ASK},
        {"prompt": f"Answer: {ASK}", "question": ASK, **TEXT},
        {**CHAT, "question": f" {ASK}\n", "input": ""},
    ):
        kept = load_rows([row])
        assert set(row) - {"instruction"} <= {*kept.column_names, "messages"}
        assert formatter.encode_pair(kept[0]) is not None
    for kind in KINDS:
        loaded, report = load_rows_with_report(make_rows(kind, 5, 0), kind="auto")
        assert len(loaded) == 5
        assert not any("prompt" in note for note in report.notes)
    row = {"prompt": ASK, "completion": "4", "id": 3}
    assert with_prompt(row) is row


def test_direct_rows_of_one_text(tiny_tokenizer: Any) -> None:
    formatter = RewardFormatter(tiny_tokenizer)
    want = formatter.encode([SYSTEM, USER], [GOOD])
    for row in (
        {"messages": [SYSTEM, USER], "completion": "It is 4."},  # was scored without its messages
        {"messages": [USER, GOOD], "system": "Be brief."},
        {"conversations": [share("human", ASK), share("gpt", "It is 4.")], "system": "Be brief."},
        {"instruction": ASK, "output": "It is 4.", "system": "Be brief."},
        {"prompt": None, "completion": [SYSTEM, USER, GOOD]},
    ):
        assert formatter.encode_row(row) == want
    answer = {"question": ASK, "answer": "It is 4."}
    assert formatter.encode_row(answer, "answer") == formatter.encode(ASK, "It is 4.")
    for row, field in (
        ({"text": f"{ASK} It is 4.", "system": "Be brief."}, "system"),
        ({"messages": [USER, GOOD], "context": "Ana has 3 pens."}, "context"),
    ):
        with pytest.raises(DataError, match=f"field '{field}': may hold the prompt"):
            formatter.encode_row(row)
    for empty in (None, "", []):
        with pytest.raises(DataError, match=r"field 'prompt': (null|empty prompt)"):
            formatter.encode_row({"prompt": empty, "completion": "It is 4."})


# ---------------------------------------------------------------- a prompt that stands twice


SPACED = said("user", "  What is 3\nplus 1? ")


@pytest.mark.parametrize("prompt", [[USER], [SPACED], [SYSTEM, USER], ASK])
@pytest.mark.parametrize("head", [[USER], [SPACED], [SYSTEM, USER]])
def test_a_prompt_in_both_conversations_is_taken_out(prompt: Any, head: list[Any]) -> None:
    row = {"prompt": prompt, "chosen": [*head, GOOD], "rejected": [*head, BAD]}
    (found,) = [plain_row(row) for row in load_rows([row])]
    assert (found["chosen"], found["rejected"]) == ([GOOD], [BAD])
    words = [" ".join(m["content"].split()) for m in found["prompt"]]
    assert words == (["Be brief."] if SYSTEM in [*prompt, *head] else []) + [ASK]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": "It is 3."},
        {"prompt": [USER], "chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]},
        {"prompt": "Hi there", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [said("system", "No."), USER], "chosen": [SYSTEM, USER, GOOD],
         "rejected": [SYSTEM, USER, BAD]},
        {"prompt": "Hi there", "chosen": "\n\nHuman: x\n\nAssistant: a",
         "rejected": "\n\nHuman: x\n\nAssistant: b"},
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_right_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"one side only|prompt is another|two system messages"):
        load_rows([row])


def test_texts_that_begin_with_their_prompt() -> None:
    pair = {"prompt": f"Q: {ASK}", "chosen": f"Q: {ASK}\nA: 4", "rejected": f" Q:  {ASK}\nA: 3"}
    dataset, report = load_rows_with_report([pair])
    assert (dataset["chosen"][:], dataset["rejected"][:]) == (["\nA: 4"], ["\nA: 3"])
    assert report.notes.total() == 1
    # one side may well repeat the question, and a short prompt may begin an answer by chance
    for row in (pair | {"rejected": "A: 3"}, {"prompt": "2", "chosen": "2 4", "rejected": "2 5"}):
        dataset, report = load_rows_with_report([row])
        assert only(dataset[0]) == row
        assert any("left as it is" in note for note in report.notes)
    longer = {"prompt": "What is 3 plus 1", "chosen": "What is 3 plus 12?", "rejected": "x"}
    assert only(load_rows([longer])[0]) == longer
    outcome = {"prompt": [USER], "completion": [SYSTEM, USER, GOOD], "label": True}
    (found,) = load_rows([outcome], kind="outcomes")
    assert (found["prompt"], found["completion"]) == ([SYSTEM, USER], [GOOD])
    ranking = {"prompt": ASK, "completions": [f"{ASK} a", f"{ASK} b"], "ranks": [1, 2]}
    assert load_rows([ranking], kind="rankings")[0]["completions"] == [" a", " b"]


words = st.lists(st.text("ab.1", min_size=1, max_size=3), min_size=1, max_size=5)
gaps = st.sampled_from([" ", "\n", "\t  "])


@settings(max_examples=60, deadline=None)
@given(words, gaps, gaps, st.text("ab. \n", min_size=1).filter(str.strip))
def test_what_follows_a_prompt(words: list[str], one: str, other: str, rest: str) -> None:
    prompt, whole = one.join(words), other.join(words) + other + rest
    assert text_after(prompt, whole) == other + rest
    assert text_after(prompt, "x" + whole) is None
    messages = [said("user", prompt)]
    assert turns_after(messages, [SYSTEM, said("user", other.join(words)), GOOD]) == [GOOD]
    assert turns_after(messages, [said("user", whole + "x"), GOOD]) is None


# ---------------------------------------------------------------- from the outside


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns_are_renamed_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_reward: Any
) -> None:
    rows = [{"problem": f"{ASK} {i}", "context": "aside", **TEXT} for i in range(20)]
    file = write(tmp_path / "x.jsonl", rows)
    columns = ["problem=prompt", "context="]
    assert main(["data", "check", file]) == 2
    assert main(["data", "check", file, "--columns", *columns]) == 0
    assert main(["data", "check", file, "--columns", "nothing=prompt"]) == 2
    assert "there are: chosen, context, problem, rejected" in capsys.readouterr().err
    sets, _, _ = load_sets(DataArguments(dataset_name=file, columns=columns), "pairs")
    assert sorted(sets["train"].column_names) == ["chosen", "prompt", "rejected"]
    with pytest.raises(DataError, match="no column 'nothing' to rename"):
        load_sets(DataArguments(dataset_name=file, columns=["nothing=x"]), "pairs")
    scored = write(tmp_path / "y.jsonl", [{**row, "completion": "4."} for row in rows[:2]])
    plain = write(
        tmp_path / "z.jsonl", [{"prompt": r["problem"], "completion": "4."} for r in rows[:2]]
    )
    for i, (source, more) in enumerate(
        ((plain, []), (scored, ["--columns", *columns, "--fields", "problem"]))
    ):
        paths = [
            "--model",
            str(tiny_reward),
            "--input",
            source,
            "--output",
            f"{tmp_path}/{i}.jsonl",
        ]
        assert main(["score", *paths, "--device", "cpu", *more]) == 0
    found = [
        [json.loads(line) for line in (tmp_path / f"{i}.jsonl").read_text().splitlines()]
        for i in (0, 1)
    ]
    assert [row["score"] for row in found[0]] == [row["score"] for row in found[1]]
    assert found[1][0]["problem"] == rows[0]["problem"]
    for columns_given, code in (([], 2), (columns, 0), (["nothing=prompt"], 2)):
        more = ["--columns", *columns_given] if columns_given else []
        paths = ["--model", str(tiny_reward), "--input", scored, "--overwrite"]
        assert main(["score", *paths, "--output", f"{tmp_path}/2.jsonl", *more]) == code
        paths = ["--model", str(tiny_reward), "--dataset_name", file, "--device", "cpu"]
        assert main(["evaluate", *paths, *more]) == code
    capsys.readouterr()
    with pytest.raises(DataError, match="--columns problem"):
        columns_of(["problem"])


def test_all_readers_give_one_row_the_same_ids(tiny_reward: Any, tmp_path: Path) -> None:
    """The loader and training, evaluation, score, the reward function, and rank."""
    from companion import RewardFunction, evaluate_pairs, load_scorer
    from companion.search import rank_file

    scorer = load_scorer(tiny_reward, device="cpu")
    asked = {"instruction": ASK, "system": "Be brief.", "history": [["Hi", "Hello."]]}
    row = {**asked, "chosen": "It is 4.", "rejected": "It is 3."}
    loaded = load_rows([row, row | {"instruction": "What is 2 plus 2?"}])
    want = scorer.score([{"prompt": loaded[0]["prompt"], "completion": loaded[0]["chosen"]}]).raw[0]
    assert scorer.score([{**asked, "completion": "It is 4."}]).raw[0] == want
    assert evaluate_pairs(scorer, loaded).chosen[0] == pytest.approx(want, abs=1e-6)
    assert scorer.score_pairs([row]).chosen[0] == pytest.approx(want, abs=1e-6)
    reward = RewardFunction(scorer)
    assert reward([loaded[0]["prompt"]], [loaded[0]["chosen"]]) == [want]
    file = write(tmp_path / "x.jsonl", [{**asked, "completions": ["It is 4.", "It is 3."]}])
    rank_file(scorer, file, tmp_path / "best.jsonl", ranks_path=tmp_path / "ranks.jsonl")
    (ranked,) = map(json.loads, (tmp_path / "ranks.jsonl").read_text().splitlines())
    scores = {item["completion"]: item["score"] for item in ranked["completions"]}
    assert scores["It is 4."] == pytest.approx(want, abs=1e-6)
    assert ranked["prompt"] == loaded[0]["prompt"]


def test_contradictions_within_a_row() -> None:
    rated = {"prompt": ASK, **TEXT, "score_chosen": 1, "score_rejected": 5}
    assert _notes([rated], "rated higher")
    assert _notes([rated | {"margin": -4.0}], "margin is negative")
    ranking = {"prompt": ASK, "completions": ["a", "b"], "ranks": [1, 2], "ratings": [1, 5]}
    assert _notes([ranking], "ranks and ratings disagree")
    assert not _notes([ranking | {"ratings": [5, 1]}], "disagree")
    judged = {"prompt": ASK, "a": "x", "b": "y", "preference": "a"}
    assert _notes([judged | {"rating_a": 1, "rating_b": 3}], "rated higher")
    for row in (
        judged | {"winner": "model_b"},
        judged | {"chosen": "y", "rejected": "x"},
    ):
        with pytest.raises(DataError, match="verdicts disagree"):
            load_rows([row])
    load_rows([judged | {"chosen": "x", "rejected": "y", "winner": "model_a"}])
    # a pair with a stray column is a pair
    assert load_rows([{"prompt": ASK, **TEXT, "ranks": [1, 2]}])["ranks"][:] == [[1, 2]]


def _notes(rows: list[Any], words: str) -> bool:
    kind = "rankings" if "completions" in rows[0] else "pairs"
    return any(words in note for note in load_rows_with_report(rows, kind=kind)[1].notes)


def test_printed_lists_and_missing_values_of_csv(tmp_path: Path) -> None:
    import pandas as pd

    file = tmp_path / "x.csv"
    rows = [CHAT, CHAT | {"prompt": [SYSTEM, USER]}]
    pd.DataFrame(rows).to_csv(file, index=False)  # prints Python's lists
    with pytest.raises(DataError, match=r"x.csv, row 0 .*field 'chosen': printed messages") as bad:
        load_rows(file)
    assert "JSON" in str(bad.value.cure)
    as_json = pd.DataFrame(rows).map(json.dumps)
    as_json.to_csv(file, index=False)
    assert [only(row) for row in load_rows(file)] == rows
    # JSON that a spreadsheet has cut short is no text either
    file.write_text(file.read_text().replace("}]", ""))
    with pytest.raises(DataError, match="printed messages"):
        load_rows(file)
    # an answer may be JSON
    answer = {"prompt": "Who?", "chosen": '[{"role": "admin"}]', "rejected": '[{"value": 1}]'}
    assert only(load_rows([answer])[0]) == answer
    file.write_text("question,chosen,rejected\n3,4,NA\n5,nan,6\n7,8,None\n9,10,11\n")
    dataset, report = load_rows_with_report(file)
    assert dataset["rejected"][:] == ["NA", "6", "None", "11"]
    counts = {note: n for note, n in report.notes.items() if "missing value" in note}
    assert Counter(counts.values()) == {2: 1, 1: 1}
