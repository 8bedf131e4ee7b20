"""Prompts alone as token ids: what a policy goes on from.

The border of prompt and completion is that of the formatter, so a policy's completions continue
exactly the ids that a reward model reads before them. Chapter 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from companion.errors import DataError
from companion.formatting.conversation import check_messages, has_text, is_messages
from companion.formatting.formatter import Given, RewardFormatter, Text, drop_second_bos


def encode_prompts(
    formatter: RewardFormatter,
    prompts: Sequence[Text],
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of prompts, ready for a model to go on.

    Parameters
    ----------
    formatter : RewardFormatter
        Of the policy's tokenizer. Its ``max_length`` is of whole texts and not applied here.
    prompts : sequence
        Each a text, which stays as it is (with the special tokens that the tokenizer puts before
        it, at most one BOS, never an EOS), or a list of messages, written by the chat template
        with its generation prompt, as TRL's GRPO does. A last message of the assistant is gone on
        with.
    chat_template_kwargs : mapping, optional
        Handed to the chat template.

    Returns
    -------
    list of list of int

    Raises
    ------
    DataError
        For an empty prompt, one that is neither text nor messages, or a bad role; it is named
        ``prompt 0``, …
    """
    if isinstance(prompts, (str, bytes, Mapping)):
        raise DataError("a list of prompts is asked for, not one", "wrap it: [prompt]")
    texts: list[tuple[str, bool]] = []
    for number, prompt in enumerate(prompts):
        name = f"prompt {number}"
        if isinstance(prompt, str):
            if not prompt.strip():
                raise DataError(f"{name}: the prompt is empty", "drop the row or give it a text")
            texts.append((prompt, False))
        elif is_messages(prompt) and prompt:
            messages = check_messages(prompt, name)
            last = messages[-1]
            goes_on = last["role"] == "assistant" and has_text(last["content"])
            flag = "continue_final_message" if goes_on else "add_generation_prompt"
            given = Given(name, template_kwargs=chat_template_kwargs)
            texts.append((formatter._render(messages, given, **{flag: True}), True))
        elif isinstance(prompt, Mapping):
            raise DataError(
                f"{name}: a row in place of a prompt", 'give row["prompt"], or wrap the message'
            )
        else:
            raise DataError(f"{name}: a {type(prompt).__name__}, no text and no messages")
    out: list[list[int]] = [[] for _ in texts]
    bos, eos = formatter.tokenizer.bos_token_id, formatter.tokenizer.eos_token_id
    for place, ids, _, _, adds_eos in formatter._tokenizer_calls(texts):
        if adds_eos and ids[-1] == eos:
            ids.pop()
        drop_second_bos(ids, bos)
        out[place] = ids
    return out
