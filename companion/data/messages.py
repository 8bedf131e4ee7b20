"""Texts and messages: the two forms that a prompt or a completion can have.

A *text* is a non-empty string. *Messages* are a non-empty list of ``{"role": …, "content": …}``.
Both are checked here, once, so that everything after the loader can rely on them. Chapter 4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from companion.data.problems import RowError
from companion.layouts import as_messages

Message = dict[str, Any]
Text = str | list[Message]

ROLES: Final = ("system", "developer", "user", "assistant", "tool")

_PRINTED: Final = re.compile(
    r"""["'](role|from)["']\s*:\s*["'](system|developer|user|assistant|tool|human|gpt)["']"""
)
_TURN: Final = re.compile(r"\n\n(Human|Assistant):")


def is_printed(text: str) -> bool:
    """Whether a text is a list of messages that was printed, by Python or as JSON."""
    return (
        text.lstrip()[:1] == "[" and text.lstrip("[ \n")[:1] == "{" and bool(_PRINTED.search(text))
    )


def form(value: Any) -> str:
    """``none``, ``text`` or ``messages``."""
    return "none" if value is None else "text" if isinstance(value, str) else "messages"


def require(row: Mapping[str, Any], name: str) -> Any:
    """The field's value; a missing field and a null are different mistakes."""
    if name not in row:
        raise RowError("missing field", name)
    if row[name] is None:
        raise RowError("null", name)
    return row[name]


def clean_text(value: Any, name: str, *, empty: str) -> Text:
    """Check one prompt or completion; messages come back without null keys.

    Parameters
    ----------
    value : str or list of messages
    name : str
        The field, for the message.
    empty : str
        The reason to give when there is no text: ``empty prompt`` or ``empty completion``.
    """
    if isinstance(value, str):
        if not value.strip():
            raise RowError(empty, name)
        if is_printed(value):
            raise RowError("printed messages", name, f"{value.strip()[:30]!r}…")
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise RowError("wrong type", name, f"{type(value).__name__}")
    if not value:
        raise RowError(empty, name)
    messages = [_clean_message(message, name, i) for i, message in enumerate(value)]
    if empty == "empty completion" and messages[-1]["role"] != "assistant":
        detail = f"the last message is of {messages[-1]['role']!r}, not of 'assistant'"
        raise RowError(empty, name, detail)
    last = messages[-1]
    if not last["content"].strip() and not last.get("tool_calls"):
        raise RowError(empty, name, f"message {len(messages) - 1}")
    return messages


def prompt_of(row: Mapping[str, Any]) -> Text:
    """The prompt of a row, checked."""
    return clean_text(require(row, "prompt"), "prompt", empty="empty prompt")


def completion_of(row: Mapping[str, Any], name: str = "completion") -> Text:
    """A completion of a row, checked."""
    return clean_text(require(row, name), name, empty="empty completion")


def _clean_message(message: Any, name: str, index: int) -> Message:
    if not isinstance(message, Mapping):
        raise RowError("wrong type", name, f"item {index} is {type(message).__name__}, no message")
    # Arrow gives every message the keys of all messages and fills them with null: a chat template
    # must not see those (`tool_calls` that is defined but null changes what some templates write).
    clean = {key: value for key, value in message.items() if value is not None}
    (clean,) = as_messages([clean])
    role = clean.get("role")
    if role is None:
        raise RowError("missing field", name, f"message {index} has no role")
    if role not in ROLES:
        raise RowError("unknown role", name, f"message {index} has role {role!r}")
    if "content" not in clean and not clean.get("tool_calls"):
        raise RowError("missing field", name, f"message {index} has no content")
    content = clean.get("content", "")
    if isinstance(content, (list, tuple)):  # blocks, which a template of text would not write
        content = "".join(_block_text(block, name, index) for block in content)
    if not isinstance(content, str):
        raise RowError(
            "wrong type", name, f"content of message {index} is {type(content).__name__}, no text"
        )
    calls = clean.get("tool_calls") or []
    if not isinstance(calls, (list, tuple)) or not all(isinstance(c, Mapping) for c in calls):
        raise RowError("wrong type", name, f"tool_calls of message {index} are no list of objects")
    rest = {k: v for k, v in clean.items() if k not in ("role", "content")}
    return {"role": role, "content": content, **rest}


def _block_text(block: Any, name: str, index: int) -> str:
    """The text of a content block, ``{"type": "text", "text": …}``; another kind is refused."""
    if isinstance(block, str):
        return block
    text = block.get("text") if isinstance(block, Mapping) else None
    kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
    if not isinstance(text, str) or kind not in (None, "text"):
        raise RowError("not text", name, f"message {index} has a block of the type {kind!r}")
    return text


def same_text(a: Text, b: Text) -> bool:
    """Equal but for white space at the ends."""
    if isinstance(a, str) and isinstance(b, str):
        return a.strip() == b.strip()
    return a == b


def plain(value: Text) -> str:
    """The words alone, without roles: for lengths and for showing."""
    if isinstance(value, str):
        return value
    return "\n".join(message.get("content") or "" for message in value)


def is_transcript(value: Any) -> bool:
    """True for the form of hh-rlhf: ``\\n\\nHuman: …\\n\\nAssistant: …``."""
    return isinstance(value, str) and value.startswith(("\n\nHuman:", "\n\nAssistant:"))


def parse_transcript(text: str, name: str, *, open_end: bool = False) -> list[Message]:
    """Messages of a transcript in the form of hh-rlhf (Bai et al. 2022, arXiv 2204.05862).

    White space at the ends of a turn is dropped. A text that quotes the two markers cannot be told
    from one that has more turns; the format has no way to say so.

    Parameters
    ----------
    text : str
        Begins with ``\\n\\nHuman:`` or ``\\n\\nAssistant:``.
    name : str
        The field, for the message.
    open_end : bool
        The text is a prompt that ends with an empty ``\\n\\nAssistant:``, which is dropped.
    """
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if open_end and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
        if not turns:
            raise RowError("empty prompt", name)
    return turns
