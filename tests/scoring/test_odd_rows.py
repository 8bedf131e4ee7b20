"""No row ends a run of score or rank: mutated rows, whose seed is printed."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from companion import load_scorer, score_file
from companion.search import rank_file

USER = [{"role": "user", "content": "Ana has 3 pens"}]
GOOD = [{"role": "assistant", "content": "no"}]
ROWS: list[Any] = [
    {"id": "1", "prompt": USER, "completion": GOOD},
    {"id": "2", "prompt": "Ana has 3", "completion": "boxes"},
    {"messages": USER + GOOD, "tools": [{"type": "function", "function": {"name": "add"}}]},
    {"text": "Ana has 3 pens", "terminated": False},
    {"instruction": "Ana", "input": "3", "system": "no", "history": [["Ana", "3"]]}
    | {"completion": "boxes"},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Ana"}]}]}
    | {"completion": GOOD, "chat_template_kwargs": {"enable_thinking": False}},
    [*USER, *GOOD],
    "Ana has 3 pens",
]
#: a row that the tiny template refuses as it is
CALL = [
    {
        "prompt": USER,
        "completion": [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}],
            }
        ],
    },
]
#: what a value becomes
ODD: list[Any] = [
    *(None, True, False, 0, -1, 10**400, 2**70, 0.5, "", " ", "\x00", "é\u2028", "{{ 7 / 0 }}", []),
    *({}, [[]], [{}], [None], ["x"], [1], {"role": "user"}, {"a": {"b": []}}, "x" * 3000, 1e308),
    *([{"role": "user"}], [{"role": 3, "content": "x"}], [{"role": "user", "content": [{}]}]),
    *([{"role": "assistant", "content": {"x": 1}}], [{"from": "gpt", "value": 5}], [["a", "b"]]),
    *([{"type": "image"}], [{"type": "text", "text": 3}], "[", '{"name": 1}', [[["a"]]]),
]
#: lines that are no rows at all
LINES = [
    b"{",
    b"nothing",
    b"7",
    b"null",
    b'{"text": "\\ud800"}',
    b'{"text": "x", "id": NaN}',
    b'{"text": "x", "margin": ' + b"9" * 5000 + b"}",
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"text": "x", "extra": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}",
    b'{"text": "\xff"}',
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += _places(item, (*path, key))
    return found


def mutated(rows: list[Any], rng: random.Random) -> bytes:
    """One row with something else in one or two places; or a line that is none."""
    if rng.random() < 0.1:
        return rng.choice(LINES)
    row = json.loads(json.dumps(rng.choice(rows)))
    if isinstance(row, str):
        return json.dumps(copy.deepcopy(rng.choice(ODD))).encode()
    for _ in range(rng.choice([1, 1, 2])):
        if places := _places(row):
            *path, last = rng.choice(places)
            inner = row
            for key in path:
                inner = inner[key]
            if isinstance(inner, dict) and rng.random() < 0.2:
                del inner[last]
            else:
                inner[last] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(row).encode()


def check_score(scorer: Any, folder: Path, n: int) -> None:
    seed = random.SystemRandom().randrange(10**9)
    print("seed", seed)
    rng = random.Random(seed)
    rng.shuffle(ROWS)
    lines = [
        mutated(ROWS + CALL, rng) if i % 2 else json.dumps(ROWS[i // 2 % len(ROWS)]).encode()
        for i in range(n)
    ]
    want = scorer.score(ROWS).raw
    (folder / "x.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    report = score_file(scorer, folder / "x.jsonl", folder / "y.jsonl", on_error="skip")
    out = [json.loads(line, parse_constant=pytest.fail) for line in (folder / "y.jsonl").open()]
    assert (report.rows, len(out)) == (n, n)
    for i, record in enumerate(out):
        if i % 2 == 0:
            assert record["score"] == pytest.approx(want[i // 2 % len(ROWS)], abs=1e-5), i
        elif record["score"] is None:
            assert f"x.jsonl line {i + 1}" in record["error"] or "tokens" in record["error"], record


def check_rank(scorer: Any, folder: Path, n: int) -> None:
    seed = random.SystemRandom().randrange(10**9)
    print("seed", seed)
    rng = random.Random(seed)
    rows: list[Any] = [
        {"id": 1, "prompt": USER, "completions": ["no", "boxes"], "terminated": [True, True]},
        {"prompt": "Ana has 3", "completions": ["no", "boxes"], "tools": None},
        {"prompt": USER, "completions": [GOOD, [{"role": "assistant", "content": "3"}]]},
    ]
    lines = [mutated(rows, rng) if i % 2 else json.dumps(rows[0]).encode() for i in range(n)]
    (folder / "x.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    ranks = folder / "ranks.jsonl"
    report = rank_file(
        scorer, folder / "x.jsonl", folder / "y.jsonl", ranks_path=ranks, on_error="skip"
    )
    out = [json.loads(line, parse_constant=pytest.fail) for line in ranks.open()]
    assert (report.rows, len(out)) == (n, n)
    first = out[0]["completions"]
    for i, record in enumerate(out):
        if i % 2 == 0:
            assert [one["place"] for one in record["completions"]] == [
                one["place"] for one in first
            ]
        elif "error" in record:
            assert f"x.jsonl line {i + 1}" in record["error"] or "tokens" in record["error"], record


def test_mutated_rows_are_scored_or_named(tiny_reward: Path, tmp_path: Path) -> None:
    check_score(load_scorer(tiny_reward, device="cpu"), tmp_path, 120)


def test_mutated_rows_are_ranked_or_named(tiny_reward: Path, tmp_path: Path) -> None:
    check_rank(load_scorer(tiny_reward, device="cpu"), tmp_path, 120)


@pytest.mark.slow
def test_many_mutated_rows(tiny_reward: Path, tmp_path: Path) -> None:
    scorer = load_scorer(tiny_reward, device="cpu")
    for round_ in range(8):
        for name, check in (("score", check_score), ("rank", check_rank)):
            folder = tmp_path / f"{name}{round_}"
            folder.mkdir()
            check(scorer, folder, 400)
