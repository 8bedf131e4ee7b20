"""The formatter: TRL's ids where TRL is right, one BOS, one EOS, nothing lost without a count."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from companion.errors import DataError, ModelError, ReadoutError
from companion.formatting import FormatCounts, RewardFormatter

USER = {"role": "user", "content": "Ana has 3 boxes . How many ?"}
GOOD = {"role": "assistant", "content": "the answer is 3"}
BAD = {"role": "assistant", "content": "no 4"}
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def byte_level_tokenizer() -> Any:
    """Like Qwen's: byte-level BPE that adds nothing to plain text; merges across word borders."""
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    core.train_from_iterator(["Ana has three boxes. How many now? The answer is 3."] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return byte_level_tokenizer()


def trl_ids(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The ids that TRL's RewardTrainer makes of a pair: the oracle."""
    from datasets import Dataset
    from trl import RewardTrainer

    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None)
    done = RewardTrainer._prepare_dataset(
        None, Dataset.from_list([row]), tokenizer, arguments, "train"
    )
    return done[0]["chosen_ids"], done[0]["rejected_ids"]


TRL_ROWS = {
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "system and turns": {
        "prompt": [{"role": "system", "content": "Yes"}, USER, GOOD, USER],
        "chosen": [GOOD],
        "rejected": [BAD],
    },
    "text": {"prompt": "Ana has 3 boxes", "chosen": " the answer is 3", "rejected": " no"},
    "text with EOS": {"chosen": "Ana has 3 boxes{eos}", "rejected": "no{eos}"},
    "tools": {
        "prompt": [USER],
        "chosen": [GOOD],
        "rejected": [BAD],
        "tools": json.dumps([{"type": "function", "function": {"name": "more"}}]),
    },
}


@pytest.mark.parametrize("name", TRL_ROWS)
@pytest.mark.parametrize("which", ["words", "bytes"])
def test_ids_are_those_of_trl(name: str, which: str, tiny_tokenizer: Any, byte_level: Any) -> None:
    tokenizer = tiny_tokenizer if which == "words" else byte_level
    row = {
        k: v.replace("{eos}", tokenizer.eos_token) if isinstance(v, str) else v
        for k, v in TRL_ROWS[name].items()
    }
    pair = RewardFormatter(tokenizer).encode_pair(dict(row))
    assert pair is not None
    assert (pair[0].input_ids, pair[1].input_ids) == trl_ids(tokenizer, row)


def test_text_that_begins_with_bos_gets_one_where_trl_gives_two(tiny_tokenizer: Any) -> None:
    bos, eos = tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id
    row = {"chosen": "<s>Ana has 3", "rejected": "<s>no"}
    assert trl_ids(tiny_tokenizer, row)[0][:2] == [bos, bos]  # reward-bench #164
    formatter = RewardFormatter(tiny_tokenizer)
    pair = formatter.encode_pair(row)
    plain = formatter.encode("Ana has 3")
    assert pair is not None
    assert plain is not None
    assert pair[0].input_ids == plain.input_ids
    assert plain.input_ids.count(bos) == plain.input_ids.count(eos) == 1


def test_tokenizer_that_adds_eos_itself_gives_one(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(adds_eos=True)
    assert trl_ids(tokenizer, {"chosen": "Ana", "rejected": "no"})[0].count(2) == 2
    formatter = RewardFormatter(tokenizer)
    for text in ("Ana has", "Ana has</s>", "Ana has</s></s>"):
        encoded = formatter.encode(text)
        assert encoded is not None
        assert encoded.input_ids.count(tokenizer.eos_token_id) == 1
        assert encoded.input_ids[-1] == tokenizer.eos_token_id
    cut = formatter.encode("Ana has", terminated=False)
    assert cut is not None
    assert cut.input_ids[-1] != tokenizer.eos_token_id


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.text(max_size=8))
def test_cut_off_text_lacks_nothing_but_its_end(completion: str, prompt: str) -> None:
    tokenizer = _BYTES
    formatter = RewardFormatter(tokenizer)
    whole = formatter.encode(prompt, completion)
    cut = formatter.encode(prompt, completion, terminated=False)
    assert whole is not None
    assert cut is not None
    assert whole.input_ids == [*cut.input_ids, tokenizer.eos_token_id]
    assert tokenizer.decode(cut.input_ids) == prompt + completion
    # the prompt's tokens decode to a beginning of the prompt (a straddling token is completion)
    head = tokenizer.decode(whole.input_ids[: whole.prompt_length])
    assert prompt.startswith(head.rstrip("\N{REPLACEMENT CHARACTER}"))
    if prompt and formatter.encode("", completion) is not None:
        assert whole.prompt_length <= len(whole) - 1


_BYTES = byte_level_tokenizer()


def test_messages_that_are_cut_off_have_no_end_of_turn(byte_level: Any) -> None:
    formatter = RewardFormatter(byte_level)
    whole, cut = (formatter.encode([USER], [GOOD], terminated=t) for t in (True, False))
    assert whole is not None
    assert cut is not None
    assert byte_level.decode(whole.input_ids).endswith("the answer is 3<|im_end|>\n")
    assert byte_level.decode(cut.input_ids).endswith("the answer is 3")
    assert whole.input_ids[: len(cut)] == cut.input_ids
    assert (whole.terminated, cut.terminated) == (True, False)
    assert formatter.counts.unterminated == 1


@pytest.mark.parametrize("which", ["words", "bytes", "transcript"])
def test_prompt_length_is_the_border(which: str, make_tokenizer: Any, byte_level: Any) -> None:
    tokenizer = {
        "words": make_tokenizer(),
        "bytes": byte_level,
        "transcript": make_tokenizer(chat_template=None),
    }[which]
    formatter = RewardFormatter(tokenizer)
    good, bad = (formatter.encode([USER], [answer]) for answer in (GOOD, BAD))
    assert good is not None
    assert bad is not None
    assert good.prompt_length == bad.prompt_length
    assert good.input_ids[: good.prompt_length] == bad.input_ids[: bad.prompt_length]
    tail = tokenizer.decode(good.input_ids[good.prompt_length :], skip_special_tokens=True)
    assert tail.split() == GOOD["content"].split()


def test_prompt_length_of_text_counts_bos(tiny_tokenizer: Any) -> None:
    encoded = RewardFormatter(tiny_tokenizer).encode("Ana has", " 3 boxes")
    assert encoded is not None
    assert encoded.prompt_length == 3  # BOS, Ana, has


def test_all_kinds_of_rows_agree(tiny_tokenizer: Any) -> None:
    formatter = RewardFormatter(tiny_tokenizer)
    rows = [
        [USER, GOOD],
        {"messages": [USER, GOOD]},
        {"prompt": [USER], "completion": [GOOD]},
        {"prompt": [USER], "completion": GOOD["content"]},
        {"prompt": None, "completion": [USER, GOOD]},
        {"prompt": [USER | {"name": None}], "completion": [GOOD], "tools": None},
    ]
    encoded = formatter.encode_many(rows)
    assert all(item == encoded[0] for item in encoded)
    texts = formatter.encode_many(["Ana has 3", {"text": "Ana has 3"}, {"completion": "Ana has 3"}])
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != encoded[0]


def test_encode_many_is_encode_and_calls_the_tokenizer_once(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    formatter = RewardFormatter(tiny_tokenizer)
    rows = [{"prompt": [USER], "completion": [{**GOOD, "content": f"no {i}"}]} for i in range(20)]
    alone = [formatter.encode_row(row) for row in rows]
    sizes: list[int] = []
    kind = type(tiny_tokenizer)
    original = kind.__call__

    def counting(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(text) if isinstance(text, list) else 1)
        return original(self, text, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counting)
    assert formatter.encode_many(rows) == alone
    assert sizes == [20]


def test_row_says_that_it_was_cut_off(tiny_tokenizer: Any) -> None:
    formatter = RewardFormatter(tiny_tokenizer)
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "rejected_terminated": False}
    pair = formatter.encode_pair(row)
    assert pair is not None
    assert (pair[0].terminated, pair[1].terminated) == (True, False)
    assert pair[1].input_ids[-1] != tiny_tokenizer.eos_token_id
    over = formatter.encode_row({"text": "Ana", "terminated": False}, terminated=True)
    assert over is not None
    assert over.terminated
    with pytest.raises(DataError, match="ends with '</s>'"):
        formatter.encode("Ana has</s>", terminated=False)


# ---------------------------------------------------------------------- length


def test_drop_counts_the_row(tiny_tokenizer: Any) -> None:
    formatter = RewardFormatter(tiny_tokenizer, max_length=8)
    long = {"text": "Ana has 3 boxes with 4 pens each"}
    assert formatter.encode_many([{"text": "Ana"}, long])[1] is None
    assert formatter.encode_pair({"chosen": "Ana", "rejected": long["text"]}) is None
    assert formatter.counts == FormatCounts(rows=3, sequences=1, dropped_overlong=2)
    assert formatter.counts.to_dict()["rows"] == 3
    formatter.reset_counts()
    assert formatter.counts == FormatCounts()


def test_error_names_the_row(tiny_tokenizer: Any) -> None:
    formatter = RewardFormatter(tiny_tokenizer, max_length=4, overlong="error")
    with pytest.raises(DataError, match=r"row 1, 'text': 7 tokens, 3 more than max_length=4"):
        formatter.encode_many(["Ana", {"text": "Ana has 3 boxes ?"}])


@pytest.mark.parametrize("max_length", range(3, 14))
def test_truncation_keeps_bos_and_the_completion(tiny_tokenizer: Any, max_length: int) -> None:
    full = RewardFormatter(tiny_tokenizer).encode("Ana has 3 boxes and 4", " the answer is")
    formatter = RewardFormatter(tiny_tokenizer, max_length=max_length, overlong="truncate_prompt")
    cut = formatter.encode("Ana has 3 boxes and 4", " the answer is")
    assert full is not None
    assert len(full) == 11
    completion = full.input_ids[full.prompt_length :]
    if max_length < 1 + len(completion):  # BOS and the completion alone do not fit
        assert cut is None
        assert formatter.counts.dropped_overlong == 1
        return
    assert cut is not None
    assert len(cut) == min(max_length, len(full))
    assert cut.cut_tokens == len(full) - len(cut) == formatter.counts.tokens_cut
    assert formatter.counts.truncated == (cut.cut_tokens > 0)
    assert cut.input_ids[0] == tiny_tokenizer.bos_token_id
    assert cut.input_ids[cut.prompt_length :] == completion
    # what is left of the prompt is its right end
    assert full.input_ids[1 + cut.cut_tokens :] == cut.input_ids[1:]


def test_a_side_of_a_pair_is_cut_as_it_is_alone(tiny_tokenizer: Any) -> None:
    formatter = RewardFormatter(tiny_tokenizer, max_length=12, overlong="truncate_prompt")
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    pair = formatter.encode_pair(row)
    assert pair is not None
    assert pair[0].cut_tokens > pair[1].cut_tokens > 0
    assert pair == (formatter.encode([USER], [GOOD]), formatter.encode([USER], [BAD]))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [USER], "completion": "  "}, "completion is empty"),
        ({"prompt": "Ana", "completion": ""}, "completion is empty"),
        ({"prompt": "Ana", "completion": "</s>"}, "completion is empty"),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": []}]}, "is empty"),
        ({"prompt": [USER], "completion": []}, "completion"),
        ({"prompt": [{"role": "critic", "content": "x"}], "completion": "no"}, "role 'critic'"),
        ({"messages": [{"from": "human", "value": "x"}]}, "rename 'from'"),
        ({"messages": [USER]}, "ends with a message of the user"),
        ({"messages": [{"role": "user", "content": 3}, GOOD]}, "is a int, not text"),
        ({"messages": [{"role": "user"}, GOOD]}, "no content"),
        ({"prompt": "Ana", "completion": [GOOD]}, "prompt is text and the completion is messages"),
        ({"prompt": "Ana"}, "'completion' is missing"),
        ({"label": 1}, "'completion' is missing"),
        ({"prompt": 5, "completion": "no"}, "neither text nor"),
        ({"text": "Ana", "terminated": "no"}, "not true or false"),
        ({"messages": [USER, GOOD], "tools": "["}, "no valid JSON"),
        ({"text": "Ana", "completion": None, "prompt": "x"}, "'completion' is missing"),
    ],
)
def test_bad_row_is_named(tiny_tokenizer: Any, row: dict[str, Any], message: str) -> None:
    formatter = RewardFormatter(tiny_tokenizer)
    with pytest.raises(DataError, match=message) as caught:
        formatter.encode_many(["Ana", row])
    assert "row 1" in str(caught.value)
    results = formatter.try_encode_many(["Ana", row, "Ben"], names=["a", "b", "c"])
    assert isinstance(results[1], DataError)
    assert str(results[1]).startswith("b")
    assert results[0] is not None
    assert not isinstance(results[2], DataError)


def test_template_that_refuses_is_a_data_error(tiny_tokenizer: Any) -> None:
    formatter = RewardFormatter(
        tiny_tokenizer, chat_template="{{ raise_exception('only one turn') }}"
    )
    with pytest.raises(DataError, match="only one turn"):
        formatter.encode([USER], [GOOD])


def test_template_that_drops_the_completion_is_caught(tiny_tokenizer: Any) -> None:
    lossy = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    formatter = RewardFormatter(tiny_tokenizer, chat_template=lossy)
    with pytest.raises(DataError, match="leaves nothing of the completion"):
        formatter.encode([USER], [GOOD])


def test_text_that_ends_with_pad_and_missing_eos(tiny_tokenizer: Any) -> None:
    formatter = RewardFormatter(tiny_tokenizer)
    with pytest.raises(DataError, match="ends with the pad token"):
        formatter.encode("Ana has<pad>", terminated=False)
    tiny_tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        formatter.encode("Ana")
    assert formatter.encode("Ana", terminated=False) is not None


def test_eos_that_is_no_single_token_is_refused(tiny_tokenizer: Any) -> None:
    class Odd:
        """A tokenizer that reads its own EOS as words."""

        def __init__(self) -> None:
            self.eos_token, self.eos_token_id = "The End", 999

        def __getattr__(self, name: str) -> Any:
            return getattr(tiny_tokenizer, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tiny_tokenizer(*args, **kwargs)

    with pytest.raises(ReadoutError, match="does not turn its EOS"):
        RewardFormatter(Odd()).encode("Ana")


# ---------------------------------------------------------------------- no template, recipe


def test_transcript_without_template(make_tokenizer: Any, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer(chat_template=None)
    formatter = RewardFormatter(tokenizer)
    assert any("no chat template" in note for note in formatter.notes)
    encoded = formatter.encode([USER], [GOOD])
    assert encoded is not None
    text = "User: " + USER["content"] + "\n\nAssistant: " + GOOD["content"]
    assert encoded.input_ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    cut = formatter.encode([USER], [GOOD], terminated=False)
    assert cut is not None
    assert cut.input_ids == encoded.input_ids[:-1]
    formatter.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template is None  # saving changes nothing here
    assert stock.apply_chat_template([USER, GOOD], return_dict=False) == encoded.input_ids


def test_tool_and_system_messages_pass(tiny_tokenizer: Any) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "more"}}]}
    turn = [{"role": "system", "content": "Yes"}, USER, call, {"role": "tool", "content": "4"}]
    encoded = RewardFormatter(tiny_tokenizer).encode(turn, [GOOD])
    assert encoded is not None
    text = tiny_tokenizer.decode(encoded.input_ids)
    assert "<|system|>" in text
    assert "<|tool|>" in text


def test_recipe_round_trip_and_fingerprint(tiny_tokenizer: Any, make_tokenizer: Any) -> None:
    formatter = RewardFormatter(tiny_tokenizer, max_length=64, overlong="truncate_prompt")
    recipe = json.loads(json.dumps(formatter.recipe()))
    again = RewardFormatter.from_recipe(make_tokenizer(), recipe)
    assert again.fingerprint() == formatter.fingerprint()
    assert (again.max_length, again.overlong) == (64, "truncate_prompt")
    assert again.encode([USER], [GOOD]) == formatter.encode([USER], [GOOD])
    prints = {
        formatter.fingerprint(),
        RewardFormatter(tiny_tokenizer).fingerprint(),
        RewardFormatter(tiny_tokenizer, chat_template=CHATML).fingerprint(),
        RewardFormatter(make_tokenizer(pad=False)).fingerprint(),
        RewardFormatter(make_tokenizer(adds_eos=True)).fingerprint(),
    }
    assert len(prints) == 5


@pytest.mark.parametrize("change", ["token", "eos", "bos", "splitting", "version"])
def test_recipe_refuses_another_tokenizer(make_tokenizer: Any, change: str) -> None:
    recipe = RewardFormatter(make_tokenizer()).recipe()
    other = make_tokenizer()
    if change == "token":
        other.add_tokens(["zebra"])
    elif change == "eos":
        other.eos_token = "<|end|>"
    elif change == "bos":
        other.backend_tokenizer.post_processor = make_tokenizer(
            adds_eos=True
        ).backend_tokenizer.post_processor
    elif change == "splitting":
        other.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        recipe["version"] = 99
    with pytest.raises(ModelError, match=r"not the one|version 99"):
        RewardFormatter.from_recipe(other, recipe)


def test_pickle_keeps_everything(make_tokenizer: Any) -> None:
    formatter = RewardFormatter(make_tokenizer(chat_template=None), max_length=50)
    formatter.encode("Ana")
    again = pickle.loads(pickle.dumps(formatter))
    assert again.fingerprint() == formatter.fingerprint()
    assert again.counts == formatter.counts
    assert again.encode([USER], [GOOD]) == formatter.encode([USER], [GOOD])


def test_bad_settings(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="overlong"):
        RewardFormatter(tiny_tokenizer, overlong="cut")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="max_length"):
        RewardFormatter(tiny_tokenizer, max_length=0)


def test_threads_that_encode_at_once_lose_no_count(tiny_tokenizer: Any) -> None:
    formatter = RewardFormatter(tiny_tokenizer, max_length=6)
    rows = [{"prompt": "a ", "completion": "pens " * k} for k in (1, 2, 40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: formatter.try_encode_many(rows), range(200)))
    counts = formatter.counts
    assert (counts.rows, counts.sequences + counts.dropped_overlong) == (600, 600)
    assert counts.dropped_overlong == 200
