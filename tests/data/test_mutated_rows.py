"""Rows of every kind with something else in a place or two: read, or named; never a traceback."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from companion import load_rows_with_report
from companion.data.checking import check_rows
from companion.data.describe import describe_rows
from companion.data.problems import CURES
from companion.errors import DataError

USER = [{"role": "user", "content": "2 + 2?"}]
GOOD = [{"role": "assistant", "content": "4"}]
BAD = [{"role": "assistant", "content": [{"type": "text", "text": "5"}]}]
STEP = {"completions": [{"text": "a", "rating": 1}, {"text": "b", "rating": -1}]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs": [
        {"id": 1, "prompt": USER, "chosen": GOOD, "rejected": BAD, "votes": [1, 2], "margin": 1},
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1},
        {"instruction": "p", "input": "q", "system": "s", "history": [["a", "b"]]}
        | {"chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"], "id": "x"},
        {"context": USER, "response1": "a", "response2": "b", "overall_preference": -2},
        {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1},
        {"winner": "model_a", "conversation_a": USER + GOOD, "conversation_b": USER + BAD},
        {"prompt": '["p"]', "response_a": '["a"]', "response_b": '["b"]'}
        | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        {
            "conversations": [{"from": "human", "value": "p"}],
            "chosen": {"from": "gpt", "value": "a"},
        }
        | {"rejected": {"from": "gpt", "value": "b"}},
        {"messages": USER + GOOD, "rejected_response": "b"},
        {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
        {"prompt": "p", "response": "a", "score": 0.5},
    ],
    "rankings": [
        {
            "prompt": "p",
            "completions": ["a", "b", "c"],
            "ranks": [1, 2, None],
            "rewards": [1, 2, 3],
        },
        {"instruction": "p", "completions": [{"response": "a", "rating": 1}, {"response": "b"}]}
        | {"ratings": [1, 2]},
        {"prompt": USER, "chosen": GOOD, "rejected": BAD},
    ],
    "outcomes": [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": USER, "completion": GOOD, "label": 0, "tools": [{"name": "x"}]},
    ],
    "steps": [
        {"prompt": "p", "completions": ["a", "b"], "labels": [1, None], "rest": ["c"]},
        {"prompt": "p", "completions": ["a", "b"], "label": [True, False]},
        {
            "question": {"problem": "p"},
            "label": {"steps": [{**STEP, "chosen_completion": 0}, STEP]},
        },
        {"input": "p Step 1: a ки\nStep 2: b ки", "label": "p Step 1: a +\nStep 2: b -"},
    ],
    "scores": [{"prompt": "p", "completion": "a", "score": 1}],
    "prompts": [{"prompt": USER, "answer": "4"}, {"messages": USER}, {"question": "p"}],
}
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        3,
        10**400,
        2**70,
        0.5,
        1e308,
        "",
        " ",
        "\x00",
        "a",
        "ки",
        "[",
        "{}",
    ),
    *([], {}, [[]], [{}], [None], ["x"], [1], ["x", None], [["a", "b"]], {"role": "user"}),
    *([{"role": "user"}], [{"role": 3, "content": "x"}], [{"role": "user", "content": [{}]}]),
    *([{"role": "assistant", "content": {"x": 1}}], [{"from": "gpt", "value": 5}]),
    *([{"role": "assistant", "content": "x", "tool_calls": 5}], [{"type": "image"}], "\n\nHuman:"),
    *({"from": "gpt", "value": None}, {"steps": None}, {"steps": [None]}, {"problem": 3}),
    *({"steps": [{"completions": 3}]}, "\n\nHuman: a\n\nAssistant:", {"a": {"b": [1, "c", {}]}}),
]
LINES = [
    *(b"{", b"7", b"null", b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b"\xff"),
    b'{"margin": ' + b"9" * 5000 + b"}",
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": "p", "extra": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}",
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += _places(item, (*path, key))
    return found


def mutated(row: dict[str, Any], rng: random.Random) -> bytes:
    if rng.random() < 0.08:
        return rng.choice(LINES)
    row = copy.deepcopy(row)
    for _ in range(rng.choice([1, 1, 2])):
        *path, last = rng.choice(_places(row))
        inner: Any = row
        for key in path:
            inner = inner[key]
        if isinstance(inner, dict) and rng.random() < 0.2:
            del inner[last]
        else:
            inner[last] = copy.deepcopy(rng.choice(ODD))
        if not _places(row):
            break
    return json.dumps(row).encode()


def check(folder: Path, rounds: int) -> None:
    seed = random.SystemRandom().randrange(10**9)
    print("seed", seed)
    rng = random.Random(seed)
    path = folder / "x.jsonl"
    for _ in range(rounds):
        kind, rows = rng.choice(list(ROWS.items()))
        row = rng.choice(rows)
        good = json.dumps(row).encode()
        lines = [good, mutated(row, rng), good, mutated(row, rng), good]
        path.write_bytes(b"\n".join(lines) + b"\n")
        asked = rng.choice([kind, kind, "auto"])
        margins = rng.choice(["given", "ratings", "none"]) if kind == "pairs" else "given"
        print(kind, asked, margins, lines[1][:300], lines[3][:300])
        try:
            found, report = load_rows_with_report(
                path, kind=asked, margins=margins, on_error="skip"
            )
        except DataError as error:
            assert error.cure, error  # noqa: PT017 (any of several calls may raise)
            continue
        assert report.rows_read == len(lines)
        assert set(report.skipped) <= set(CURES)
        assert all("x.jsonl, line " in str(problem) for problem in report.problems)
        check_rows(found)
        describe_rows(found, report.kind)
        # what was kept is read again as it is
        again, _ = load_rows_with_report(found, kind=report.kind)
        assert len(again) == len(found)
        if report.bad:
            with pytest.raises(DataError, match="rows cannot be used"):
                load_rows_with_report(path, kind=asked, margins=margins)


def test_mutated_rows(tmp_path: Path) -> None:
    check(tmp_path, 60)


@pytest.mark.slow
def test_many_mutated_rows(tmp_path: Path) -> None:
    check(tmp_path, 3000)
