"""Find the bug: a conversation that is tokenised with two BOS."""

from __future__ import annotations

from typing import Any

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, expect, kind
from companion.course.exercises.ch02._toys import CHAT, chat_tokenizer

TWICE = (
    "The chat template writes a BOS, and the tokenizer adds another one to any text. The model was "
    "trained with one; with two, every score is a little off."
)
NO_BOS = (
    "The template's BOS is taken away and the tokenizer is trusted to add one. Many tokenizers add "
    "none (Qwen's, for example, or any that leaves it to the template): the text then begins with "
    "no BOS at all."
)


def _ids(value: Any) -> list[int]:
    if hasattr(value, "keys") and "input_ids" in value:
        expect(False, "the result is the tokenizer's whole output; its input_ids are asked for")
    if hasattr(value, "tolist"):
        value = value.tolist()
    kind(value, (list, tuple), "a list of token ids")
    for one in value:
        kind(one, int, "an int", "a token id")
    return list(value)


def _chats() -> list[list[dict[str, str]]]:
    return [
        CHAT,
        [*CHAT, {"role": "user", "content": "thanks"}, {"role": "assistant", "content": "7"}],
    ]


def _list(encode: Attempt) -> None:
    for adds in (True, False):
        _ids(encode(chat_tokenizer(adds), CHAT))


def _one_bos(encode: Attempt) -> None:
    for adds in (True, False):
        tokenizer = chat_tokenizer(adds)
        for chat in _chats():
            ids = _ids(encode(tokenizer, chat))
            count = ids.count(tokenizer.bos_token_id)
            who = "adds BOS to text" if adds else "adds nothing"
            expect(
                count == 1 and ids[0] == tokenizer.bos_token_id,
                f"a tokenizer that {who}: {count} BOS in {tokenizer.decode(ids[:6])!r} …",
            )


def _ends(encode: Attempt) -> None:
    for adds in (True, False):
        tokenizer = chat_tokenizer(adds)
        ids = _ids(encode(tokenizer, CHAT))
        expect(
            ids[-1:] == [tokenizer.eos_token_id],
            f"the text ends in {tokenizer.decode(ids[-3:])!r}",
        )


def _template(encode: Attempt) -> None:
    for adds in (True, False):
        tokenizer = chat_tokenizer(adds)
        for chat in _chats():
            want = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
            got = _ids(encode(tokenizer, chat))
            expect(
                got == want,
                f"{tokenizer.decode(got)!r}; it should be {tokenizer.decode(want)!r}",
            )


def broken(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return list(tokenizer(text)["input_ids"])


def stripped(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return list(tokenizer(text.replace(tokenizer.bos_token, ""))["input_ids"])


def no_eos(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    text = text.strip().removesuffix(tokenizer.eos_token)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def generation_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def no_template(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = " ".join(message["content"] for message in messages)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def all_special_skipped(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [i for i in ids if i not in special]


def second_eos(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def whole_output(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    return tokenizer.apply_chat_template(messages, tokenize=True)


def whole_output_of_text(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False)


def _probes() -> list[tuple[Any, ...]]:
    return [(chat_tokenizer(True), CHAT), (chat_tokenizer(False), CHAT)]


EXERCISE = Exercise(
    id="ch02.encode_chat",
    parameters=("tokenizer", "messages"),
    broken=broken,
    properties=(
        Property(
            "a list of token ids",
            "The result should be one flat list of token ids.",
            _list,
        ),
        Property(
            "one BOS, at the start, whatever the tokenizer adds",
            "The text should begin with one BOS, as in training: with none or two, every score is "
            "a little off.",
            _one_bos,
        ),
        Property(
            "it ends with EOS",
            "The score is read at the last token. In training that was the EOS, so the text to be "
            "scored must end with it.",
            _ends,
        ),
        Property(
            "exactly the ids of the chat template",
            "The ids differ from those of the chat template, which is what the model was trained "
            "with.",
            _template,
        ),
    ),
    mutants=(
        Mutant(TWICE, broken, "reward-bench #164"),
        Mutant(NO_BOS, stripped, "RLHF-Reward-Modeling #16"),
        Mutant(
            "The EOS at the end is cut off. The reward is read at the last token, and the model "
            "learned to judge at the EOS: what stands before it never held the verdict.",
            no_eos,
            "reward-bench #94",
        ),
        Mutant(
            "`add_generation_prompt=True` opens a new turn of the assistant. That is for "
            "generating; a finished conversation that is scored must end where it ended.",
            generation_prompt,
        ),
        Mutant(
            "The chat template is left out: no roles, no turns. The model has never seen texts "
            "like this one.",
            no_template,
        ),
        Mutant(
            "All special tokens are removed, the ends of the turns among them. The extra BOS is to "
            "go, the template's own tokens are to stay.",
            all_special_skipped,
        ),
        Mutant(
            "The template writes an EOS after the last turn already; this adds a second one, and "
            "the score is read there.",
            second_eos,
        ),
        Mutant(
            "The ids are right, but this is the tokenizer's whole output, with its mask. Since "
            'transformers 5 `apply_chat_template` returns that too: take `["input_ids"]`, or pass '
            "`return_dict=False`.",
            whole_output,
            also=(whole_output_of_text,),
        ),
    ),
    probes=_probes,
    hints=(
        "Print the decoded ids of the stub's script, with special tokens, for the tokenizer that "
        "adds a BOS.",
        "A text that came out of a chat template holds its special tokens already. Which argument "
        "of `tokenizer(...)` says so?",
        "`tokenizer(text, add_special_tokens=False)`, or at once "
        "`tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)`.",
    ),
    right="Both ways give the same ids. The companion's formatter takes this path for training, "
    "scoring and serving, so that they cannot differ.",
)
