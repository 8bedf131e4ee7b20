"""What stands beside a row in its file makes no difference to its tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Json, concatenate_datasets
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from companion import RewardFormatter, load_rows, write_rows
from companion.data import dataset_fingerprint
from companion.data.columns import ExactJson, array_of
from companion.data.writing import plain_row
from companion.training.pairwise import format_pairs

SEED = 20240
#: writes all that it is given, so that a key more or a digit less is seen
TEMPLATE = (
    "{{ tools | tojson }}{{ mode | default('none') | tojson }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.name }}"
    "{{ m.tool_calls | default('none') | tojson }}{{ m.extra | default('none') | tojson }}"
    "{% endfor %}{{ eos_token }}"
)

CALLS = [
    {
        "prompt": [{"role": "user", "content": "?"}],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [{"f": arguments}]}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for arguments in ({"city": "Oslo"}, {"x": 2})
]


def byte_level_tokenizer() -> Any:
    """A token a byte, so that ids differ wherever texts do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<eos>"],
        show_progress=False,
    )
    core.train_from_iterator(["x"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def value(rng: random.Random, depth: int = 2) -> Any:
    if depth and rng.random() < 0.5:
        keys = rng.sample(["a", "b", "role", "content", "x y", "null", "é"], rng.randint(0, 3))
        inner = {key: value(rng, depth - 1) for key in keys}
        return inner if rng.random() < 0.7 else list(inner.values())
    return rng.choice(
        [None, True, 0, 2, 2.0, 0.1, rng.random(), 2**70, "2", "null", '{"a": 1}', "", "\U0001f600"]
    )


def call(rng: random.Random) -> dict[str, Any]:
    arguments: Any = {"n": value(rng)} if rng.random() < 0.7 else json.dumps({"n": value(rng)})
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def row(rng: random.Random) -> dict[str, Any]:
    answer: dict[str, Any] = {"role": "assistant", "content": "4"}
    if rng.random() < 0.5:
        answer["tool_calls"] = [call(rng) for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.4:
        answer["extra"] = value(rng) if rng.random() < 0.5 else "text"
    if rng.random() < 0.3:
        answer["name"] = "Ana"
    answer = {key: item for key, item in answer.items() if item is not None}
    out: dict[str, Any] = {
        "prompt": [{"role": "user", "content": f"{rng.random()}"}],
        "chosen": [answer],
        "rejected": [{"role": "assistant", "content": "five"}],
    }
    if rng.random() < 0.6:
        tools: Any = [{"name": "f", "parameters": value(rng)} for _ in range(rng.randint(0, 2))]
        out["tools"] = json.dumps(tools) if rng.random() < 0.2 else tools
    if rng.random() < 0.4:
        out["chat_template_kwargs"] = {"mode": value(rng)}
    if rng.random() < 0.5:
        out["metadata"] = {"k": value(rng)}
    return out


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    print("seed", SEED)
    rng = random.Random(SEED)
    return [row(rng) for _ in range(120)]


def ids(formatter: RewardFormatter, rows: Any) -> list[Any]:
    return formatter.encode_pairs([dict(row) for row in rows])


@pytest.mark.parametrize(("chunk", "chunks"), [(7, 16), (7, 2), (4096, 16)])
def test_ids_are_those_of_the_row_alone(
    rows: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    chunks: int,
) -> None:
    """In one table, in several, and in several files."""
    monkeypatch.setattr("companion.data.loading._CHUNK", chunk)
    monkeypatch.setattr("companion.data.loading._CHUNKS", chunks)
    formatter = RewardFormatter(byte_level_tokenizer(), chat_template=TEMPLATE)
    want = ids(formatter, rows)
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_rows(path)
    assert ids(formatter, loaded) == want
    # the wrong implementation: Arrow's own columns
    plain = Dataset.from_list(CALLS)
    assert ids(formatter, plain) != ids(formatter, CALLS) == ids(formatter, load_rows(CALLS))
    # whatever is done with it, and however it is kept
    loaded.save_to_disk(tmp_path / "saved")
    for suffix in ("parquet", "jsonl"):
        write_rows(loaded, tmp_path / f"y.{suffix}")
    for source in ("saved", "y.parquet", "y.jsonl"):
        again = load_rows(tmp_path / source)
        assert ids(formatter, again) == want, source
        assert dataset_fingerprint(again) == dataset_fingerprint(rows), source
    halves = loaded.select(range(60)), loaded.select(range(60, 120))
    assert ids(formatter, concatenate_datasets(list(halves))) == want
    assert ids(formatter, load_rows(loaded, limit=40)) == want[:40]
    formatted, _ = format_pairs(loaded, formatter, num_proc=2)
    assert [(list(a.input_ids), list(b.input_ids)) for a, b in want] == [
        (one["chosen_ids"], one["rejected_ids"]) for one in formatted
    ]


def test_columns_of_text_and_numbers_are_plain() -> None:
    base = {"prompt": "p", "chosen": "a", "rejected": "b", "id": "x", "score": 1.5, "n": [1, 2]}
    chat = {
        "prompt": [{"role": "user", "content": "x", "name": "Ana"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    for one in (base, chat):
        features = load_rows([one] * 2).features
        assert "Json" not in repr(features)
        assert features == Dataset.from_list([one] * 2).features


def test_the_json_of_datasets_is_not_exact() -> None:
    """If this fails, ExactJson can go."""
    number = "0.002054944418186575"
    assert Json().decode_example(number) != json.loads(number)
    assert ExactJson().decode_example(number) == json.loads(number)
    assert Json().encode_example("2") == "2"  # the text has become a number
    assert ExactJson().decode_example(ExactJson().encode_example("2")) == "2"


def test_nulls_of_a_parquet_file_that_arrow_merged_are_absent_keys(tmp_path: Path) -> None:
    merged = pa.Table.from_pylist(CALLS)
    assert merged.to_pylist()[0]["chosen"][0]["tool_calls"][0]["f"]["x"] is None
    pq.write_table(merged, tmp_path / "x.parquet")
    for source in (tmp_path / "x.parquet", Dataset(merged)):
        assert [plain_row(row) for row in load_rows(source)] == CALLS


def test_what_is_no_json_stays_as_arrow_has_it() -> None:
    assert array_of([{"bytes": b"x"}]).to_pylist() == [{"bytes": b"x"}]
    assert array_of([{"a": 1}, None]).type == pa.json_()
