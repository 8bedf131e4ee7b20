"""A solution in steps as token ids, and the token at which each step ends.

A step ends where its separator ends; the last step of a finished solution at the token that ends
the text. Tokens that straddle a border are the trap: where the tokenizer joins the separator with
its neighbour (``.\\n`` as one token, say), the step has no end of its own, and a label put at 'the
last token of the step' stands one token too early or too late. Here that is an error. Chapter 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from companion.errors import CompanionError, DataError, ModelError
from companion.formatting.encoded import Encoded
from companion.formatting.formatter import Draft, Raw, RewardFormatter, drop_second_bos


@dataclass(frozen=True, slots=True)
class EncodedSteps:
    """A solution as the model sees it.

    Attributes
    ----------
    encoded : Encoded
        The whole text.
    ends : list of int
        Position in ``encoded.input_ids`` of the token that ends each step.
    """

    encoded: Encoded
    ends: list[int]


def split_steps(text: str, separator: str) -> list[str]:
    """The steps of a text; a separator at its end closes the last one.

    >>> split_steps("a\\nb\\n", "\\n")
    ['a', 'b']
    """
    return text.removesuffix(separator).split(separator)


def encode_steps(
    formatter: RewardFormatter,
    rows: Sequence[Mapping[str, Any]],
    separator: str,
    *,
    chat: bool = True,
    names: Sequence[str] | None = None,
) -> list[EncodedSteps | CompanionError | None]:
    """Encode solutions in steps, and find where each step ends.

    Parameters
    ----------
    formatter : RewardFormatter
        Its tokenizer must be a fast one: the borders come from its offsets.
    rows : sequence of mappings
        Each with ``prompt`` and ``completions`` (the steps, text). A solution that goes on, since
        it says ``terminated=False`` or has steps under ``rest``, is closed by a separator in place
        of the end of a text.
    separator : str
        What stands between the steps.
    chat : bool
        Where the formatter's ``text`` is not decided: write a prompt of text as a user's question
        and the solution as the assistant's answer.
    names : sequence of str, optional
        How to call each row in an error.

    Returns
    -------
    list
        None for a row that is too long and was dropped; an error in place of a bad row: a step
        that holds the separator, or a separator that does not survive as tokens of its own.

    Raises
    ------
    ModelError
        If the tokenizer gives no offsets.
    """
    if not formatter.tokenizer.is_fast:
        raise ModelError(
            "the tokenizer gives no offsets, by which the ends of steps are found",
            "use the fast tokenizer of the model",
        )
    if not separator:
        raise DataError("the separator of steps is empty", r"give one, such as '\n'")
    names = names if names is not None else [f"row {i}" for i in range(len(rows))]
    chat = chat and formatter.text is None
    drafts = formatter._drafts(
        rows, ["completion"], None, names, lambda row, name: _write(row, separator, chat, name)
    )
    raw: list[Raw] = []
    encoded = formatter._encode_drafts(drafts, raw)
    spans = iter(raw)
    out: list[EncodedSteps | CompanionError | None] = []
    for row, group, found, name in zip(rows, drafts, encoded, names, strict=True):
        if isinstance(group, CompanionError):
            out.append(group)
            continue
        given = next(spans)
        if not isinstance(found, list):
            out.append(found)
            continue
        try:
            ends = _ends(formatter, group[0], given, row["completions"], separator, found[0], name)
            out.append(EncodedSteps(found[0], ends))
        except CompanionError as error:
            out.append(error)
    return out


def _write(row: Mapping[str, Any], separator: str, chat: bool, name: str) -> dict[str, Any]:
    """The row with its steps joined to one completion."""
    steps = row["completions"]
    if not steps:
        raise DataError(f"{name}: no steps")
    if isinstance(steps, str) or not all(isinstance(step, str) for step in steps):
        raise DataError(f"{name}: 'completions' is no list of texts, one a step")
    for number, step in enumerate(steps):
        if separator in step:
            raise DataError(
                f"{name}: step {number} holds the separator {separator!r}, so its text has more "
                "steps than it has labels",
                "take a separator that occurs in no step (--step_separator), or split the step",
            )
    terminated = row.get("terminated") is not False and not row.get("rest")
    content = separator.join(steps) + ("" if terminated else separator)
    shared = {key: value for key, value in row.items() if key not in ("completions", "terminated")}
    written = {**shared, "completion": content, "terminated": terminated}
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        return {**written, "completion": [{"role": "assistant", "content": content}]}
    return {**written, **as_conversation(prompt, content)} if chat else written


def as_conversation(prompt: str, completion: str) -> dict[str, Any]:
    """Text as one question and one answer, for a model that reads conversations."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def _ends(
    formatter: RewardFormatter,
    draft: Draft,
    raw: Raw,
    steps: Sequence[str],
    separator: str,
    encoded: Encoded,
    name: str,
) -> list[int]:
    content = separator.join(steps) + ("" if encoded.terminated else separator)
    begin = draft.text.find(content, draft.split)
    if begin < 0:
        raise DataError(
            f"{name}: the chat template changes the text of the steps",
            "take white space off the ends of the steps, or use another separator or template",
        )
    raw_ids, spans = raw
    # what the formatter took off the front: a second BOS, a part of the prompt
    shift = encoded.cut_tokens + drop_second_bos(list(raw_ids), formatter.tokenizer.bos_token_id)
    ends: list[int] = []
    place, at = begin, 0
    for number, step in enumerate(steps[:-1] if encoded.terminated else steps):
        place += len(step)
        stop = place + len(separator)
        # (an end token that the tokenizer adds itself has the span (0, 0))
        while at < len(spans) and spans[at][1] <= stop and not (at and spans[at] == (0, 0)):
            at += 1
        token = at - 1  # the last one that ends within the separator
        first = next(i for i in range(len(spans)) if spans[i][1] > place or i == token)
        joined = token if spans[token][0] < place else first if spans[first][0] < place else None
        if joined is None and at < len(spans) and spans[at][0] < stop:
            joined = at
        if joined is not None:
            text = formatter.tokenizer.decode([raw_ids[joined]])
            raise DataError(
                f"{name}: after step {number} the tokenizer joins the separator {separator!r} "
                f"with its neighbour to the token {text!r}, so the step has no end of its own",
                "take a separator that stays by itself (--step_separator), such as "
                + " or ".join(map(repr, _special_tokens(formatter.tokenizer))),
            )
        ends.append(token - shift)
        place = stop
    if encoded.terminated:
        stop = begin + len(content)
        ends.append(_end_of_text(formatter, encoded, spans, stop, shift))
    return ends


def _end_of_text(
    formatter: RewardFormatter,
    encoded: Encoded,
    spans: Sequence[tuple[int, int]],
    stop: int,
    shift: int,
) -> int:
    """The EOS behind the last step, or where the template writes none, the text's last token."""
    eos = formatter.tokenizer.eos_token_id
    for place in range(encoded.prompt_length, len(encoded)):
        beyond = place + shift >= len(spans) or spans[place + shift][0] >= stop
        if encoded.input_ids[place] == eos and beyond:
            return place
    return len(encoded) - 1


def _special_tokens(tokenizer: Any) -> list[str]:
    """Two tokens that never merge with text."""
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    known = [token for token in tokenizer.added_tokens_encoder if token not in used]
    return known[:2] or ["one that is added as a special token"]
