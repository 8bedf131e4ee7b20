"""Rows for a judge: pairs and single completions from the forms that files have. Chapter 3."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from companion.data.formats import (
    Conversion,
    preference_pair,
    side_columns,
    verdict_column,
    verdict_columns,
    verdict_side,
    without,
)
from companion.data.messages import Text, completion_of, prompt_of
from companion.data.problems import RowError, RowProblem

Row = Mapping[str, Any]

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
#: Where the verdict goes that a row had before it was judged.
GIVEN: Final = "given_preference"


@dataclass(frozen=True)
class Item:
    """One row, ready to be asked about.

    Attributes
    ----------
    row : dict
        ``prompt`` with ``a`` and ``b``, or with ``completion``, and the row's other fields; a
        preference that it had is ``given_preference``.
    texts : dict of str to str
        The same as plain text, for the placeholders of a template.
    """

    row: dict[str, Any]
    texts: dict[str, str]


def read_item(row: Any, mode: str, where: str) -> Item:
    """Check one row and bring it to the judge's form.

    Parameters
    ----------
    row : mapping
        Pairwise: ``prompt`` with ``a`` and ``b`` (or ``response_a`` …; ``preference``, ``winner``
        or ``label`` if there is a verdict), or with ``chosen`` and ``rejected``. Pointwise:
        ``prompt`` and ``completion``.
    mode : {"pairwise", "pointwise"}
    where : str
        The place, for errors.

    Returns
    -------
    Item
        Chosen and rejected become ``a`` and ``b`` by a hash of the two texts, so that ``a`` says
        nothing about which was chosen; ``given_preference`` does.

    Raises
    ------
    DataError
        Names the place, the field and the cure.
    """
    try:
        if not isinstance(row, Mapping):
            raise RowError("not a row", None, type(row).__name__)
        fields = {key: value for key, value in row.items() if value is not None}
        item = _pair(fields) if mode == "pairwise" else _single(fields)
        for name, text in item.texts.items():
            if _SURROGATE.search(text):
                raise RowError("no valid text", name, "it holds half of a surrogate pair")
        return item
    except RowError as error:
        raise RowProblem.of(error, where).as_error() from error


def _single(row: dict[str, Any]) -> Item:
    prompt, completion = prompt_of(row), completion_of(row)
    texts = {"prompt": spoken(prompt, row.get("tools")), "completion": spoken(completion)}
    return Item({**row, "prompt": prompt, "completion": completion}, texts)


def _pair(row: dict[str, Any]) -> Item:
    given = row.get(GIVEN)
    if "chosen" in row or "rejected" in row:
        pairs = preference_pair(row, Conversion("pairs", "preferences"))
        if len(pairs) != 1:
            raise RowError("several answers", "chosen", f"{len(pairs)} pairs in one row")
        (rest,) = pairs
        chosen, rejected = rest.pop("chosen"), rest.pop("rejected")
        first = _chosen_first(spoken(chosen), spoken(rejected))
        a, b = (chosen, rejected) if first else (rejected, chosen)
        given = "a" if first else "b"
    else:
        sides, name = side_columns(row), verdict_column(row)
        a, b = (completion_of(row, side) for side in sides)
        if name in row:
            given = verdict_side(row[name], name)
        rest = without(row, *sides, *verdict_columns(row))
    prompt = prompt_of(rest)
    texts = {"prompt": spoken(prompt, rest.get("tools")), "a": spoken(a), "b": spoken(b)}
    kept = {**rest, "prompt": prompt, "a": a, "b": b}
    return Item(kept if given is None else {**kept, GIVEN: given}, texts)


def _chosen_first(chosen: str, rejected: str) -> bool:
    digest = hashlib.sha256(f"{chosen}\x1e{rejected}".encode("utf-8", "surrogatepass"))
    return digest.digest()[0] % 2 == 0


def spoken(value: Text, tools: Any = None) -> str:
    """A text as it is, one message as its content, several as a transcript with their roles.

    Calls of tools stand behind the content, and `tools`, which could be called, before all, each as
    one line of JSON: a judge that sees the content alone would take a call for an empty answer.
    """
    if isinstance(value, str):
        text = value
    elif len(value) == 1:
        text = _said(value[0])
    else:
        text = "\n\n".join(f"{turn['role'].capitalize()}: {_said(turn)}" for turn in value)
    return text if not tools else f"Tools: {_line(tools)}\n\n{text}"


def _said(turn: Mapping[str, Any]) -> str:
    calls = turn.get("tool_calls") or ()
    own = [f"Tool call: {_line(call.get('function', call))}" for call in calls]
    return "\n".join([text for text in (turn["content"],) if text or not own] + own)


def _line(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
