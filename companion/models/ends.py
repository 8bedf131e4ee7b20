"""The tokens that end a completion: by the tokenizer, by the checkpoint, and by the chat template.

Each of the three may be the only one that knows. Llama 3's EOS is not the token that ends a turn;
Gemma names ``<end_of_turn>`` in its generation config alone; a base that was tuned on chats may
name it nowhere but in its template (trl #7039). Chapter 5.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from companion.errors import DataError
from companion.models.checkpoint import load_config, load_tokenizer, resolve

_ANSWER = "Oslo"
_QUESTION = {"role": "user", "content": "Where?"}


def end_token_ids(tokenizer: Any, said: int | Sequence[int] | None) -> list[int]:
    """Tokens at which a policy stops: the tokenizer's EOS, and what a configuration says."""
    more = [] if said is None else [said] if isinstance(said, int) else said
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return sorted({*own, *map(int, more)})


def turn_end_ids(tokenizer: Any, chat_template: str | None = None) -> list[int]:
    """The token that the chat template writes behind what the assistant said; empty if none.

    It is the first added token there (``<|im_end|>``, ``<end_of_turn>``, ``<|eot_id|>``), found by
    writing a conversation: no field of a tokenizer names it.
    """
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    known -= {tokenizer.unk_token_id, tokenizer.bos_token_id}
    for content in (_ANSWER, [{"type": "text", "text": _ANSWER}]):
        messages = [_QUESTION, {"role": "assistant", "content": content}]
        try:
            text = str(
                tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False)
            )
        except Exception:  # a template is a program of its own, and may raise what it likes
            continue
        _, found, behind = text.rpartition(_ANSWER)
        ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
        ends = [index for index in ids if index in known]
        if ends:
            return [int(ends[0])]
    return []


def policy_end_ids(
    policy: Any, *, revision: str | None = None, trust_remote_code: bool = False
) -> list[int]:
    """Tokens that end a policy's completions.

    Parameters
    ----------
    policy : str, path or PreTrainedTokenizerBase
        A folder or hub id, whose generation config is read too, or the tokenizer alone.
    revision, trust_remote_code
        For transformers.

    Raises
    ------
    ModelError, DataError
        For a folder that is no model, or something else than these.
    """
    said: Any = None
    if not isinstance(policy, (str, os.PathLike)) and not hasattr(policy, "apply_chat_template"):
        raise DataError(
            f"policy is a {type(policy).__name__}", "give its folder, its hub id or its tokenizer"
        )
    if isinstance(policy, (str, os.PathLike)):
        from transformers import GenerationConfig

        name = resolve(policy)
        shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            generation = GenerationConfig.from_pretrained(name, revision=revision or "main")
        except OSError:  # no generation_config.json: transformers makes it of the configuration
            generation = GenerationConfig.from_model_config(load_config(name, **shared))
        said, policy = generation.eos_token_id, load_tokenizer(name, **shared)
    return sorted({*end_token_ids(policy, said), *turn_end_ids(policy)})
