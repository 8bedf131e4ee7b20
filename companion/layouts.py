"""Which columns of a row hold its prompt, whatever they are called.

One reading for rows of a file and for rows that are handed to a formatter, a scorer or a reward
function. What it finds it brings to ``prompt`` with ``chosen`` and ``rejected``, ``completion`` or
``completions``; what could be a prompt and is not read is an error. Chapter 4.

==================  ================================================================================
layout              columns
==================  ================================================================================
Alpaca              ``instruction``, ``input`` (behind it, on a new line); ``output`` is the
                    completion; ``system``, ``history`` (pairs of question and answer)
LLaMA-Factory       those of Alpaca; or ``conversations`` with ``chosen`` and ``rejected``, each one
                    message ``{from, value}``; ``system``
ms-swift            ``messages`` with ``rejected_response`` or ``rejected_messages``; ``query``,
                    ``response``, ``rejected_response``, ``history``, ``system``
ShareGPT            ``conversations`` of ``{from, value}``
axolotl             ``system`` with ``question``, ``instruction`` or ``input``; ``chosen`` or
                    ``chosen_response``, ``rejected`` or ``rejected_response``
others              ``question``, ``query``, ``messages``, or ``context`` if it holds messages
==================  ================================================================================

A ``system`` (or ``system_prompt``) or a ``history`` makes the prompt a conversation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from companion.errors import DataError

Row = dict[str, Any]
Message = dict[str, Any]

_TEXTS: Final = ("instruction", "question", "query")
_TURNS: Final = ("messages", "conversations", "conversation")
_SYSTEM: Final = ("system", "system_prompt")
#: may hold a prompt, or a part of it
_SUSPECTS: Final = (
    *(*_TURNS, *_TEXTS, "input", "history", "context", "problem", "passage", "document"),
    *("article", "dialogue", "dialog", "post"),
)
#: the same, where there is no prompt
_ALONE: Final = ("text", "user", "human")
_REPLIES: Final = ("rejected_response", "rejected_messages", "chosen_response", "output")
_NAMES: Final = frozenset((*_SUSPECTS, *_ALONE, *_SYSTEM, *_REPLIES))
#: columns that hold what is scored
ANSWERS: Final = (
    *("chosen", "rejected", "completion", "completions", "a", "b", "response_a", "response_b"),
    *("completion_a", "completion_b", "conversation_a", "conversation_b"),
    *("response_0", "response_1", "response_2", "response1", "response2"),
)
#: ShareGPT's names for the roles
ALIASES: Final = {"human": "user", "gpt": "assistant"}

#: reason -> cure
LAYOUT_CURES: Final = {
    "null": "fill the field in, or leave the row out",
    "empty prompt": "fill the prompt in, or leave the field out of all rows (--columns prompt=)",
    "may hold the prompt": "say which column is the prompt (--columns question=prompt, in Python "
    "columns={'question': 'prompt'}); leave this one out (--columns context=), or give it another "
    "name (--columns context=about)",
    "two system messages": "leave one of them out (--columns system=)",
    "prompt in one side only": "write the prompt once, in 'prompt', or in both completions",
    "prompt is another": "the conversations must begin with the prompt, or hold the answers alone",
}


class RowError(Exception):
    """One row that cannot be used. Who reads rows catches it and adds the place."""

    def __init__(self, reason: str, field: str | None = None, detail: str = "") -> None:
        self.reason, self.field, self.detail = reason, field, detail
        super().__init__(reason)

    def at(self, where: str) -> DataError:
        """The error with its place, for a row that was not read from a file by the loader."""
        detail = f" ({self.detail})" if self.detail else ""
        text = f"{where}, field {self.field!r}: {self.reason}{detail}"
        return DataError(text, LAYOUT_CURES[self.reason])


def with_prompt(
    row: Mapping[str, Any],
    notes: Counter[str] | None = None,
    *,
    answers: Sequence[str] = (),
    alone: bool = False,
    chat: bool = False,
) -> Mapping[str, Any]:
    """The row with its prompt under ``prompt``; the row itself if it is there already.

    Parameters
    ----------
    row : mapping
    notes : Counter, optional
        Counts what was changed.
    answers : sequence of str
        Further columns that hold what is scored, besides :data:`ANSWERS`.
    alone : bool
        The row is a prompt for a policy: it holds no answer.
    chat : bool
        Make a prompt of text a conversation, since other rows of the file have a system message.

    Raises
    ------
    RowError
        For a column that may hold the prompt and is not read, and a prompt that is null beside a
        completion that does not hold it.
    """
    found = [name for name in row.keys() & _NAMES if _filled(row[name])]
    if not found and not (chat and isinstance(row.get("prompt"), str)):
        _check_null(row, (*ANSWERS, *answers))
        return row
    notes = Counter() if notes is None else notes
    out = dict(row)
    if not alone:
        _name_answers(out, notes)
    held = [name for name in (*ANSWERS, *answers) if out.get(name) is not None]
    if not held and not alone:
        return _whole(out, notes)
    if out.get("prompt") is None:
        _find_prompt(out, held, notes)
    _add_history(out, notes)
    _add_system(out, held, notes, chat)
    _check_null(out, held)
    _check_left(out, held)
    return out


def read_row(
    row: Any, where: str, answers: Sequence[str], notes: Counter[str], *, alone: bool = False
) -> Any:
    """As :func:`with_prompt`, for a row of any form that was handed over with a name.

    Raises
    ------
    DataError
        With the name, the column and the cure.
    """
    if not isinstance(row, Mapping):
        return row
    try:
        return with_prompt(row, notes, answers=answers, alone=alone)
    except RowError as error:
        raise error.at(where) from error


def has_turns(row: Mapping[str, Any]) -> bool:
    """Whether a system message or a history makes the row's prompt a conversation."""
    return any(_is_text(row.get(name)) for name in _SYSTEM) or bool(row.get("history"))


def columns_of(items: Iterable[str]) -> dict[str, str]:
    """Old to new names of columns from ``OLD=NEW``; ``OLD=`` leaves the column out.

    Raises
    ------
    DataError
        For an item of another form.
    """
    columns: dict[str, str] = {}
    for item in items:
        old, equals, new = item.partition("=")
        if not (old and equals):
            raise DataError(
                f"--columns {item}", "write OLD=NEW, e.g. question=prompt; OLD= leaves it out"
            )
        columns[old] = new
    return columns


def rename_columns(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Row:
    """The row with its columns renamed; one whose new name is empty is left out.

    Raises
    ------
    DataError
        If a new name is taken.
    """
    out: Row = {}
    for key, value in row.items():
        new = columns.get(key, key)
        if not new:
            continue
        if new in out or (new != key and new in row and new not in columns):
            raise DataError(
                f"{where}: renaming {key!r} to {new!r} meets a column of that name",
                f"rename that one too, e.g. --columns {new}=old_{new} "
                f"(columns={{{new!r}: 'old_{new}'}})",
            )
        out[new] = value
    return out


# ---------------------------------------------------------------------- what stands where


def _name_answers(row: Row, notes: Counter[str]) -> None:
    """``chosen``, ``rejected`` and ``completion``, in place."""
    if row.get("rejected") is None and row.get("chosen") is None:
        if is_turns(row.get("rejected_messages")) and is_turns(row.get("messages")):
            row["chosen"] = row.pop("messages")
            row["rejected"] = row.pop("rejected_messages")
            notes["chosen and rejected taken from 'messages' and 'rejected_messages'"] += 1
        elif _filled(row.get("rejected_response")) and is_turns(row.get("messages")):
            turns = as_messages(row["messages"])
            if turns[-1].get("role") == "assistant":
                row["chosen"] = [turns[-1]]
                row["messages"] = turns[:-1]
                row["rejected"] = _reply(row.pop("rejected_response"))
                notes["chosen taken from the end of 'messages', rejected from its response"] += 1
        elif _filled(row.get("rejected_response")):
            for name in ("chosen_response", "response"):
                if _filled(row.get(name)):
                    row["chosen"], row["rejected"] = row.pop(name), row.pop("rejected_response")
                    notes[f"chosen and rejected taken from {name!r} and 'rejected_response'"] += 1
                    break
    for name in ("chosen", "rejected"):
        if isinstance(row.get(name), Mapping) and row.keys() & set(_TURNS):
            row[name] = as_messages([row[name]])  # LLaMA-Factory
    if (
        isinstance(row.get("output"), str)
        and "instruction" in row
        and not any(row.get(name) is not None for name in ANSWERS)
    ):
        row["completion"] = row.pop("output")
        notes["completion taken from 'output'"] += 1


def _find_prompt(row: Row, held: Sequence[str], notes: Counter[str]) -> None:
    """Bring the prompt to ``prompt``, in place, if there is one."""
    prompt: Any
    turns = [n for n in (*_TURNS, "context", "history", *_TEXTS, "input") if is_turns(row.get(n))]
    turns = [name for name in turns if not _is_copy(row, name, held)]
    if "history" in turns and (len(turns) > 1 or any(_is_text(row.get(n)) for n in _TEXTS)):
        turns.remove("history")  # earlier turns
    texts = [name for name in _TEXTS if _is_text(row.get(name))]
    if turns:
        name = turns[0]
        messages = as_messages(row[name])
        if messages[-1].get("role") == "assistant":
            last = _collapsed(messages[-1].get("content"))
            if not any(_collapsed(_text(row[n])).endswith(last) for n in held if last):
                raise RowError(
                    "may hold the prompt",
                    name,
                    f"it ends with an answer of its own, beside {', '.join(held) or 'no other'}",
                )
            messages = messages[:-1]
        taken, prompt = [name], messages
    elif texts:
        taken, prompt = texts[:1], row[texts[0]]
        if _is_text(row.get("input")):
            taken.append("input")
            prompt = f"{prompt}\n{row['input']}"
    elif _is_text(row.get("input")):
        taken, prompt = ["input"], row["input"]
    else:
        return
    row.pop("prompt", None)
    for name in taken:
        del row[name]
    rest = dict(row)
    row.clear()
    row.update({"prompt": prompt}, **rest)
    notes[f"prompt made of {' and '.join(map(repr, taken))}"] += 1


def _is_copy(row: Row, name: str, held: Iterable[str]) -> bool:
    """Whether a conversation is one of the answers, written once more."""
    whole = _collapsed(_text(row[name]))
    return any(is_turns(row[n]) and _collapsed(_text(row[n])) == whole for n in held)


def _add_history(row: Row, notes: Counter[str]) -> None:
    """Earlier turns before the prompt, in place."""
    history, prompt = row.get("history"), row.get("prompt")
    if not _conversation(prompt) or not isinstance(history, (list, tuple)) or not history:
        return
    if is_turns(history):
        turns = as_messages(history)
    elif all(isinstance(p, (list, tuple)) and [*map(type, p)] == [str, str] for p in history):
        roles = ("user", "assistant")
        turns = [
            {"role": role, "content": text}
            for pair in history
            for role, text in zip(roles, pair, strict=True)
        ]
    else:
        return
    if _collapsed(_text(turns)) not in _collapsed(_text(prompt)):
        row["prompt"] = [*turns, *_conversation(prompt)]
        notes["'history' made earlier turns of the prompt"] += 1
    del row["history"]


def _add_system(row: Row, held: Sequence[str], notes: Counter[str], chat: bool) -> None:
    """A system message before the prompt, in place."""
    for name in _SYSTEM:
        text = row.get(name)
        if isinstance(text, (list, tuple, Mapping)) and text:
            raise RowError("may hold the prompt", name, f"{type(text).__name__}, no text")
        if not _is_text(text):
            continue
        places = ["prompt"] if row.get("prompt") is not None else held
        for place in places:
            if place != "prompt" and not is_turns(row[place]):
                raise RowError("may hold the prompt", name, "and there is no other prompt")
            if isinstance(row[place], str) and row[place].startswith("\n\nHuman:"):
                raise RowError("may hold the prompt", name, "a transcript has no place for it")
            turns = _conversation(row[place])
            if not turns:
                continue  # neither text nor messages: whoever reads it says so
            if turns[0].get("role") in ("system", "developer"):
                if _collapsed(turns[0].get("content")) != _collapsed(text):
                    raise RowError("two system messages", name, f"{place!r} has another one")
            else:
                turns = [{"role": "system", "content": text}, *turns]
            row[place] = turns
        del row[name]
        notes[f"{name!r} made a system message, and the prompt a conversation"] += 1
    if chat and isinstance(row.get("prompt"), str):
        row["prompt"] = _conversation(row["prompt"])


def _whole(row: Row, notes: Counter[str]) -> Row:
    """A row that is one conversation or text."""
    turns = [name for name in _TURNS if is_turns(row.get(name))]
    if row.get("messages") is None and turns:
        row["messages"] = as_messages(row.pop(turns[0]))
        notes[f"conversation taken from {turns[0]!r}"] += 1
    held = "messages" if row.get("messages") is not None else "text"
    if row.get("prompt") is None and row.get(held) is not None:
        _add_system(row, [held], notes, chat=False)
        _check_left(row, [held])
    return row


# ---------------------------------------------------------------------- what cannot be right


def _check_null(row: Mapping[str, Any], held: Iterable[str]) -> None:
    """Refuse a prompt that is null or empty, beside anything but a whole conversation."""
    if "prompt" not in row or _filled(row["prompt"]):
        return
    for name in held:
        value = row.get(name)
        if value is not None and not (is_turns(value) and value[0].get("role") != "assistant"):
            reason = "null" if row["prompt"] is None else "empty prompt"
            raise RowError(reason, "prompt", f"beside {name!r}, which does not hold it")


def _check_left(row: Row, held: Sequence[str]) -> None:
    """Refuse a column that could be a part of the prompt: whatever stands in the text is none."""
    prompt = row.get("prompt")
    for name in (*_SUSPECTS, *(_ALONE if prompt is None else ())):
        value = row.get(name)
        could_be = _is_text(value) or is_turns(value) or (name == "history" and bool(value))
        if name in held or not could_be:
            continue
        scored = [_text(row[n]) for n in held]
        texts = scored if prompt is None else [_text(prompt)]
        parts: list[Any] = [value]
        if is_turns(value):
            parts = [message.get("content") for message in as_messages(value or [])]
            texts = ["\n".join([_text(prompt or ""), *scored])]
        kept = all(_collapsed(_text(part)) in _collapsed(text) for part in parts for text in texts)
        if not kept or not texts:
            beside = "beside another prompt" if prompt is not None else "and no other is read"
            raise RowError("may hold the prompt", name, beside)


# ---------------------------------------------------------------------- a prompt that stands twice


#: a shorter prompt may well begin an answer by chance
_CERTAIN: Final = 12


def take_out(prompt: Any, completions: Sequence[Any], notes: Counter[str]) -> tuple[Any, list[Any]]:
    """Prompt and completions, of which those that repeat the prompt have lost it.

    Compared with white space collapsed, and messages without a system message before them. Text is
    taken out only if all of at least two completions begin with the prompt, and it has
    12 characters or more: a single answer may repeat its question.

    Raises
    ------
    RowError
        If the prompt stands in some conversations only, or they begin with another one.
    """
    if isinstance(prompt, str) and all(isinstance(item, str) for item in completions):
        rests = [text_after(prompt, item) for item in completions]
        if None not in rests and len(rests) > 1 and len("".join(prompt.split())) >= _CERTAIN:
            notes["prompt stood in all completions too, and was taken out of them"] += 1
            return prompt, rests
        if any(rest is not None for rest in rests):
            notes["a completion begins with its prompt, and was left as it is"] += 1
        return prompt, list(completions)
    if isinstance(prompt, str) or any(isinstance(item, str) for item in completions):
        return prompt, list(completions)
    found = [turns_after(prompt, item) for item in completions]
    if all(rest is None for rest in found):
        asked = _without_system(prompt)
        for item in completions:
            first = item[0].get("role")
            if asked and asked[-1].get("role") == "user" and first in ("user", "system"):
                raise RowError("prompt is another", "prompt", "a completion asks anew")
        return prompt, list(completions)
    if None in found:
        raise RowError("prompt in one side only", "prompt")
    systems = [_system(prompt), *map(_system, completions)]
    given = {_collapsed(_text(s)) for s in systems if s}
    if len(given) > 1:
        raise RowError("two system messages", "prompt", "the completions have another one")
    if given and not systems[0]:
        prompt = [*next(s for s in systems if s), *prompt]
    notes["prompt stood in all completions too, and was taken out of them"] += 1
    return prompt, found


def text_after(prompt: str, completion: str) -> str | None:
    """What follows the prompt in a completion that begins with it, up to white space; else None."""
    words, at = prompt.split(), 0
    for number, word in enumerate(words):
        start = at
        while at < len(completion) and completion[at].isspace():
            at += 1
        if (number and at == start) or not completion.startswith(word, at):
            return None
        at += len(word)
    rest = completion[at:]
    if not words or not rest.strip():
        return None
    ends = words[-1][-1], rest[0]
    if all(char.isascii() and char.isalnum() for char in ends):  # 'plus 1' is not in 'plus 12'
        return None
    return rest.lstrip() if prompt[-1].isspace() else rest


def turns_after(
    prompt: Sequence[Mapping[str, Any]], completion: Sequence[Mapping[str, Any]]
) -> list[Any] | None:
    """What follows the prompt in a conversation that begins with it; else None.

    White space is collapsed, and a system message before either makes no difference.
    """
    asked, said = _without_system(prompt), _without_system(completion)
    n = len(asked)
    if not asked or len(said) <= n:
        return None
    return said[n:] if all(map(_same, asked, said[:n])) else None


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    rest = [{k: v for k, v in m.items() if k != "content" and v is not None} for m in (a, b)]
    return rest[0] == rest[1] and _collapsed(_text([a])) == _collapsed(_text([b]))


def _system(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    return list(messages[: len(messages) - len(_without_system(messages))])


def _without_system(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    start = next(
        (i for i, m in enumerate(messages) if m.get("role") not in ("system", "developer")),
        len(messages),
    )
    return list(messages[start:])


# ---------------------------------------------------------------------- texts and messages


def is_turns(value: Any) -> bool:
    """Whether it is a list of messages, by whichever names."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in value)
    )


def as_messages(turns: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages with ``role`` and ``content``, also from ShareGPT's ``from`` and ``value``."""
    return [_renamed(message) for message in turns]


def _renamed(message: Mapping[str, Any]) -> Message:
    out = {key: value for key, value in message.items() if value is not None}
    for old, new in (("value", "content"), ("from", "role")):
        if old in out and new not in out:
            out = {new: out.pop(old), **out}
    role = out.get("role")
    return {**out, "role": ALIASES.get(role, role)} if isinstance(role, str) else out


def _conversation(prompt: Any) -> list[Any]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return as_messages(prompt) if is_turns(prompt) else []


def _reply(answer: Any) -> Any:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _filled(value: Any) -> bool:
    return _is_text(value) or (value is not None and not isinstance(value, str) and value != [])


def _text(value: Any) -> str:
    return "\n".join(_words(value))


def _words(value: Any) -> Iterator[str]:
    """All text in it: of messages their contents, of content blocks their texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key in ("content", "value", "text"):
            if value.get(key) is not None:
                yield from _words(value[key])
                return
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _words(item)


def _collapsed(text: Any) -> str:
    return " ".join(_text(text).split())
