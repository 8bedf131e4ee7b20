"""Where steps end: boundaries by offsets, separators that do not survive, templates that add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from companion import RewardFormatter
from companion.errors import DataError
from companion.formatting import EncodedSteps, encode_steps, split_steps

SEPARATOR = " so "
ROW = {"prompt": "Ana has", "completions": ["3 boxes", "now 4", "the answer is 7"]}


def ends_in_words(formatter: RewardFormatter, found: Any) -> list[str]:
    assert isinstance(found, EncodedSteps), found
    ids = found.encoded.input_ids
    return [formatter.tokenizer.decode([ids[end]]) for end in found.ends]


@pytest.mark.parametrize("chat", [True, False])
def test_ends_stand_at_separators_and_at_the_end(make_tokenizer: Any, chat: bool) -> None:
    formatter = RewardFormatter(make_tokenizer())
    [found] = encode_steps(formatter, [ROW], SEPARATOR, chat=chat)
    assert ends_in_words(formatter, found) == ["so", "so", "</s>"]
    # not one token early or late: what stands before the end is the step, whole
    assert isinstance(found, EncodedSteps)
    ids = found.encoded.input_ids
    assert formatter.tokenizer.decode(ids[found.ends[0] + 1 : found.ends[1]]) == "now 4"
    assert len(ids) - 1 == found.ends[-1]


def test_a_solution_that_goes_on_is_closed_by_the_separator(make_tokenizer: Any) -> None:
    formatter = RewardFormatter(make_tokenizer())
    [found] = encode_steps(formatter, [{**ROW, "terminated": False}], SEPARATOR)
    assert ends_in_words(formatter, found) == ["so", "so", "so"]
    assert isinstance(found, EncodedSteps)
    [whole] = encode_steps(formatter, [ROW], SEPARATOR)
    assert isinstance(whole, EncodedSteps)
    # a causal model says of a step what it says of it in the whole solution
    assert whole.ends[:2] == found.ends[:2]
    assert whole.encoded.input_ids[: found.ends[1]] == found.encoded.input_ids[: found.ends[1]]


def test_a_cut_prompt_and_a_thinking_template_move_the_ends(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'|>' + message['content']",
        "'|>' + ('so how so ' if message['role'] == 'assistant' else '') + message['content']",
    )
    row = {**ROW, "prompt": "Ana has more and more and more pens"}
    formatter = RewardFormatter(tokenizer)
    [whole] = encode_steps(formatter, [row], SEPARATOR)
    assert ends_in_words(formatter, whole) == ["so", "so", "</s>"]
    assert isinstance(whole, EncodedSteps)
    length = len(whole.encoded)
    assert whole.ends[-1] == length - 1
    cutting = RewardFormatter(tokenizer, max_length=length - 3, overlong="truncate_prompt")
    [cut] = encode_steps(cutting, [row], SEPARATOR)
    assert isinstance(cut, EncodedSteps)
    assert cut.encoded.cut_tokens == 3
    assert cut.ends == [end - 3 for end in whole.ends]
    assert encode_steps(RewardFormatter(tokenizer, max_length=5), [row], SEPARATOR) == [None]


def merging_tokenizer() -> Any:
    """Like byte-level BPE, which makes one token of a full stop and the line break behind it."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "<sep>", "a", "b", ".", ".\n", "\n"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    from tokenizers import Regex

    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\.\n|[ab.\n]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<sep>"],
    )


def test_a_separator_that_merges_with_the_step_is_an_error() -> None:
    formatter = RewardFormatter(merging_tokenizer())
    rows = [{"prompt": "a", "completions": [step, "b"]} for step in ("ab", "ab.")]
    good, bad = encode_steps(formatter, rows, "\n", chat=False, names=["one", "two"])
    assert isinstance(good, EncodedSteps)
    assert isinstance(bad, DataError)
    assert "two: after step 0 the tokenizer joins the separator '\\n'" in str(bad)
    assert "'.\\n'" in str(bad)
    assert "'<sep>'" in str(bad)  # the cure names one that stays by itself
    [found] = encode_steps(formatter, rows[1:], "<sep>", chat=False)
    assert ends_in_words(formatter, found) == ["<sep>", "</s>"]


def test_bad_rows_get_their_error_in_place(make_tokenizer: Callable[..., Any]) -> None:
    formatter = RewardFormatter(make_tokenizer())
    rows = [
        {"prompt": "Ana", "completions": []},
        {"prompt": "Ana", "completions": ["a so b"]},
        ROW,
    ]
    none, inside, good = encode_steps(formatter, rows, SEPARATOR)
    assert "row 0: no steps" in str(none)
    assert "row 1: step 0 holds the separator ' so '" in str(inside)
    assert isinstance(good, EncodedSteps)
    with pytest.raises(DataError, match="separator of steps is empty"):
        encode_steps(formatter, [ROW], "")
    stripping = make_tokenizer()
    stripping.chat_template = stripping.chat_template.replace(
        "message['content']", "message['content'] | upper"
    )
    [changed] = encode_steps(RewardFormatter(stripping), [ROW], SEPARATOR)
    assert "the chat template leaves out or changes the content" in str(changed)


def test_text_is_split_as_it_was_joined() -> None:
    assert split_steps("a\nb", "\n") == split_steps("a\nb\n", "\n") == ["a", "b"]
