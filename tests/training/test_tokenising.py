"""Token ids are kept under a key of all that decides them; many processes give what one gives."""

from __future__ import annotations

import datetime
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, disable_progress_bars
from filelock import FileLock
from forking import Program, run_forked

from companion import RewardFormatter, load_rows, split_by_prompt
from companion.errors import DataError
from companion.training import (
    format_outcomes,
    format_pairs,
    format_rankings,
    format_steps,
    tokenising,
)
from companion.tutor import make_rows

disable_progress_bars()
FORMATS: dict[str, Callable[..., Any]] = {
    "pairs": format_pairs,
    "rankings": format_rankings,
    "outcomes": format_outcomes,
    "steps": lambda *args, **kwargs: format_steps(*args, separator=" <|end|> ", **kwargs),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every set is kept, below this folder."""
    monkeypatch.setattr(tokenising, "CACHE_FROM", 1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "reward-model-companion"


@pytest.fixture
def fresh(make_tokenizer: Callable[..., Any]) -> Callable[..., RewardFormatter]:
    """A formatter that no other test has seen, as a new run would make it."""

    def build(change: Callable[[Any], None] = lambda _: None, **settings: Any) -> RewardFormatter:
        tokenizer = make_tokenizer()
        change(tokenizer)
        return RewardFormatter(tokenizer, **{"max_length": 60, **settings})

    return build


def rows_of(kind: str, n: int = 30) -> Dataset:
    return Dataset.from_list(make_rows(kind, n, seed=3))


@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_second_run_reads_what_the_first_has_written(
    kind: str, cache: Path, fresh: Callable[..., RewardFormatter]
) -> None:
    first, second = fresh(), fresh()
    rows, report = FORMATS[kind](rows_of(kind), first)
    again, same_report = FORMATS[kind](rows_of(kind), second)
    assert first.counts.rows >= 30
    assert second.counts.rows == 0
    assert again.to_list() == rows.to_list()
    assert same_report.to_dict() == report.to_dict()
    assert len(list(cache.glob("*.arrow"))) == 1


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _altered(file: Path) -> None:
    """One token id is another: Arrow reads it as it is."""
    content = bytearray(file.read_bytes())
    ids = [3, 31, 14]
    whole = pa.array(ids, pa.int32()).buffers()[1].to_pybytes()[:4]
    place = content.index(whole, len(content) // 2)
    content[place] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [_cut, _empty, _altered])
def test_damaged_and_altered_ids_are_made_anew(
    damage: Any, cache: Path, fresh: Callable[..., RewardFormatter], caplog: Any
) -> None:
    rows, _ = format_pairs(rows_of("pairs"), fresh())
    want = rows.to_list()
    del rows
    (file,) = cache.glob("*.arrow")
    damage(file)
    again, _ = format_pairs(rows_of("pairs"), fresh())
    assert again.to_list() == want
    assert "made anew" in caplog.text
    caplog.clear()
    last = fresh()
    assert format_pairs(rows_of("pairs"), last)[0].to_list() == want
    assert last.counts.rows == 0
    assert "made anew" not in caplog.text


CHANGES: dict[str, dict[str, Any]] = {
    "template": {"chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}</s>"},
    "max_length": {"max_length": 59},
    "overlong": {"overlong": "truncate_prompt"},
    "a word more": {"change": lambda t: t.add_tokens(["Hope"])},
    "another EOS": {"change": lambda t: setattr(t, "eos_token", "<|end|>")},
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_what_decides_the_ids_is_in_the_key(
    what: str, cache: Path, fresh: Callable[..., RewardFormatter]
) -> None:
    rows = rows_of("pairs")
    before, _ = format_pairs(rows, fresh())
    changed = fresh(**CHANGES[what])
    found, report = format_pairs(rows, changed)
    assert changed.counts.rows == 30
    want = fresh(**CHANGES[what]).encode_pairs(rows.to_list())
    kept = [pair for pair in want if pair is not None]
    assert found["chosen_ids"][:] == [pair[0].input_ids for pair in kept]
    assert report.kept == len(kept)
    if what != "max_length":
        assert found["chosen_ids"][:] != before["chosen_ids"][:]


def test_other_rows_and_other_questions_are_other_keys(
    cache: Path, fresh: Callable[..., RewardFormatter]
) -> None:
    rows = rows_of("outcomes")
    other = rows.to_list()
    other[7]["label"] = not other[7]["label"]
    runs = [
        lambda f: format_outcomes(rows, f),
        lambda f: format_outcomes(rows, f, chat=False),
        lambda f: format_outcomes(Dataset.from_list(other), f),
        lambda f: format_outcomes(rows.select(range(29)), f),
        lambda f: format_outcomes(rows.select(list(range(29, -1, -1))), f),
    ]
    for run in runs:
        formatter = fresh()
        run(formatter)
        assert formatter.counts.rows > 0
    formatter = fresh()
    for run in runs:
        run(formatter)
    assert formatter.counts.rows == 0


def test_ids_of_other_code_are_not_read(
    cache: Path, fresh: Callable[..., RewardFormatter], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of("pairs")
    format_pairs(rows, fresh())
    monkeypatch.setattr(tokenising, "_code_digest", lambda: "changed")
    formatter = fresh()
    format_pairs(rows, formatter)
    assert formatter.counts.rows == 30


def test_merges_that_no_probe_shows_are_in_the_key() -> None:
    """Two tokenizers of one vocabulary, and one recipe, that split 'abc' each in its way."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    keys, ids, recipes = set(), set(), set()
    vocabulary = {word: i for i, word in enumerate(("</s>", "<u>", "a", "b", "c", "ab", "bc"))}
    for merges in ([("a", "b"), ("b", "c")], [("b", "c"), ("a", "b")]):
        core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<u>"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token="</s>", unk_token="<u>"
        )
        formatter = RewardFormatter(tokenizer)
        rows = Dataset.from_list([{"chosen": "abc", "rejected": "a"}])
        recipes.add(formatter.fingerprint())
        ids.add(tuple(tokenizer("abc")["input_ids"]))
        keys.add(tokenising.cache_key(rows, formatter, "pairs", {}, rows.features))
    assert (len(recipes), len(ids), len(keys)) == (1, 2, 2)


def test_a_template_that_writes_the_date_is_kept_for_a_day(
    fresh: Callable[..., RewardFormatter], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2100, 1, 1)

    rows = rows_of("pairs", 2)
    dated = fresh(chat_template="{{ strftime_now('%d') }}{{ messages[0]['content'] }}")
    plain = fresh()

    def keys() -> list[str]:
        return [tokenising.cache_key(rows, f, "pairs", {}, rows.features) for f in (dated, plain)]

    today = keys()
    monkeypatch.setattr("companion.formatting.formatter.Date", Tomorrow)
    assert today == keys()  # its day is fixed when it is made
    dated, plain = fresh(chat_template=dated.chat_template), fresh()
    tomorrow = keys()
    assert today[0] != tomorrow[0]
    assert today[1] == tomorrow[1]


KEY = """
import sys
from pathlib import Path
from companion import load_rows
from companion import split_by_prompt
from companion import RewardFormatter
from companion.training import tokenising
from transformers import AutoTokenizer
formatter = RewardFormatter(AutoTokenizer.from_pretrained(sys.argv[1]), max_length=60)
rows, _ = split_by_prompt(load_rows(sys.argv[2], kind="pairs"), 0.2, seed=0, exact=True)
print(tokenising.cache_key(rows, formatter, "pairs", {"f": tokenising.rows_digest}, rows.features))
"""


def test_the_key_is_the_same_in_another_process(
    tmp_path: Path, fresh: Callable[..., RewardFormatter]
) -> None:
    source = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) + "\n" for row in make_rows("pairs", 40, seed=1)]
    source.write_text("".join(lines), encoding="utf-8")
    formatter = fresh()
    formatter.tokenizer("as the last call left it", truncation=True, max_length=3)
    formatter.tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows, _ = split_by_prompt(load_rows(source, kind="pairs"), 0.2, seed=0, exact=True)
    here = tokenising.cache_key(
        rows, formatter, "pairs", {"f": tokenising.rows_digest}, rows.features
    )
    there = subprocess.run(
        [sys.executable, "-c", KEY, str(tmp_path / "tokenizer"), str(source)],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here


# ---------------------------------------------------------------------- processes


@pytest.mark.parametrize("kind", list(FORMATS))
def test_several_processes_give_what_one_gives(
    kind: str, fresh: Callable[..., RewardFormatter]
) -> None:
    one, report = FORMATS[kind](rows_of(kind, 41), fresh(), num_proc=1)
    three, same_report = FORMATS[kind](rows_of(kind, 41), fresh(), num_proc=3)
    assert three.to_list() == one.to_list()
    assert same_report.to_dict() == report.to_dict()
    assert report.dropped_overlong > 0


def test_an_error_of_a_process_names_the_row(fresh: Callable[..., RewardFormatter]) -> None:
    rows = make_rows("pairs", 20, seed=0)
    rows[13]["rejected"] = [{"role": "assistant", "content": " "}]
    with pytest.raises(DataError, match=r"pairs, row 13.*empty") as caught:
        format_pairs(Dataset.from_list(rows), fresh(), num_proc=2)
    assert caught.value.cure is not None


def test_one_process_for_few_rows_and_at_most_one_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    default = tokenising.default_processes
    monkeypatch.setattr(tokenising.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [default(n) for n in (10, 7_999, 8_000, 33_000, 10**6)] == [1, 1, 2, 8, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default(10**6, alone=False) == 2
    assert default(10**6) == 8  # the other ranks wait for it
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default(10**6, alone=False) == 1
    monkeypatch.setattr(tokenising.multiprocess, "get_all_start_methods", lambda: ["spawn"])
    assert default(10**6) == 1


def test_the_flag_stands_above_the_default(
    cache: Path, fresh: Callable[..., RewardFormatter], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    plain = Dataset.map

    def seen(self: Dataset, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["num_proc"])
        return plain(self, *args, **{**kwargs, "num_proc": None})

    monkeypatch.setattr(Dataset, "map", seen)
    monkeypatch.setattr(tokenising, "default_processes", lambda rows, *, alone: 5 if alone else 4)
    format_pairs(rows_of("pairs"), fresh())
    format_pairs(rows_of("pairs"), fresh(), num_proc=2)
    format_pairs(rows_of("pairs"), fresh(), num_proc=1)
    monkeypatch.setattr(tokenising, "CACHE_FROM", 10**6)
    format_pairs(rows_of("pairs"), fresh())
    assert asked == [5, 2, None, 4]


def test_ranks_wait_for_the_one_that_tokenises(
    cache: Path, fresh: Callable[..., RewardFormatter], caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of("pairs")
    want, _ = format_pairs(rows, fresh())
    (file,) = cache.glob("*.arrow")
    formatter, found = fresh(), []
    held = FileLock(file.with_suffix(".lock"))
    with caplog.at_level(logging.INFO, "companion.training.tokenising"):
        with held:
            other = threading.Thread(target=lambda: found.append(format_pairs(rows, formatter)[0]))
            other.start()
            while not any("waiting" in record.getMessage() for record in caplog.records):
                other.join(0.01)
                assert other.is_alive()
        other.join()
    assert formatter.counts.rows == 0
    assert found[0].to_list() == want.to_list()


RANK = """
import sys
from pathlib import Path
import datasets
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer
from companion.tutor import make_rows
from companion import RewardFormatter
from companion.training import tokenising
from companion.training.rows import format_all, ids_feature
disable_progress_bars()
datasets.config.HF_DATASETS_CACHE = Path(sys.argv[2])
tokenising.CACHE_FROM = 1
formatter = RewardFormatter(AutoTokenizer.from_pretrained(sys.argv[1]))
def to_ids(rows, names, formatter):
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    encoded = formatter.encode_many(texts, names=names)
    return [{"input_ids": text.input_ids, "length": len(text), "cut": 0} for text in encoded]
columns = {"input_ids": ids_feature()}
rows = Dataset.from_list(make_rows("pairs", 200, seed=3))
settings = {"source": "rows", "noun": "texts", "num_proc": None}
rows, _ = format_all(rows, formatter, to_ids, columns, **settings)
print(formatter.counts.rows, sum(map(sum, rows["input_ids"])))
"""


@pytest.mark.distributed
def test_of_two_processes_one_tokenises(
    tmp_path: Path, fresh: Callable[..., RewardFormatter]
) -> None:
    fresh().tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    arguments = [str(tmp_path / name) for name in ("rank.py", "tokenizer", "cache")]
    files = [tmp_path / f"said_{rank}" for rank in range(2)]
    programs = [Program(arguments, {}, str(file)) for file in files]
    codes = run_forked(programs, seconds=300)
    said = [file.read_text(encoding="utf-8") for file in files]
    assert codes == [0, 0], said
    (first, sum_of_first), (second, sum_of_second) = map(str.split, said)
    assert sorted(map(int, (first, second))) == [0, 200]
    assert sum_of_first == sum_of_second
    assert list((tmp_path / "cache").rglob("*.arrow"))


# ---------------------------------------------------------------------- without a cache


def test_nothing_is_kept_of_few_rows_or_where_caching_is_off(
    cache: Path, fresh: Callable[..., RewardFormatter], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.disable_caching()
    try:
        format_pairs(rows_of("pairs"), fresh())
    finally:
        datasets.enable_caching()
    monkeypatch.setattr(tokenising, "CACHE_FROM", 31)
    format_pairs(rows_of("pairs"), fresh())
    assert not cache.exists()


def test_nothing_is_kept_of_a_tokenizer_that_cannot_be_known(
    cache: Path, fresh: Callable[..., RewardFormatter]
) -> None:
    from transformers import PreTrainedTokenizerFast

    class Slow(PreTrainedTokenizerFast):
        is_fast = property(lambda self: False)  # type: ignore[assignment]

    for _ in range(2):
        formatter = fresh(lambda tokenizer: setattr(tokenizer, "__class__", Slow))
        format_pairs(rows_of("pairs"), formatter)
        assert formatter.counts.rows == 30
    assert not cache.exists()


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path,
    cache: Path,
    fresh: Callable[..., RewardFormatter],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "below")
    with caplog.at_level(logging.WARNING, "companion.training.tokenising"):
        rows, _ = format_pairs(rows_of("pairs"), fresh())
    assert len(rows) > 0
    assert "not kept for the next run" in caplog.text
