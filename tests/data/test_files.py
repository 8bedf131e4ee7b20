"""Every kind of row survives every file format, folder and slice."""

from __future__ import annotations

import gzip
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from datasets.fingerprint import get_temporary_cache_files_directory

from companion import dataset_fingerprint, load_rows, write_rows
from companion.data import KINDS, detect_kind
from companion.data.pages import release_pages
from companion.data.writing import plain_row
from companion.errors import DataError
from companion.training.tokenising import rows_digest

USER = [{"role": "user", "content": "What is 2 + 2?"}]
GOOD = [{"role": "assistant", "content": "4"}]
BAD = [{"role": "assistant", "content": "5"}]

ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs": [
        {"prompt": USER, "chosen": GOOD, "rejected": BAD, "margin": 1.5, "id": "001", "gold": 0.25},
        {
            "prompt": [{"role": "system", "content": "Be brief,\n\"please\" – 'now'."}, *USER],
            "chosen": GOOD,
            "rejected": BAD,
            "margin": 0.0,
            "id": "NA",
            "gold": -1.0,
        },
    ],
    "rankings": [
        {"prompt": "p", "completions": ["a", "b\u2028c", "d"], "ranks": [2.0, 1.0, 2.0], "id": "x"},
    ],
    "outcomes": [
        {"prompt": 'p, "q"\nr', "completion": "NA", "label": False, "correct": True},
        {"prompt": "p", "completion": "[1, 2]", "label": True, "correct": False},
    ],
    "steps": [
        {"prompt": "p", "completions": ["a", "b", "c"], "labels": [1, 0, -1], "rest": ["d"]},
        {"prompt": "p", "completions": ["a", "b"], "labels": [None, 1], "rest": []},
    ],
    "scores": [
        {"prompt": "p", "completion": "a", "score": 0.5, "id": "1"},
        {"prompt": "p", "completion": "NA", "score": -1.25, "id": "2"},
    ],
    "prompts": [{"prompt": USER, "answer": "4"}, {"prompt": USER, "answer": "04"}],
}


def rows_of(source: Any, **arguments: Any) -> list[dict[str, Any]]:
    return [plain_row(row) for row in load_rows(source, **arguments)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz", "x.parquet", "x.csv", "x.tsv"]
)
def test_every_kind_survives_every_format(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    assert write_rows(ROWS[kind], path) == len(ROWS[kind])
    loaded = load_rows(path, kind=kind)
    assert [plain_row(row) for row in loaded] == ROWS[kind]
    assert dataset_fingerprint(loaded) == dataset_fingerprint(ROWS[kind])
    assert detect_kind(loaded.column_names) == kind
    assert rows_of(path, kind="auto") == ROWS[kind]
    # loading what was loaded changes nothing
    assert rows_of(loaded, kind=kind) == ROWS[kind]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl.gz", tmp_path / "other.jsonl.gz"
    write_rows(ROWS["pairs"], a)
    write_rows(ROWS["pairs"], b)
    assert a.read_bytes() == b.read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_folders(tmp_path: Path) -> None:
    rows = ROWS["pairs"]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    DatasetDict(
        {"train": Dataset.from_list(rows[:1]), "test": Dataset.from_list(rows[1:])}
    ).save_to_disk(str(tmp_path / "two"))
    assert rows_of(tmp_path / "one") == rows
    assert rows_of(str(tmp_path / "two"), split="test") == rows[1:]
    with pytest.raises(DataError, match="no split 'validation'") as caught:
        load_rows(tmp_path / "two", split="validation")
    assert "train, test" in str(caught.value.cure)
    files = tmp_path / "files"
    write_rows(rows[:1], files / "data" / "train-00000-of-00002.parquet")
    write_rows(rows[1:], files / "data" / "train-00001-of-00002.parquet")
    write_rows(rows[1:], files / "data" / "test-00000-of-00001.jsonl.gz")
    (files / "README.md").write_text("a card")
    assert rows_of(files) == rows
    assert rows_of(files, split="test") == rows[1:]
    plain = tmp_path / "plain"
    write_rows(rows, plain / "pairs.jsonl")
    assert rows_of(plain) == rows
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="without data"):
        load_rows(tmp_path / "empty")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="no readable `datasets` folder"):
        load_rows(tmp_path / "one")


def test_what_split_writes_can_be_loaded_as_a_folder(tmp_path: Path) -> None:
    write_rows(ROWS["pairs"][:1], tmp_path / "train.jsonl")
    write_rows(ROWS["pairs"][1:], tmp_path / "test.jsonl")
    (tmp_path / "split.json").write_text('{"seed": 0}')
    assert rows_of(tmp_path) == ROWS["pairs"][:1]
    assert rows_of(tmp_path, split="test") == ROWS["pairs"][1:]


def test_a_json_file_of_other_shapes(tmp_path: Path) -> None:
    rows = ROWS["outcomes"]
    path = tmp_path / "x.json"
    for text in (
        json.dumps({"version": 1, "data": rows}),
        "".join(json.dumps(row) + "\n" for row in rows),
        "\ufeff" + json.dumps(rows),
    ):
        path.write_text(text, encoding="utf-8")
        assert rows_of(path, kind="outcomes") == rows
    path.write_text(json.dumps(rows[0]))
    assert rows_of(path, kind="outcomes") == rows[:1]
    path.write_text(json.dumps({"a": [1], "b": [2], "c": 3}).replace('"a"', '"z"'))
    with pytest.raises(DataError, match="2 lists"):
        load_rows(path)


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(gzip.compress((json.dumps(ROWS["outcomes"][0]) + "\n").encode()))
    assert len(load_rows(path, kind="outcomes")) == 1


def test_limit_and_slices() -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(10)]
    bad_tail = [*rows[:4], {"prompt": "x", "chosen": ""}]
    assert len(load_rows(bad_tail, limit=4)) == 4
    assert load_rows(rows, split="train[2:4]")["prompt"][:] == ["p2", "p3"]
    assert len(load_rows(rows, split="train[:50%]")) == 5
    assert len(load_rows(rows, split="train[5:]", limit=2)) == 2


def test_many_rows_lie_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that other processes are sent a path; the key of their token ids stays the same."""
    rows = [{"prompt": f"p{i}", "chosen": GOOD, "rejected": BAD} for i in range(20)]
    in_memory = load_rows(rows)
    monkeypatch.setattr("companion.data.loading._CHUNK", 3)
    monkeypatch.setattr("companion.data.loading._CHUNKS", 2)
    on_disk = load_rows(rows)
    assert (len(in_memory.cache_files), len(on_disk.cache_files)) == (0, 3)
    assert on_disk.to_list() == in_memory.to_list()
    assert rows_digest(on_disk) == rows_digest(in_memory)
    assert len(pickle.dumps(on_disk.select(range(18)))) < 5_000
    files = [Path(file["filename"]) for file in on_disk.cache_files]
    assert all(file.parent == Path(get_temporary_cache_files_directory()) for file in files)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in memory")
def test_pages_that_were_read_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("companion.data.loading._CHUNK", 100)
    monkeypatch.setattr("companion.data.loading._CHUNKS", 2)
    rows = [{"prompt": f"p{i}" * 500, "chosen": "a", "rejected": "b"} for i in range(400)]
    dataset = load_rows(rows)
    files = [file["filename"] for file in dataset.cache_files]

    def resident() -> int:
        """KiB of the dataset's files, as the kernel counts them for this process."""
        own, total = False, 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                own = line.split(maxsplit=5)[-1] in files
            elif own and line.startswith("Rss:"):
                total += int(line.split()[1])
        return total

    assert dataset.to_list() == rows
    assert resident() > 300
    release_pages(dataset)
    assert resident() == 0
    assert dataset.to_list() == rows


def test_a_column_that_the_first_row_lacks_is_kept() -> None:
    """`Dataset.from_list` takes the first row's columns and drops the others."""
    base = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [base, base | {"subset": "s"}]
    assert "subset" not in Dataset.from_list(rows).column_names
    assert load_rows(rows)["subset"][:] == [None, "s"]


@pytest.mark.parametrize("chunks", [16, 2, 1])
def test_chunks_fit_together(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, and on the disk, where the first file has neither the column nor the name."""
    monkeypatch.setattr("companion.data.loading._CHUNK", 3)
    monkeypatch.setattr("companion.data.loading._CHUNKS", chunks)
    named = [{"role": "user", "content": "x", "name": "Ana"}]
    rows = [{"prompt": USER, "chosen": GOOD, "rejected": BAD, "late": None} for _ in range(7)]
    rows += [{"prompt": named, "chosen": GOOD, "rejected": BAD, "late": 0.5}]
    dataset = load_rows(rows)
    assert [plain_row(row) for row in dataset] == rows
    assert [plain_row(row) for row in pickle.loads(pickle.dumps(dataset))] == rows
