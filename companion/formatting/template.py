"""What a chat template does to a conversation: its turns, its date, and what it leaves out.

Templates come with models and do as they like. transformers renders them and does not look at what
comes out: a template may write today's date, cut the reasoning out of an answer, or print a list of
blocks as Python does (trl #6766, sglang #3296). Chapter 4.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any, Final

from companion.errors import DataError, ModelError
from companion.formatting.conversation import Message

#: `render(messages, add_generation_prompt=…)`
Render = Callable[..., str]

#: a transcript, or what other tools put before a turn
_TRANSCRIPT: Final = re.compile(r"(?:^|\n)[ \t]*(?:Human|Assistant):")
_CALL: Final = re.compile(r"\bstrftime_now\s*\(\s*(?:\"([^\"\\]*)\"|'([^'\\]*)')\s*\)")
_TOKEN: Final = re.compile(r"<[^<>]+>")
_THINK: Final = re.compile(r"</?think>")
_REASONING: Final = ("reasoning_content", "reasoning", "thinking")
_USER, _ANSWER = "quorvexa one", "zelmitro two"


def asks_for_date(template: Any) -> bool:
    """Whether the template writes the date of the day on which it is rendered."""
    return isinstance(template, str) and "strftime_now" in template


def with_date(template: str, day: str) -> str:
    """The template with its calls of ``strftime_now`` replaced by the date `day` (ISO).

    transformers makes its own ``strftime_now``, and hands a template plain data alone, so that
    another one cannot be passed.

    Raises
    ------
    ModelError
        If a format of a date is no plain text.
    """
    on = date.fromisoformat(day)
    fixed = _CALL.sub(
        lambda call: json.dumps(on.strftime(call[1] if call[1] is not None else call[2])), template
    )
    if re.search(r"\bstrftime_now\s*[(|]", fixed):
        raise ModelError(
            "the chat template writes a date in a way that cannot be fixed to one day, so a score "
            "would change from day to day",
            "write strftime_now('…') with the format as plain text in the template",
        )
    return fixed


def turn_headers(render: Render, ends: Sequence[str | None]) -> tuple[str, ...]:
    """What the template writes before the turns of user and assistant.

    Found by rendering a conversation; empty if the template refuses it. `ends` are BOS and EOS,
    which belong to no turn's header.
    """
    messages = [
        {"role": role, "content": text + number}
        for number in "ab"
        for role, text in (("user", _USER), ("assistant", _ANSWER))
    ]
    try:
        text = render(messages)
    except DataError:
        return ()
    for end in ends:
        text = text.replace(end, "\0") if end else text
    places = [text.find(str(message["content"])) for message in messages]
    if min(places) < 0 or places != sorted(places):
        return ()
    before = [text[: places[0]]]
    for number in range(3):
        before.append(text[places[number] + len(messages[number]["content"]) : places[number + 1]])
    # what ends the turn before stands in front of some headers
    turn_ends = [found[0] for piece in before[1:3] if (found := _TOKEN.match(piece.strip()))]
    headers = []
    for header in (_shared_end(before[0], before[2]), before[1]):
        lines = [line.strip() for line in header.split("\0")[-1].split("\n")]
        line = next((line for line in reversed(lines) if _THINK.sub("", line)), "")
        for end in turn_ends:
            line = line[len(end) :] if line.startswith(end) and line != end else line
        if len(line) > 2 and not line.isalnum():
            headers.append(line)
    return tuple(headers)


def _shared_end(a: str, b: str) -> str:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return a[len(a) - n :]


def is_rendered(text: str, headers: Sequence[str]) -> bool:
    """Whether a text holds turns already, those of the template or ``Human:``, ``Assistant:``."""
    return any(header in text for header in headers) or _TRANSCRIPT.search(text) is not None


def content_forms(render: Render) -> tuple[bool, bool]:
    """Whether the template writes content that is text, and content that is a list of blocks."""

    def kept(form: Callable[[str], Any]) -> bool:
        messages = [
            {"role": "user", "content": form(_USER)},
            {"role": "assistant", "content": form(_ANSWER)},
        ]
        try:
            text = render(messages)
        except DataError:
            return False
        # a template for texts prints a list as Python or JSON does
        return all(
            text.count(own) == 1 and not re.search(rf"['\"]text['\"]:\s*['\"]{own}", text)
            for own in (_USER, _ANSWER)
        )

    return kept(str), kept(lambda text: [{"type": "text", "text": text}])


def in_form(messages: Sequence[Message], forms: tuple[bool, bool]) -> list[Message]:
    """The messages with their content as the template can read it."""
    takes_text, takes_blocks = forms
    out = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)) and takes_text and not takes_blocks:
            message = {**message, "content": "".join(block["text"] for block in content)}
        elif isinstance(content, str) and takes_blocks and not takes_text:
            message = {**message, "content": [{"type": "text", "text": content}]}
        out.append(message)
    return out


def left_out(messages: Sequence[Message], text: str) -> Iterator[tuple[int, str]]:
    """What of the messages does not stand in the rendered text, in order, white space collapsed.

    Yields the number of the message and what it is: its reasoning, text, or a tool call.
    """
    place, squeezed = 0, False
    for number, message in enumerate(messages):
        content = message.get("content")
        if len(message) == 2 and isinstance(content, str):  # nearly all
            found = text.find(content, place)
            if found >= 0:
                place = found + len(content)
                continue
        # system messages may be gathered at the front
        begin = end = 0 if message["role"] in ("system", "developer") else place
        for what, piece in _pieces(message):
            found = text.find(_collapsed(piece) if squeezed else piece, begin)
            if found < 0 and not squeezed:  # seldom: a template changed white space, or more
                end = len(_collapsed(text[:end] + "|")) - 1
                begin = len(_collapsed(text[:begin] + "|")) - 1
                place = len(_collapsed(text[:place] + "|")) - 1
                text, squeezed = _collapsed(text), True
                found = text.find(_collapsed(piece), max(begin - 1, 0))
            if found >= 0:
                end = max(end, found + len(piece if not squeezed else _collapsed(piece)))
                continue
            parts = _THINK.split(piece)
            at = begin
            for part in map(_collapsed, parts if len(parts) > 1 else ()):
                found = text.find(part, max(at - 1, 0))
                if found < 0:
                    break
                at = found + len(part)
            else:
                if len(parts) > 1:
                    end = max(end, at)
                    continue
            yield number, "reasoning" if what == "content" and len(parts) > 1 else what
        for call in message.get("tool_calls") or ():
            for piece in _call_pieces(call, text):
                if text.find(piece, max(begin - 1, 0)) < 0 and not _stands(piece, text):
                    yield number, f"tool call ({piece[:40]!r})"
        place = max(place, end)


def _pieces(message: Message) -> Iterator[tuple[str, str]]:
    for field in _REASONING:
        if isinstance(message.get(field), str) and message[field].strip():
            yield "reasoning", message[field].strip()
            break
    content = message.get("content")
    if isinstance(content, str):
        if content.strip():
            yield "content", content.strip()
    else:
        for block in content or ():
            if block["text"].strip():
                yield "content", block["text"].strip()


def _stands(piece: str, text: str) -> bool:
    """Whether a piece stands in the text, as it is or as JSON writes it."""
    forms = (piece, json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1])
    return any(own in text for own in forms) or any(
        _collapsed(own) in _collapsed(text) for own in forms
    )


def _call_pieces(call: Any, text: str) -> Iterator[str]:
    own = call.get("function", call) if isinstance(call, Mapping) else {}
    if isinstance(own, Mapping):
        yield str(own.get("name", ""))
        arguments = own.get("arguments")
        if isinstance(arguments, str):
            if _stands(arguments, text):  # JSON text that was written as it is
                return
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        yield from _leaves(arguments)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if item is not None:
                yield str(key)
                yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value.strip()
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def tools_left_out(tools: Sequence[Any] | None, text: str) -> bool:
    """Whether the name of a tool does not stand in the text."""
    for tool in tools or ():
        own = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = getattr(tool, "__name__", "") if own is None else dict(own).get("name", "")
        if str(name) not in text:
            return True
    return False


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def repeats(prompt: Any, completion: Any) -> bool:
    """Whether a completion begins with its prompt: text of two words or more, or messages.

    White space is collapsed and system messages are left aside. An exact echo is no repetition
    with an answer behind it: it may be what a model said.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        words = prompt.split(None, 1)
        if len(words) < 2 or not completion.lstrip().startswith(words[0]):
            return False
        head, whole = _collapsed(prompt), _collapsed(completion)
        return len(whole) > len(head) and whole.startswith(head) and not whole[len(head)].isalnum()
    if not all(isinstance(x, (list, tuple)) and x for x in (prompt, completion)):
        return False
    if not isinstance(completion[0], Mapping):
        return False  # no messages: whoever reads it says so
    if completion[0].get("role") not in ("system", "developer", "user"):
        return False
    asked, given = (
        [
            (m.get("role"), _collapsed(flat(m.get("content"))))
            for m in messages
            if isinstance(m, Mapping) and m.get("role") not in ("system", "developer")
        ]
        for messages in (prompt, completion)
    )
    return bool(asked) and len(given) > len(asked) and given[: len(asked)] == asked


def flat(content: Any) -> str:
    """The text of a content, in one piece."""
    if isinstance(content, (list, tuple)):
        return "".join(str(b.get("text", "")) for b in content if isinstance(b, Mapping))
    return content if isinstance(content, str) else ""
