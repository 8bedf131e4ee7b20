"""Checks on messages, and the transcript that stands in for a missing chat template.

The formatter (:mod:`companion.formatting.formatter`) is built on these. Chapter 4 shows what a chat
template does to a preference pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from companion.errors import DataError

Message = dict[str, Any]

#: Roles that chat templates know. Another role would be dropped by most templates without a word.
ROLES = frozenset(
    {"system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"}
)
#: Roles that may end a conversation which is to be scored.
_FINAL_ROLES = frozenset({"assistant", "tool", "function", "ipython", "observation"})

_TRANSCRIPT = """\
{%- if tools %}{{ 'Tools: ' + (tools | tojson) + '\\n\\n' }}{% endif -%}
{%- for message in messages -%}
{{- '' if loop.first else '\\n\\n' -}}
{{- (message['role'] | capitalize) + ': ' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- elif message['content'] -%}
{%- for block in message['content'] if block['text'] is defined -%}
{{- block['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- if message['tool_calls'] -%}{{- message['tool_calls'] | tojson -}}{%- endif -%}
{%- if message['role'] == 'assistant' or (loop.last and not add_generation_prompt) -%}
{{- eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\nAssistant:' -}}{%- endif -%}
"""


def transcript_template(adds_bos: bool) -> str:
    """Jinja template for a tokenizer that has none: ``User: …``, blank line, ``Assistant: …`` EOS.

    Parameters
    ----------
    adds_bos : bool
        Whether the tokenizer puts BOS before plain text; the transcript then begins with BOS too.

    Returns
    -------
    str
        A template that any Hugging Face tool can use; it is saved with the model.
    """
    return ("{{- bos_token -}}\n" if adds_bos else "") + _TRANSCRIPT


def is_messages(value: object) -> bool:
    """Whether ``value`` looks like a list of messages (a list or tuple of mappings)."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (str, bytes))
        and all(isinstance(item, Mapping) for item in value)
    )


def has_text(content: object) -> bool:
    """Whether a message's content holds at least one character that is no white space."""
    if isinstance(content, str):
        return bool(content.strip())
    if isinstance(content, Sequence):
        return any(
            bool(str(block.get("text", "")).strip()) or block.get("type", "text") != "text"
            for block in content
            if isinstance(block, Mapping)
        )
    return False


def check_messages(value: Sequence[Mapping[str, Any]], where: str) -> list[Message]:
    """Copy the messages, dropping fields that are None; refuse what a template would lose.

    ``datasets`` fills fields that a row lacks with None, and many templates would print it.

    Raises
    ------
    DataError
        For a missing or unknown role, or a message that has neither content nor tool calls.
    """
    out: list[Message] = []
    for number, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise DataError(
                f"{where}: message {number} is a {type(item).__name__}, not a role and a content"
            )
        message = {key: field for key, field in item.items() if field is not None}
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            cure = f"use one of: {', '.join(sorted(ROLES))}"
            if "from" in message and "value" in message:
                cure = "rename 'from' to 'role' and 'value' to 'content', gpt to assistant"
            raise DataError(f"{where}: message {number} has the role {role!r}", cure)
        calls = message.get("tool_calls") or []
        if not is_messages(calls) or not is_messages([c.get("function", {}) for c in calls]):
            raise DataError(
                f"{where}: the tool calls of message {number} are no list of functions",
                'write [{"type": "function", "function": {"name": …, "arguments": {…}}}]',
            )
        content = message.get("content")
        if content is None:
            if not message.get("tool_calls"):
                raise DataError(
                    f"{where}: message {number} ({role}) has no content",
                    "give it a text, or leave the row out",
                )
            message["content"] = ""  # an assistant that only calls tools; templates expect a string
        elif not isinstance(content, (str, list, tuple)):
            raise DataError(
                f"{where}: the content of message {number} is a {type(content).__name__}, not text"
            )
        elif not isinstance(content, str):
            message["content"] = [
                _check_block(block, f"{where}: message {number} ({role})") for block in content
            ]
        out.append(message)
    return out


def _check_block(block: object, where: str) -> dict[str, Any]:
    """A block of text as a mapping; a text model would not see another one, without a word."""
    if isinstance(block, str):
        return {"type": "text", "text": block}
    kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
    if not isinstance(block, Mapping) or kind not in (None, "text"):
        raise DataError(
            f"{where} has a block of the type {kind!r}, which a text model does not read",
            "take the row out; reasoning belongs into 'reasoning_content'",
        )
    if not isinstance(block.get("text"), str):
        raise DataError(f"{where} has a block without 'text'")
    return {"type": "text", **{key: item for key, item in block.items() if item is not None}}


def check_ending(messages: Sequence[Message], where: str) -> None:
    """Refuse a conversation that holds nothing to score: it ends with a question, or with nothing.

    Raises
    ------
    DataError
        If the last message is the user's or the system's, or is an empty completion.
    """
    if not messages:
        raise DataError(f"{where}: no messages", "give at least one message of the assistant")
    last = messages[-1]
    if last["role"] not in _FINAL_ROLES:
        raise DataError(
            f"{where}: the conversation ends with a message of the {last['role']}; "
            "there is no completion to score",
            "end it with a message of the assistant",
        )
    if not has_text(last["content"]) and not last.get("tool_calls"):
        raise DataError(f"{where}: the completion is empty", "drop the row or give it a text")


def as_reply(prompt: object, completion: Any) -> Any:
    """A completion in the form of its prompt: behind messages comes a message."""
    if isinstance(completion, str) and not isinstance(prompt, str):
        return [{"role": "assistant", "content": completion}]
    return completion
