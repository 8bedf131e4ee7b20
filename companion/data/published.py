"""Rows in the columns of public data sets, brought to the companion's own.

======================  ============================================================================
published as            columns
======================  ============================================================================
HelpSteer3, HelpSteer2  ``response1`` and ``response2`` (or ``response_1``, ``response_2``) with
                        ``overall_preference`` (or ``preference_strength``): −3 to 3, below 0 the
                        first is better, 0 is a tie (arXiv 2505.11475)
PKU-SafeRLHF            ``response_0`` and ``response_1`` with ``better_response_id`` or
                        ``safer_response_id``: 0 or 1 (arXiv 2406.15513)
Chatbot Arena           ``winner_model_a``, ``winner_model_b``, ``winner_tie``: one of them is 1;
                        prompt and responses as JSON lists of turns
PRM800K                 ``question`` with ``problem``; ``label`` with ``steps``, each of rated
                        ``completions`` (arXiv 2305.20050)
Math-Shepherd           ``input`` with ``ки`` behind each step, and ``label``, the same text with
                        + or - in its place (arXiv 2312.08935)
TRL's stepwise rows     ``completions`` with a list under ``label``
pointwise scores        ``response`` with ``score``
======================  ============================================================================

What is not among them stays as it is. Chapter 4.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import Any, Final

from companion.data.messages import require
from companion.data.problems import RowError

Row = dict[str, Any]

#: columns of a verdict from −3 (the first is much better) to 3
STRENGTHS: Final = ("overall_preference", "preference_strength")
#: columns with the number of the better one; the first that a row has is read
_NUMBERS: Final = ("better_response_id", "safer_response_id")
#: columns of which one is 1, and what that says
_ONE_OF: Final = {"winner_model_a": "a", "winner_model_b": "b", "winner_tie": "tie"}
#: columns of a score, where a row has one completion
SCORES: Final = ("score", "rating")
#: what stands behind each step of Math-Shepherd's rows, and where the first one begins
_STEP_END: Final = "ки"
_FIRST_STEP: Final = re.compile(r"\s*\bStep 1\s*:")


def own_columns(row: Mapping[str, Any], notes: Counter[str]) -> list[Mapping[str, Any]]:
    """The row in the companion's columns: itself, or as many rows as it publishes.

    Parameters
    ----------
    row : mapping
    notes : Counter
        Counts what was read in which way.

    Raises
    ------
    RowError
        For a row of a known form that is not whole.
    """
    question, label = row.get("question"), row.get("label")
    if isinstance(question, Mapping) and isinstance(label, Mapping) and "steps" in label:
        return _rated_steps(row, question, label, notes)
    if isinstance(row.get("input"), str) and isinstance(label, str) and _STEP_END in row["input"]:
        return [_marked_steps(row, row["input"], label)]
    if isinstance(label, list) and "completions" in row and "labels" not in row:
        return [{**_but(row, "label"), "labels": label}]
    if row.keys() & {"chosen", "rejected", "preference", "completion"}:
        return [row]
    if row.get("response") is not None and any(name in row for name in SCORES):
        return [{**_but(row, "response"), "completion": row["response"]}]
    if found := [name for name in STRENGTHS if name in row]:
        return [{**row, "preference": _of_strength(require(row, found[0]), found[0])}]
    if found := [name for name in _NUMBERS if name in row]:
        if len(found) > 1:
            notes[
                f"the verdict is that of {found[0]!r}, not of {found[1]!r} (which is read with "
                f"--columns {found[0]}=)"
            ] += 1
        number = require(row, found[0])
        if isinstance(number, bool) or number not in (0, 1):
            raise RowError("unknown preference", found[0], f"{number!r} is neither 0 nor 1")
        return [{**row, "preference": "ab"[int(number)]}]
    if row.keys() & _ONE_OF.keys():
        said = [side for name, side in _ONE_OF.items() if row.get(name) in (1, "1")]
        if len(said) != 1:
            raise RowError("unknown preference", "winner_model_a", f"{len(said)} columns are 1")
        return [{**_conversations(row), "preference": said[0]}]
    return [row]


def _but(row: Mapping[str, Any], *names: str) -> Row:
    return {key: value for key, value in row.items() if key not in names}


def _of_strength(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -3 <= value <= 3:
        raise RowError("unknown preference", name, f"{value!r} is no number from -3 to 3")
    return "a" if value < 0 else "b" if value > 0 else "tie"


def _conversations(row: Mapping[str, Any]) -> Row:
    """Prompt and responses that are JSON lists of turns, as two conversations."""
    turns = {}
    for name in ("prompt", "response_a", "response_b"):
        text = row.get(name)
        if not isinstance(text, str) or not text.startswith("["):
            return dict(row)
        try:
            turns[name] = json.loads(text)
        except (ValueError, RecursionError):
            return dict(row)
    prompts, *both = turns.values()
    for name, said in turns.items():
        if not isinstance(said, list) or len(said) != len(prompts):
            raise RowError("lengths differ", name, "prompts and responses are not as many")
        if not all(isinstance(text, str) for text in said):
            raise RowError("null", name, "a turn is no text")

    def conversation(said: list[str]) -> list[Row]:
        pairs = chain.from_iterable(zip(prompts, said, strict=True))
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(pairs)]

    return {
        **_but(row, *turns),
        **dict(zip(("conversation_a", "conversation_b"), map(conversation, both), strict=True)),
    }


def _rated_steps(
    row: Mapping[str, Any], question: Mapping[str, Any], label: Mapping[str, Any], notes: Any
) -> list[Mapping[str, Any]]:
    """A solution of PRM800K and the alternatives to each of its steps.

    A rating counts once: an alternative is a row of its own, in which the steps before it have no
    label. A step that a labeller wrote has no rating, and no label.
    """
    prompt = require(question, "problem")
    rest = _but(row, "question", "label") | {
        key: value
        for key, value in (*question.items(), *label.items())
        if key not in ("problem", "steps") and isinstance(value, (str, int, float))
    }
    taken: list[str] = []
    ratings: list[Any] = []
    rows: list[Mapping[str, Any]] = []
    steps = label["steps"]
    for number, step in enumerate(steps if isinstance(steps, list) else ()):
        where = f"label.steps[{number}]"
        if not isinstance(step, Mapping):
            raise RowError("wrong type", where, "a step is an object with completions")
        given, chosen = step.get("completions") or [], step.get("chosen_completion")
        if not isinstance(given, list):
            raise RowError("wrong type", f"{where}.completions", f"{type(given).__name__}, no list")
        for place, one in enumerate(given):
            if not isinstance(one, Mapping) or not isinstance(one.get("text"), str):
                raise RowError("missing field", f"{where}.completions[{place}].text")
            if place != chosen and one.get("rating") is not None:
                labels = [*[None] * len(taken), one["rating"]]
                alternative = {"completions": [*taken, one["text"]], "labels": labels}
                rows.append({"prompt": prompt, **alternative, **rest})
        if isinstance(chosen, int) and 0 <= chosen < len(given):
            following = given[chosen]
        elif isinstance(step.get("human_completion"), Mapping):
            following = step["human_completion"]
            if following.get("rating") is None:
                notes["a step that a labeller wrote has no label"] += 1
        else:
            break
        taken.append(require(following, "text"))
        ratings.append(following.get("rating"))
    if any(rating is not None for rating in ratings):
        rows.insert(0, {"prompt": prompt, "completions": taken, "labels": ratings, **rest})
    if not rows:
        raise RowError("no ratings", "label.steps")
    return rows


def _marked_steps(row: Mapping[str, Any], text: str, label: str) -> Row:
    """A solution of Math-Shepherd: the question, the steps, and their + and -."""
    parts = text.split(_STEP_END)
    labels, at = [], 0
    for part in parts[:-1]:
        at += len(part)
        mark = label[at : at + 1]
        if label[at - len(part) : at] != part or mark not in ("+", "-"):
            raise RowError("unknown label", "label", f"not the input with + or - for {_STEP_END}")
        labels.append(1 if mark == "+" else -1)
        at += 1
    if parts[-1].strip() or label[at:].strip():
        raise RowError("lengths differ", "label", f"a text goes on behind the last {_STEP_END}")
    if (first := _FIRST_STEP.search(parts[0])) is None:
        raise RowError("missing field", "input", "'Step 1:', which ends the question")
    steps = [parts[0][first.start() :], *parts[1:-1]]
    rest = _but(row, "input", "label")
    prompt = parts[0][: first.start()].strip()
    completions = [step.strip() for step in steps]
    return {"prompt": prompt, "completions": completions, "labels": labels, **rest}
