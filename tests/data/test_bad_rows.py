"""Each mistake in a file has its own message: the place, the field, the cure."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from companion import load_rows, load_rows_with_report, write_rows
from companion.data.problems import CURES
from companion.data.readers import read_file
from companion.errors import DataError

USER = [{"role": "user", "content": "What is 2 + 2?"}]
GOOD = [{"role": "assistant", "content": "4"}]
BAD = [{"role": "assistant", "content": "5"}]


def pair(**changes: Any) -> dict[str, Any]:
    row = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"} | changes
    return {key: value for key, value in row.items() if value is not ...}


def chat(**changes: Any) -> dict[str, Any]:
    return pair(**({"prompt": USER, "chosen": GOOD, "rejected": BAD} | changes))


def outcome(**changes: Any) -> dict[str, Any]:
    row = {"prompt": "2 + 2 =", "completion": " 4", "label": True} | changes
    return {key: value for key, value in row.items() if value is not ...}


def steps(**changes: Any) -> dict[str, Any]:
    row = {"prompt": "2 + 2 =", "completions": ["a", "b"], "labels": [1, -1]} | changes
    return {key: value for key, value in row.items() if value is not ...}


def ranking(**changes: Any) -> dict[str, Any]:
    row = {"prompt": "2 + 2 =", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]} | changes
    return {key: value for key, value in row.items() if value is not ...}


def said(role: str, content: Any = "x") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


# kind, a good row, the bad row, reason, field
CASES: list[tuple[str, Callable[..., dict[str, Any]], dict[str, Any], str, str]] = [
    ("pairs", pair, {"rejected": ...}, "missing field", "rejected"),
    ("pairs", pair, {"prompt": ...}, "missing field", "prompt"),
    ("pairs", pair, {"prompt": None}, "null", "prompt"),
    ("pairs", pair, {"chosen": None}, "null", "chosen"),
    ("pairs", pair, {"chosen": 4}, "wrong type", "chosen"),
    ("pairs", pair, {"chosen": " 5"}, "chosen equals rejected", "chosen"),
    ("pairs", pair, {"chosen": "5 \n"}, "chosen equals rejected", "chosen"),
    ("pairs", pair, {"rejected": ""}, "empty completion", "rejected"),
    ("pairs", pair, {"rejected": " \n"}, "empty completion", "rejected"),
    ("pairs", pair, {"prompt": " "}, "empty prompt", "prompt"),
    ("pairs", pair, {"chosen": GOOD}, "mixed types", "rejected"),
    ("pairs", pair, {"chosen": GOOD, "rejected": BAD}, "mixed types", "prompt"),
    ("pairs", chat, {"chosen": [], "rejected": BAD}, "empty completion", "chosen"),
    ("pairs", chat, {"chosen": said("assistant", " ")}, "empty completion", "chosen"),
    ("pairs", chat, {"chosen": said("user")}, "empty completion", "chosen"),
    ("pairs", chat, {"chosen": said("assistent")}, "unknown role", "chosen"),
    ("pairs", chat, {"prompt": said("narrator")}, "unknown role", "prompt"),
    ("pairs", chat, {"prompt": [{"content": "x"}]}, "missing field", "prompt"),
    ("pairs", chat, {"prompt": [{"role": "user"}]}, "missing field", "prompt"),
    ("pairs", chat, {"prompt": ["x"]}, "wrong type", "prompt"),
    ("pairs", chat, {"prompt": said("user", 5)}, "wrong type", "prompt"),
    ("pairs", chat, {"rejected": GOOD}, "chosen equals rejected", "chosen"),
    ("pairs", chat, {"prompt": ...}, "no shared prompt", "chosen"),
    ("outcomes", outcome, {"label": 2}, "label not bool", "label"),
    ("outcomes", outcome, {"label": "true"}, "label not bool", "label"),
    ("outcomes", outcome, {"label": None}, "null", "label"),
    ("outcomes", outcome, {"label": ...}, "missing field", "label"),
    ("outcomes", outcome, {"completion": ""}, "empty completion", "completion"),
    ("outcomes", outcome, {"prompt": ...}, "missing field", "prompt"),
    ("steps", steps, {"labels": [1]}, "lengths differ", "labels"),
    ("steps", steps, {"labels": [1, 2]}, "unknown label", "labels[1]"),
    ("steps", steps, {"labels": [1, "+"]}, "mixed types", "labels"),
    ("steps", steps, {"labels": ["-", "+"]}, "unknown label", "labels[0]"),
    ("steps", steps, {"labels": [1, True]}, "mixed types", "labels"),
    ("steps", steps, {"completions": ["a", ""]}, "empty completion", "completions[1]"),
    ("steps", steps, {"completions": ["a", None]}, "null", "completions[1]"),
    ("steps", steps, {"completions": [], "labels": []}, "empty completion", "completions"),
    ("steps", steps, {"completions": "a"}, "wrong type", "completions"),
    ("rankings", ranking, {"ranks": [1, 2]}, "lengths differ", "ranks"),
    ("rankings", ranking, {"ranks": [1, 2, float("nan")]}, "malformed JSON", "ranks"),
    ("rankings", ranking, {"ranks": [1, 2, 10**400]}, "rating not finite", "ranks[2]"),
    ("pairs", pair, {"id": float("nan")}, "malformed JSON", "id"),
    ("pairs", pair, {"id": -float("inf")}, "malformed JSON", "id"),
    ("pairs", pair, {"id": 2**63}, "number too large", "id"),
    ("pairs", pair, {"votes": [1, 2**64]}, "number too large", "votes"),
    ("pairs", pair, {"votes": [1, "x"]}, "mixed types", "votes"),
    ("rankings", ranking, {"ranks": [1, 2, "x"]}, "rating not finite", "ranks[2]"),
    ("rankings", ranking, {"ranks": ...}, "missing field", "ranks"),
    ("rankings", ranking, {"completions": ["a"]}, "too few completions", "completions"),
    ("rankings", ranking, {"completions": ["a", "b", " "]}, "empty completion", "completions[2]"),
    ("rankings", ranking, {"completions": ["a", "b", GOOD]}, "mixed types", "completions"),
]


@pytest.mark.parametrize(("kind", "make", "change", "reason", "field"), CASES)
def test_a_bad_row_is_named(
    tmp_path: Path,
    kind: str,
    make: Callable[..., dict[str, Any]],
    change: dict[str, Any],
    reason: str,
    field: str,
) -> None:
    path = tmp_path / "x.jsonl"
    rows = [make(), make(), make(**change), make()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        load_rows(path, kind=kind)
    assert f"x.jsonl, line 3, field '{field}': {reason}" in caught.value.what
    assert "1 of 4 rows" in caught.value.what
    assert caught.value.cure is not None
    assert CURES[reason] in caught.value.cure
    # the same row skipped: three are left, one is counted
    dataset, report = load_rows_with_report(path, kind=kind, on_error="skip")
    assert (len(dataset), dict(report.skipped)) == (3, {reason: 1})
    # and a good file has nothing to say
    assert len(load_rows([make(), make()], kind=kind)) == 2


@pytest.mark.parametrize("margin", [float("nan"), float("inf"), "big", True, 10**400])
def test_a_margin_must_be_a_finite_number(tmp_path: Path, margin: Any) -> None:
    path = tmp_path / "x.jsonl"
    rows = [pair(margin=1), pair(margin=margin)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"line 2, field 'margin': (margin not fin|malformed JSON)"):
        load_rows(path)
    with pytest.raises(DataError, match=r"row 1, field 'margin': margin not finite"):
        load_rows(rows)


def test_a_margin_that_only_some_rows_have() -> None:
    rows = [pair(margin=1.0), pair(margin=2.0), pair()]
    with pytest.raises(DataError, match=r"row 2, field 'margin': missing field"):
        load_rows(rows)
    with pytest.raises(DataError, match=r"row 2, field 'margin': null"):
        load_rows([*rows[:2], pair(margin=None)])
    # a column that is null throughout is no column
    assert "margin" not in load_rows([pair() | {"margin": None}] * 2).column_names


def test_an_odd_first_row_is_the_odd_one() -> None:
    with pytest.raises(DataError, match=r"1 of 4 rows.*\n.*row 0, field 'prompt': mixed types"):
        load_rows([chat(), pair(), pair(), pair()])


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (b'{"prompt": "x", "chosen": ', "Expecting value at column"),
        (b"{'prompt': 'x'}", "Expecting property name"),
        (b"[1, 2", "Expecting ',' delimiter"),
        (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', "invalid start byte"),
        (b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "surrogates not allowed"),
        (b'{"prompt": "x", "id": ' + b"9" * 5000 + b"}", "limit (4300 digits)"),
        (b'{"prompt": "x", "id": NaN}', "NaN is no JSON"),
    ],
)
def test_malformed_json_names_the_line(tmp_path: Path, line: bytes, detail: str) -> None:
    path = tmp_path / "x.jsonl"
    good = json.dumps(pair()).encode()
    path.write_bytes(b"\n".join([good, b"", good, line, good, b""]))
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert "x.jsonl, line 4" in caught.value.what
    assert ": malformed JSON" in caught.value.what
    assert detail in caught.value.what
    assert len(load_rows(path, on_error="skip")) == 3


@pytest.mark.parametrize("levels", [60, 5000, 200_000])
def test_a_row_that_is_nested_too_deeply(tmp_path: Path, levels: int) -> None:
    path = tmp_path / "x.jsonl"
    deep = json.dumps(pair())[:-1] + ', "extra": ' + "[" * levels + "]" * levels + "}"
    path.write_text("\n".join([json.dumps(pair()), deep, json.dumps(pair())]))
    with pytest.raises(DataError, match="line 2: nested too deeply"):
        load_rows(path)
    assert len(load_rows(path, on_error="skip")) == 2
    path.write_text(json.dumps(pair())[:-1] + ', "extra": ' + "[" * 49 + "]" * 49 + "}")
    assert len(load_rows(path)) == 1


def test_a_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    os.mkfifo(path)
    for source in (path, "/dev/null"):
        with pytest.raises(DataError, match=r"pipe or a device.*\n.*write them to a file"):
            load_rows(source)
    with pytest.raises(DataError, match="pipe or a device"):
        list(read_file(path))


def test_a_line_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(pair()) + '\n["a", "b"]\n')
    with pytest.raises(DataError, match="line 2: not a row"):
        load_rows(path)


def test_five_errors_in_one_message_and_all_counted() -> None:
    rows = [pair(chosen="") for _ in range(7)] + [pair(rejected=None)] * 2 + [pair()] * 5
    with pytest.raises(DataError) as caught:
        load_rows(rows)
    text = caught.value.what
    assert "9 of 14 rows cannot be used (7 empty completion, 2 null)" in text
    assert sum("field" in line for line in text.splitlines()) == 5
    assert "and 4 more" in text
    cure = str(caught.value.cure)
    assert CURES["empty completion"] in cure
    assert CURES["null"] in cure


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_other_formats_name_the_row_index(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    write_rows([pair(), pair(), pair(rejected="")], path)
    with pytest.raises(DataError, match=rf"x{suffix}, row 2\b.*field 'rejected': empty completion"):
        load_rows(path)


def test_csv_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('prompt,chosen,rejected\np,a,b\np,"a,b\nc",d\np,a\np,a,b,c\n')
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert "row 2 (line 5): malformed CSV (fewer cells" in caught.value.what
    assert "row 3 (line 6): malformed CSV (more cells" in caught.value.what
    path.write_text('prompt,chosen,rejected\np,a,b\np,"a,b\n')
    with pytest.raises(DataError, match=r"row 1 .*malformed CSV"):
        load_rows(path)
    path.write_text("prompt,chosen,chosen\np,a,b\n")
    with pytest.raises(DataError, match="same name"):
        load_rows(path)
    path.write_text("prompt,completion,label\np,a,maybe\n")
    with pytest.raises(DataError, match="'maybe' is str"):
        load_rows(path, kind="outcomes")


def test_missing_files_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in ("nothing.jsonl", "./nothing", "a/b/c", "data/x.parquet", str(tmp_path / "no")):
        with pytest.raises(DataError, match="missing file"):
            load_rows(source)
    with pytest.raises(DataError, match="missing file"):
        load_rows(Path("nothing"))


def test_a_hub_id_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach 'org/pairs' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"no file or folder 'org/pairs'.*HF_HUB_OFFLINE is set"):
        load_rows("org/pairs")


def test_a_hub_id_gives_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def fetched(source: str, name: str | None, **kwargs: Any) -> Any:
        asked.update(kwargs, source=source, name=name)
        return datasets.Dataset.from_list([pair(chosen=f"c{i}") for i in range(10)])

    monkeypatch.setattr(datasets, "load_dataset", fetched)
    rows = load_rows("org/pairs", split="test[2:4]", name="de", revision="abc")
    assert rows["chosen"][:] == ["c2", "c3"]
    assert asked == {"source": "org/pairs", "name": "de", "split": "test", "revision": "abc"}


def test_empty_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="empty dataset"):
        load_rows(path)
    with pytest.raises(DataError, match="empty dataset"):
        load_rows([])
    packed = gzip.compress("".join(json.dumps(pair()) + "\n" for _ in range(50)).encode())
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(packed[:-20])
    for on_error in ("raise", "skip"):  # how many rows are lost is unknown: skipping would hide it
        with pytest.raises(DataError, match="damaged or cut short"):
            load_rows(cut, on_error=on_error)
    fake = tmp_path / "x.parquet"
    fake.write_text("no parquet")
    with pytest.raises(DataError, match="no readable Parquet"):
        load_rows(fake)
    other = tmp_path / "x.txt"
    other.write_text("x")
    with pytest.raises(DataError, match="cannot tell the format"):
        load_rows(other)
    broken = tmp_path / "x.json"
    broken.write_text('[\n{"prompt": }\n]')
    with pytest.raises(DataError, match="line 2, column 12"):
        load_rows(broken)
    latin = tmp_path / "x.csv"
    latin.write_bytes("prompt,chosen,rejected\np,é,b\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        load_rows(latin)


def test_columns_that_fit_no_kind() -> None:
    with pytest.raises(DataError, match="do not fit pairs: answer, question"):
        load_rows([{"question": "x", "answer": "y"}])
    with pytest.raises(DataError) as caught:
        load_rows([outcome()], kind="pairs")
    assert "these look like outcomes" in str(caught.value.cure)
    with pytest.raises(DataError, match="no kind of rows"):
        load_rows([{"question": "x"}], kind="auto")
    with pytest.raises(DataError, match="no kind 'pair'"):
        load_rows([pair()], kind="pair")


def test_renaming_mistakes() -> None:
    with pytest.raises(DataError, match="no column 'question' to rename"):
        load_rows([pair(prompt=...)], columns={"question": "prompt"})
    with pytest.raises(DataError, match="meets a column of that name"):
        load_rows([pair(question="x")], columns={"question": "prompt"})


def test_wrong_arguments() -> None:
    with pytest.raises(DataError, match="on_error"):
        load_rows([pair()], on_error="ignore")
    with pytest.raises(DataError, match="margins"):
        load_rows([pair()], margins="yes")
    with pytest.raises(DataError, match="limit"):
        load_rows([pair()], limit=0)
    with pytest.raises(DataError, match="cannot load rows from int"):
        load_rows(5)
    with pytest.raises(DataError, match="split"):
        load_rows([pair()], split="train[1:x]")


def test_another_column_of_mixed_types_is_named() -> None:
    rows = [pair(id="a"), pair(id="b"), pair(id=3)]
    with pytest.raises(DataError, match=r"row 2, field 'id': mixed types \(number here, text in"):
        load_rows(rows)
    assert load_rows(rows, on_error="skip")["id"][:] == ["a", "b"]


@pytest.mark.parametrize("chunks", [16, 1])
def test_mixed_types_between_chunks(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("companion.data.loading._CHUNK", 2)
    monkeypatch.setattr("companion.data.loading._CHUNKS", chunks)
    with pytest.raises(DataError, match=r"mixed types: the chunks that begin at dataset, row 0"):
        load_rows([pair(id="a"), pair(id="b"), pair(id=date.today()), pair(id=date.today())])


def test_nothing_usable_is_an_error_even_when_skipping() -> None:
    with pytest.raises(DataError, match="none of 2 rows"):
        load_rows([pair(chosen="")] * 2, on_error="skip")


def test_skipping_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    load_rows([pair(), pair(chosen="")], on_error="skip")
    assert "skipped: 1 empty completion" in caplog.text
    assert "row 1, field 'chosen'" in caplog.text
