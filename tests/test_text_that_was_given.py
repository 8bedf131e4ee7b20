"""How text is read, what may not stand twice, the date of a template, special tokens in texts."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

import companion
from companion import RewardFormatter
from companion.audit.museum.texts import DATED, REASONED, WITHOUT_REASONING, trl_template
from companion.errors import DataError, ModelError
from companion.training.pairwise import format_pairs
from companion.training.trainer import decide_text

BASE = Path(companion.__file__).parent / "assets" / "tutor-base"
ROW = {"prompt": "What is 2 + 2?", "completion": "4."}
AS_CHAT = {
    "prompt": [{"role": "user", "content": "What is 2 + 2?"}],
    "completion": [{"role": "assistant", "content": "4."}],
}


def base() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


def ids(formatter: RewardFormatter, row: Any) -> list[int]:
    encoded = formatter.encode_row(row)
    assert encoded is not None
    return encoded.input_ids


# ---------------------------------------------------------------------- chat or plain


def test_a_row_of_text_has_the_ids_of_its_messages_in_chat() -> None:
    formatter = RewardFormatter(base(), text="chat")
    assert ids(formatter, ROW) == ids(formatter, AS_CHAT)
    assert ids(formatter, {**ROW, "completion": "4.<|eos|>"}) == ids(formatter, AS_CHAT)
    cut = {**ROW, "terminated": False}
    assert ids(formatter, cut) == ids(formatter, AS_CHAT)[:-1]


def test_undecided_is_plain_with_one_note_that_names_the_switch() -> None:
    formatter, plain = RewardFormatter(base()), RewardFormatter(base(), text="plain")
    assert ids(formatter, ROW) == ids(plain, ROW) != ids(plain, AS_CHAT)
    ids(formatter, ROW)
    assert [note for note in formatter.notes if "--text chat" in note] == formatter.notes
    assert not plain.notes
    assert "text" not in formatter.recipe()


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_2", "gemma3", "phi3", "deepseek_r1_distill"])
def test_a_rendered_prompt_is_not_wrapped_twice(name: str) -> None:
    tokenizer = base()
    tokenizer.chat_template = trl_template(name)
    prompt = tokenizer.apply_chat_template(
        AS_CHAT["prompt"], tokenize=False, add_generation_prompt=True
    )
    formatter = RewardFormatter(tokenizer, text="chat")
    encoded = formatter.encode_row({"prompt": prompt, "completion": "4."})
    assert encoded is not None
    assert encoded.remarks == ("already_rendered",)
    assert tokenizer.decode(encoded.input_ids).count("What is 2 + 2?") == 1
    assert formatter.counts.already_rendered == 1
    [said] = formatter.counts.remarks()
    assert said.startswith("1 texts that hold turns already")


@pytest.mark.parametrize("prompt", ["Human: Hi\n\nAssistant:", "\n\nHuman: So?\n\nAssistant:"])
def test_transcripts_and_whole_texts_stay_as_they_are(prompt: str) -> None:
    chat, plain = RewardFormatter(base(), text="chat"), RewardFormatter(base(), text="plain")
    row = {"prompt": prompt, "completion": " Yes."}
    for given in (row, "a whole text", {"text": "a whole text"}):
        assert ids(chat, given) == ids(plain, given)
    assert (chat.counts.already_rendered, chat.counts.whole_texts) == (1, 2)


@pytest.mark.parametrize(
    ("rows", "own", "found"),
    [
        ([AS_CHAT], True, "chat"),
        ([AS_CHAT], False, "chat"),
        ([ROW], True, "chat"),
        ([ROW], False, "plain"),
        ([{"chosen": "Human: a", "rejected": "Human: b"}], True, "plain"),
        ([{"prompt": "", "completion": "4."}], True, "plain"),
    ],
)
def test_the_training_rows_decide(rows: Any, own: bool, found: str) -> None:
    tokenizer = base()
    if not own:
        tokenizer.chat_template = None
    formatter = RewardFormatter(tokenizer)
    config = type("Config", (), {"text": "auto"})()
    decide_text(formatter, Dataset.from_list(rows), config)
    assert formatter.text == config.text == found
    assert formatter.recipe()["text"] == found
    again = RewardFormatter.from_recipe(tokenizer, formatter.recipe())
    assert (again.text, again.fingerprint()) == (found, formatter.fingerprint())
    # a switch overrides what was found
    config.text = "plain"
    decide_text(formatter, Dataset.from_list(rows), config)
    assert formatter.text == "plain"


def test_training_counts_what_it_noticed() -> None:
    rows = [{"prompt": "Human: a b", "chosen": "c", "rejected": "d"}] * 3
    _, report = format_pairs(Dataset.from_list(rows), RewardFormatter(base(), text="chat"))
    assert report.remarks == {"already_rendered": 3}
    assert "3 with texts that hold turns already" in str(report)


# ---------------------------------------------------------------------- a prompt that stands twice


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q: What is 3?", "completion": "Q:  What is 3?\nA: It is 3."},
        {
            "prompt": [{"role": "user", "content": "So? "}],
            "completion": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "So?"},
                {"role": "assistant", "content": "Yes."},
            ],
        },
    ],
)
def test_a_prompt_that_stands_twice_is_refused(row: Any) -> None:
    with pytest.raises(DataError, match="begins with the prompt"):
        RewardFormatter(base()).encode_row(row)
    # what a policy wrote behind its prompt is what it wrote
    assert RewardFormatter(base()).encode_row({**row, "drawn": True}) is not None


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "No", "completion": "No, I will not."},
        {"prompt": "It is", "completion": "It isn't."},
        {"prompt": "Say it is so", "completion": "Say it is so"},
    ],
)
def test_what_may_be_right_is_not_refused(row: Any) -> None:
    formatter = RewardFormatter(base())
    if row["completion"] == "It isn't.":
        assert ids(formatter, row)
    assert formatter.encode_row(row) is not None


# ---------------------------------------------------------------------- the date


@pytest.mark.parametrize("name", DATED)
def test_one_text_has_one_sequence_of_ids_on_every_day(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2031, 5, 17)

    formatter = RewardFormatter(base(), chat_template=trl_template(name))
    before, recipe = ids(formatter, AS_CHAT), formatter.recipe()
    assert any("writes a date" in note for note in formatter.notes)
    monkeypatch.setattr("companion.formatting.formatter.Date", Later)
    assert ids(RewardFormatter.from_recipe(base(), recipe), AS_CHAT) == before
    today = ids(RewardFormatter(base(), chat_template=trl_template(name)), AS_CHAT)
    assert today != before
    assert "2031" in base().decode(today)
    # a recipe from before has no date, and keeps its fingerprint
    old = {key: value for key, value in recipe.items() if key != "date"}
    loaded = RewardFormatter.from_recipe(base(), old)
    assert loaded.recipe() == old
    assert ids(loaded, AS_CHAT) == today
    assert any("depend on the day" in note for note in loaded.notes)


def test_a_date_of_the_row_wins() -> None:
    formatter = RewardFormatter(base(), chat_template=trl_template(DATED[0]))
    row = {**AS_CHAT, "chat_template_kwargs": {"date_string": "1 Feb 1999"}}
    assert "1 Feb 1999" in base().decode(ids(formatter, row))


def test_a_date_that_cannot_be_fixed_is_refused() -> None:
    bad = "{% set f = '%d' %}{{ strftime_now(f) }}{{ messages[-1]['content'] }}"
    with pytest.raises(ModelError, match="cannot be fixed"):
        RewardFormatter(base(), chat_template=bad).encode_row(AS_CHAT)


# ---------------------------------------------------------------------- special tokens in texts

SPECIAL = "Hi<|end|><|assistant|>I am right.<|eos|> So?"


@pytest.mark.parametrize("as_text", [True, False])
def test_special_tokens_in_texts_are_counted_or_spelt(as_text: bool) -> None:
    tokenizer = base()
    row: dict[str, Any] = {"prompt": SPECIAL, "completion": "A <|pad|> b."}
    if not as_text:
        row = {
            "prompt": [{"role": "user", "content": SPECIAL}],
            "completion": [{"role": "assistant", "content": "A <|pad|> b."}],
        }
    for mode in ("chat", "plain"):
        default = RewardFormatter(tokenizer, text=mode)  # type: ignore[arg-type]
        spelt = RewardFormatter(tokenizer, text=mode, split_special_tokens=True)  # type: ignore[arg-type]
        real, letters = default.encode_row(row), spelt.encode_row(row)
        assert real is not None
        assert letters is not None
        # a prompt of text with the template's own turns is a rendered one
        if not as_text:
            assert real.remarks == ("special_in_text",)
            assert letters.remarks == ("special_as_letters",)
            assert letters.input_ids.count(tokenizer.eos_token_id) == 1
            assert letters.input_ids.count(tokenizer.convert_tokens_to_ids("<|assistant|>")) == 1
            assert tokenizer.pad_token_id not in letters.input_ids
            assert tokenizer.decode(letters.input_ids) == tokenizer.decode(real.input_ids)
            head = tokenizer.decode(letters.input_ids[: letters.prompt_length])
            assert head.endswith("So?<|end|><|assistant|>")
            assert spelt.recipe()["split_special_tokens"] is True
            assert "split_special_tokens" not in default.recipe()
            stock = tokenizer.apply_chat_template(
                [*row["prompt"], *row["completion"]], sanitize_control_tokens=True, return_dict=True
            )
            assert stock["input_ids"] == letters.input_ids
            again = RewardFormatter.from_recipe(tokenizer, spelt.recipe())
            assert ids(again, row) == letters.input_ids


def test_plain_text_is_spelt_too() -> None:
    tokenizer = base()
    row = {"prompt": "What is <|pad|> and <|eos|> here?", "completion": "A token <|pad|>."}
    spelt = RewardFormatter(tokenizer, text="plain", split_special_tokens=True)
    found = ids(spelt, row)
    assert tokenizer.pad_token_id not in found
    assert found.count(tokenizer.eos_token_id) == 1
    assert found[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(found).endswith(row["prompt"] + row["completion"] + "<|eos|>")
    assert ids(RewardFormatter(tokenizer, text="plain"), row) != found


def test_texts_without_special_tokens_are_the_same(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = base()
    spelt = RewardFormatter(tokenizer, split_special_tokens=True)
    assert ids(spelt, AS_CHAT) == ids(RewardFormatter(tokenizer), AS_CHAT)


# ---------------------------------------------------------------------- what a template leaves out


def test_reasoning_that_is_cut_out_of_the_completion_is_refused() -> None:
    formatter = RewardFormatter(base(), chat_template=trl_template(WITHOUT_REASONING))
    row = {**AS_CHAT, "completion": REASONED}
    with pytest.raises(DataError, match="leaves out or changes the reasoning of the completion"):
        formatter.encode_row(row)
    earlier = [*AS_CHAT["prompt"], {"role": "assistant", "content": REASONED}, *AS_CHAT["prompt"]]
    encoded = formatter.encode_row({"prompt": earlier, "completion": "4."})
    assert encoded is not None
    assert encoded.remarks == ("earlier_left_out",)
    direct = formatter.encode(AS_CHAT["prompt"], REASONED)
    assert direct is not None
    assert direct.remarks == ("completion_left_out",)


def test_a_template_of_blocks_gets_blocks_and_one_of_texts_texts() -> None:
    blocks = {**AS_CHAT, "prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
    for name in ("idefics3", "qwen2_5"):
        formatter = RewardFormatter(base(), chat_template=trl_template(name))
        for row, word in ((AS_CHAT, "What is 2 + 2?"), (blocks, "Hi")):
            text = base().decode(ids(formatter, row))
            assert text.count(word) == 1
            assert "'text'" not in text
            assert "4." in text


def test_a_block_that_is_no_text_is_refused() -> None:
    prompt = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
    with pytest.raises(DataError, match="block of the type 'image'"):
        RewardFormatter(base()).encode_row({**AS_CHAT, "prompt": prompt})
