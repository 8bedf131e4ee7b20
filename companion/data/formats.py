"""The five kinds of row, and how the forms that files have become them.

===========  ======================================================================================
kind         fields
===========  ======================================================================================
pairs        ``prompt`` (may be absent for text), ``chosen``, ``rejected``, ``margin`` (optional)
rankings     ``prompt``, ``completions``, ``ranks`` (1 is best; equal ranks are ties, null is no
             rank), ``ratings`` (optional)
outcomes     ``prompt``, ``completion``, ``label`` (bool: right or wrong)
steps        ``prompt``, ``completions`` (the steps, text), ``labels`` (+1, 0, −1 or null each; or
             probabilities in [0, 1] that the step is good), ``rest`` (optional: steps that follow)
prompts      ``prompt``
===========  ======================================================================================

A prompt or completion is text or a list of messages, and the same in all rows of a file. Other
columns (``id``, ``subset``, gold columns) are kept as they are. Chapter 4.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from companion.data.messages import Text, clean_text, completion_of, form, prompt_of, require
from companion.data.pairs import (
    SIDE_COLUMNS,
    VERDICT_COLUMNS,
    Row,
    finite,
    judged_pair,
    preference_pair,
    ranking_pairs,
    without,
)
from companion.data.problems import RowError
from companion.errors import DataError

KINDS: Final = ("pairs", "rankings", "outcomes", "steps", "prompts")

#: What to do about margins, see :func:`companion.data.pairs.preference_pair`.
MARGINS: Final = ("given", "ratings", "none")

_RANK_COLUMNS: Final = ("ranks", "rank")
_RATING_COLUMNS: Final = ("ratings", "rating", "scores", "score")
_ITEM_TEXT: Final = ("response", "completion", "text", "answer")
_ITEM_RATING: Final = ("overall_score", "rating", "score")

#: kind -> fields that a file of that kind has; for the message when none fits
_FIELDS: Final = {
    "pairs": "chosen and rejected; completions with ranks or ratings; or a, b and preference",
    "rankings": "prompt, completions, and ranks or ratings",
    "outcomes": "prompt, completion, label",
    "steps": "prompt, completions, labels",
    "prompts": "prompt",
}


@dataclass
class Conversion:
    """How the rows of one source become rows of one kind; counts what it did.

    Attributes
    ----------
    kind, layout : str
        What comes out, what goes in.
    convert : callable
        One row of the source to a list of rows. Raises RowError.
    left_out, notes : Counter
        As in :class:`companion.data.LoadReport`.
    """

    kind: str
    layout: str
    margins: str = "given"
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def afresh(self) -> Conversion:
        """The same without its counts."""
        return Conversion(self.kind, self.layout, self.margins)

    def __call__(self, row: Mapping[str, Any]) -> list[Row]:
        return _CONVERTERS[self.kind, self.layout](row, self)


def detect_kind(columns: Iterable[str]) -> str:
    """The kind that a file with these columns most likely holds.

    Raises
    ------
    DataError
        If no kind fits.
    """
    names = set(columns)
    for kind in ("pairs", "steps", "rankings", "outcomes", "prompts"):
        layout = _layout(names, kind)
        if layout is not None and (kind, layout) != ("pairs", "rankings"):
            return kind
    raise DataError(
        f"no kind of rows has the columns {', '.join(sorted(names)) or '(none)'}",
        "rename columns (columns={'old': 'new'}), to one of: "
        + "; ".join(f"{kind}: {text}" for kind, text in _FIELDS.items()),
    )


def _layout(names: set[str], kind: str) -> str | None:
    judged = names & set(VERDICT_COLUMNS) and any(set(s) <= names for s in SIDE_COLUMNS)
    ranked = "completions" in names and "labels" not in names
    if kind == "pairs":
        if names & {"chosen", "rejected"}:
            return "preferences"
        return "judgements" if judged else "rankings" if ranked else None
    if kind == "rankings":
        return "rankings" if ranked else None
    if kind == "steps":
        return "steps" if names & {"labels"} else None
    if kind == "outcomes":
        return "outcomes" if names & {"completion", "label"} and "chosen" not in names else None
    return "prompts" if names & {"prompt", "instruction"} else None


def find_conversion(columns: Iterable[str], kind: str, margins: str = "given") -> Conversion:
    """Choose how to read a source by its columns.

    Raises
    ------
    DataError
        If the columns do not fit the kind (and which kind they do fit, if one).
    """
    if kind not in KINDS:
        raise DataError(f"no kind {kind!r} of rows", f"take one of: {', '.join(KINDS)}, auto")
    if margins not in MARGINS:
        raise DataError(f"no margins {margins!r}", f"take one of: {', '.join(MARGINS)}")
    names = set(columns)
    layout = _layout(names, kind)
    if layout is None:
        cure = f"{kind} need {_FIELDS[kind]}; rename columns with columns={{'old': 'new'}}"
        with contextlib.suppress(DataError):
            cure += f"; these look like {detect_kind(names)} (kind={detect_kind(names)!r})"
        listing = ", ".join(sorted(names)) or "(none)"
        raise DataError(f"the columns do not fit {kind}: {listing}", cure)
    return Conversion(kind, layout, margins)


def signature(row: Mapping[str, Any]) -> dict[str, str]:
    """Form of each canonical field; all rows of a file must agree (Arrow cannot hold both)."""
    out = {name: form(row.get(name)) for name in ("prompt", "chosen", "completion") if name in row}
    out.setdefault("prompt", "none")
    if "chosen" in row:
        out["margin"] = "number" if "margin" in row else "none"
    if "ranks" in row:
        out["completions"] = form(row["completions"][0])
        out["ratings"] = "numbers" if "ratings" in row else "none"
    return out


def _one_form(prompt: Text, completion: Text, notes: Counter[str]) -> tuple[Text, Text]:
    """Text beside messages becomes a message."""
    if isinstance(prompt, str) and not isinstance(completion, str):
        notes["prompt text made a user message"] += 1
        return [{"role": "user", "content": prompt}], completion
    if isinstance(completion, str) and not isinstance(prompt, str):
        notes["completion text made an assistant message"] += 1
        return prompt, [{"role": "assistant", "content": completion}]
    return prompt, completion


def _with_prompt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """UltraFeedback (Cui et al. 2023) calls the prompt an instruction."""
    if "instruction" in row and "prompt" not in row:
        return {"prompt": row["instruction"], **without(row, "instruction")}
    return row


def _ranking(row: Mapping[str, Any], how: Conversion) -> Row:
    """K completions with ranks or ratings, in lists or as items (UltraFeedback's form)."""
    row = _with_prompt(row)
    prompt = prompt_of(row)
    items = require(row, "completions")
    if not isinstance(items, list):
        raise RowError("wrong type", "completions", f"{type(items).__name__}, no list")
    if len(items) < 2:
        raise RowError("too few completions", "completions", f"{len(items)}")
    texts: list[Any] = items
    ranks: Any = None
    ratings: Any = None
    taken = ["prompt", "completions"]
    if all(isinstance(item, Mapping) and "role" not in item for item in items):
        text_key = next((key for key in _ITEM_TEXT if key in items[0]), _ITEM_TEXT[0])
        rating_key = next((key for key in _ITEM_RATING if key in items[0]), _ITEM_RATING[0])
        if not all(text_key in item for item in items):
            raise RowError("missing field", f"completions[].{text_key}")
        texts = [item[text_key] for item in items]
        if all("rank" in item for item in items):
            ranks = [item["rank"] for item in items]
        if all(rating_key in item for item in items):
            ratings = [item[rating_key] for item in items]
        lost = sorted({k for item in items for k in item} - {text_key, rating_key, "rank"})
        if lost:
            how.notes[f"of each completion only text and rating kept, not {', '.join(lost)}"] += 1
    if ranks is None and (name := _first_filled(row, _RANK_COLUMNS)):
        ranks = row[name]
        taken.append(name)
    if ratings is None and (name := _first_filled(row, _RATING_COLUMNS)):
        ratings = row[name]
        taken.append(name)
    if ranks is None and ratings is None:
        raise RowError("missing field", "ranks", "neither ranks nor ratings")
    cleaned: list[Text] = []
    for i, text in enumerate(texts):
        if text is None:
            raise RowError("null", f"completions[{i}]")
        if isinstance(text, Mapping):  # one message is a completion too
            text = [text]
        cleaned.append(clean_text(text, f"completions[{i}]", empty="empty completion"))
    if len({form(text) for text in cleaned}) > 1:
        raise RowError("mixed types", "completions", "text and messages")
    fitted = [_one_form(prompt, text, Counter()) for text in cleaned]
    out: Row = {"prompt": fitted[0][0], "completions": [text for _, text in fitted]}
    if fitted[0] != (prompt, cleaned[0]):
        how.notes["text beside messages made a message"] += 1
    if ratings is not None:
        values = _numbers(ratings, "ratings", len(texts))
        out["ratings"] = values
        # Equal ratings share a rank; 1 is best.
        out["ranks"] = [1.0 + sum(other > value for other in values) for value in values]
    if ranks is not None:
        out["ranks"] = _ranks(ranks, len(texts))
    return out | without(row, *taken)


def _first_filled(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _numbers(values: Any, name: str, size: int) -> list[float]:
    if not isinstance(values, list):
        raise RowError("wrong type", name, f"{type(values).__name__}, no list")
    if len(values) != size:
        raise RowError("lengths differ", name, f"{size} completions and {len(values)} {name}")
    return [finite(v, f"{name}[{i}]", "rating not finite") for i, v in enumerate(values)]


def _ranks(values: Any, size: int) -> list[float | None]:
    """Ranks, null where a completion has none; at least two must have one."""
    if not isinstance(values, list):
        return list(_numbers(values, "ranks", size))  # raises
    ranked = _numbers([0 if value is None else value for value in values], "ranks", size)
    if size - values.count(None) < 2:
        raise RowError("null", "ranks", "fewer than two completions have a rank")
    return [None if value is None else rank for value, rank in zip(values, ranked, strict=True)]


def _outcome(row: Mapping[str, Any], how: Conversion) -> list[Row]:
    prompt = prompt_of(row)
    completion = completion_of(row)
    label = require(row, "label")
    if not isinstance(label, bool):
        raise RowError("label not bool", "label", f"{label!r} is {type(label).__name__}")
    prompt, completion = _one_form(prompt, completion, how.notes)
    rest = without(row, "prompt", "completion", "label")
    return [{"prompt": prompt, "completion": completion, "label": label, **rest}]


def _step_row(row: Mapping[str, Any], how: Conversion) -> list[Row]:
    prompt = prompt_of(row)
    steps, labels = require(row, "completions"), require(row, "labels")
    for name, value in (("completions", steps), ("labels", labels)):
        if not isinstance(value, list):
            raise RowError("wrong type", name, f"{type(value).__name__}, no list")
    if len(steps) != len(labels):
        detail = f"{len(steps)} completions and {len(labels)} labels"
        raise RowError("lengths differ", "labels", detail)
    if not steps:
        raise RowError("empty completion", "completions", "no steps")
    for i, step in enumerate(steps):
        if step is None:
            raise RowError("null", f"completions[{i}]")
        if not isinstance(step, str):
            raise RowError("wrong type", f"completions[{i}]", "a step is text")
        if not step.strip():
            raise RowError("empty completion", f"completions[{i}]")
    given = {type(label) for label in labels if label is not None}
    if given == {int, float}:  # soft labels: JSON writes a probability of 1.0 as 1 at times
        given = {float}
    if len(given) > 1:
        raise RowError("mixed types", "labels", " and ".join(sorted(t.__name__ for t in given)))
    clean: list[float | int | None] = [
        _soft_label(label, i) if given == {float} else _step_label(label, i)
        for i, label in enumerate(labels)
    ]
    # Some files write wrong steps as 0; here 0 is 'neutral'. Whether −1 ever occurs is known at the
    # end of the file only, so both are counted.
    how.notes[_SOFT] += float in given
    if int in given:
        how.notes[_ZEROS] += 0 in clean
        how.notes[_MINUS] += -1 in clean
    rest = without(row, "prompt", "completions", "labels")
    return [{"prompt": prompt, "completions": list(steps), "labels": clean, **rest}]


_ZEROS: Final = "zeros"
_MINUS: Final = "minus"
_SOFT: Final = "soft"


def closing_notes(how: Conversion) -> None:
    """Notes that only the whole file allows: are zeros meant as 'wrong'?"""
    zeros, minus = how.notes.pop(_ZEROS, 0), how.notes.pop(_MINUS, 0)
    if soft := how.notes.pop(_SOFT, 0):
        how.notes["labels read as probabilities that a step is good"] = soft
    elif zeros and not minus:
        how.notes["labels 0 read as neutral, and no -1 in the file: if 0 means wrong, write -1"] = (
            zeros
        )


def _step_label(label: Any, index: int) -> int | None:
    if label is None:
        return None
    if isinstance(label, bool):
        return 1 if label else -1
    if isinstance(label, int) and label in (-1, 0, 1):
        return label
    raise RowError("unknown label", f"labels[{index}]", f"{label!r}")


def _soft_label(label: Any, index: int) -> float | None:
    """A probability that the step is good."""
    if label is None:
        return None
    value = finite(label, f"labels[{index}]", "unknown label")
    if not 0 <= value <= 1:
        raise RowError("unknown label", f"labels[{index}]", f"{label!r}")
    return value


def _prompt_row(row: Mapping[str, Any], how: Conversion) -> list[Row]:
    row = _with_prompt(row)
    return [{"prompt": prompt_of(row), **without(row, "prompt")}]


_CONVERTERS: Final[dict[tuple[str, str], Callable[[Mapping[str, Any], Conversion], list[Row]]]] = {
    ("pairs", "preferences"): lambda row, how: [preference_pair(row, how.margins, how.notes)],
    ("pairs", "judgements"): lambda row, how: judged_pair(
        row, how.margins, how.notes, how.left_out
    ),
    ("pairs", "rankings"): lambda row, how: ranking_pairs(
        _ranking(row, how), how.margins, how.left_out
    ),
    ("rankings", "rankings"): lambda row, how: [_ranking(row, how)],
    ("outcomes", "outcomes"): _outcome,
    ("steps", "steps"): _step_row,
    ("prompts", "prompts"): _prompt_row,
}
