"""Rows of labelled pairs, as people and pages write them, checked one by one. Chapter 7."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from companion.data.problems import RowError, RowProblem
from companion.data.readers import read_file
from companion.data.splits import prompt_key

#: of a label, the value of the first completion's victory
OUTCOMES: Final = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class LabelRow:
    """A judgement of a pair.

    Attributes
    ----------
    id : str
        With the annotator, what makes a judgement the same when it comes again.
    prompt : str
        Its ``prompt_id``, else a hash of the prompt.
    pair : str
        A hash of the texts, the same whoever judged them and which stood first.
    texts : dict
        ``prompt`` (if there is one), ``chosen`` and ``rejected``: the first and the second.
    outcome : float
        1 if the first was preferred, 0 if the second, 0.5 for a tie.
    turned : bool
        Whether the second text stands first in the order of the alphabet: annotators agree or not
        whichever text their row names first.
    time : str
        ISO 8601, UTC; empty if it is not known.
    annotator : str
    slice : str or None
    sampling : str or None
        By which rule the pair was chosen for labelling.
    scores : (float, float) or None
        Of the first and the second, if the row brings them.
    model_version : str or None
        Which model gave them.
    """

    id: str
    prompt: str
    pair: str
    texts: dict[str, Any]
    outcome: float
    turned: bool
    time: str
    annotator: str
    slice: str | None
    sampling: str | None
    scores: tuple[float, float] | None
    model_version: str | None


def read_labels(path: Path) -> Iterator[LabelRow | RowProblem]:
    """The judgements of a file, bad rows as what is wrong with them.

    Raises
    ------
    DataError
        If the file cannot be read.
    """
    for where, row in read_file(path):
        try:
            yield read_label(row)
        except RowError as error:
            yield RowProblem.of(error, where)


def read_label(row: Mapping[str, Any] | RowError) -> LabelRow:
    """One judgement.

    Parameters
    ----------
    row : mapping
        ``chosen`` and ``rejected``, or ``a``, ``b`` and ``label`` (a, b or tie); ``id``; and where
        they are known ``prompt``, ``prompt_id``, ``time``, ``annotator``, ``slice``, ``sampling``,
        ``scores`` with ``model_version``.

    Raises
    ------
    RowError
    """
    if isinstance(row, RowError):
        raise row
    sides = ("chosen", "rejected") if "chosen" in row else ("a", "b")
    for name in sides:
        value = row.get(name)
        if value is None:
            raise RowError("missing field", name)
        if not isinstance(value, (str, list)):
            raise RowError("wrong type", name, type(value).__name__)
        if not value:
            raise RowError("empty completion", name)
    outcome = 1.0
    if sides == ("a", "b"):
        if row.get("label") is None:
            raise RowError("missing field", "label")
        if row["label"] not in OUTCOMES:
            raise RowError("unknown preference", "label", str(row["label"])[:40])
        outcome = OUTCOMES[row["label"]]
    first, second = row[sides[0]], row[sides[1]]
    if first == second:
        raise RowError("chosen equals rejected", sides[0])
    texts = {"chosen": first, "rejected": second}
    if row.get("prompt") is not None:
        if not isinstance(row["prompt"], (str, list)):
            raise RowError("wrong type", "prompt", type(row["prompt"]).__name__)
        texts["prompt"] = row["prompt"]
    both = [json.dumps(text, sort_keys=True) for text in (first, second)]
    turned = both[0] > both[1]
    try:
        key = prompt_key(texts)
    except (KeyError, TypeError, AttributeError) as error:
        raise RowError("wrong type", "prompt", str(error)) from error
    pair = hashlib.sha256(
        "\n".join([key, *sorted(both)]).encode("utf-8", "surrogatepass")
    ).hexdigest()[:24]
    return LabelRow(
        id=_text(row, "id") or pair,
        prompt=_text(row, "prompt_id") or key,
        pair=pair,
        texts=texts,
        outcome=outcome,
        turned=turned,
        time=_time(row.get("time")),
        annotator=_text(row, "annotator") or "",
        slice=_text(row, "slice"),
        sampling=_text(row, "sampling"),
        scores=_scores(row.get("scores"), sides),
        model_version=_text(row, "model_version"),
    )


def _text(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RowError("wrong type", name, type(value).__name__)
    return str(value)


def _time(value: Any) -> str:
    if value is None or value == "":
        return ""
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found = datetime.fromtimestamp(value, UTC)
        else:
            found = datetime.fromisoformat(value)
    except (TypeError, ValueError, OverflowError, OSError) as error:
        raise RowError("wrong type", "time", f"no ISO 8601 time: {str(value)[:40]}") from error
    if found.tzinfo is None:
        found = found.replace(tzinfo=UTC)
    return found.astimezone(UTC).isoformat(timespec="seconds")


def _scores(value: Any, sides: tuple[str, str]) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RowError("wrong type", "scores", type(value).__name__)
    found = []
    for name in sides:
        one = value.get(name)
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not math.isfinite(one):
            raise RowError("wrong type", f"scores.{name}", "no finite number")
        found.append(float(one))
    return found[0], found[1]
