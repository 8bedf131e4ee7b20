"""Pairs from everything that holds a preference.

Chapter 1 needs (prompt, chosen, rejected); files have them in many forms. Each function here takes
one row of one form and gives pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from typing import Any, Final

from companion.data.messages import (
    Message,
    Text,
    clean_text,
    form,
    is_transcript,
    parse_transcript,
    plain,
    require,
    same_text,
)
from companion.data.problems import RowError

Row = dict[str, Any]

#: columns that hold the ratings of a pair's two completions
SCORE_COLUMNS: Final = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
)

#: columns that hold the two sides of a judgement
SIDE_COLUMNS: Final = (
    ("a", "b"),
    ("response_a", "response_b"),
    ("completion_a", "completion_b"),
    ("conversation_a", "conversation_b"),
)
VERDICT_COLUMNS: Final = ("preference", "winner")
_VERDICTS: Final = {
    **dict.fromkeys(("a", "model_a", "response_a", "completion_a"), "a"),
    **dict.fromkeys(("b", "model_b", "response_b", "completion_b"), "b"),
    **dict.fromkeys(("tie", "tie (bothbad)", "both", "neither", "equal"), "tie"),
    "none": "none",  # a judge whose answer could not be read
}


def without(row: Mapping[str, Any], *names: str) -> Row:
    """The row's other fields."""
    return {key: value for key, value in row.items() if key not in names}


def side_columns(row: Mapping[str, Any]) -> tuple[str, str]:
    """What the row calls the two sides of a judgement."""
    named = (pair for pair in SIDE_COLUMNS if pair[0] in row or pair[1] in row)
    return next(named, SIDE_COLUMNS[0])


def verdict_column(row: Mapping[str, Any]) -> str:
    """What the row calls the verdict."""
    return next((column for column in VERDICT_COLUMNS if column in row), VERDICT_COLUMNS[0])


def finite(value: Any, name: str, reason: str) -> float:
    """A finite number as float; a bool or a text is none."""
    if value is None:
        raise RowError("null", name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(reason, name, f"{value!r} is {type(value).__name__}, no number")
    if not math.isfinite(value):
        raise RowError(reason, name, f"{value}")
    return float(value)


def shared_prompt(chosen: list[Message], rejected: list[Message]) -> tuple[Text, Text, Text]:
    """Split two conversations into the prompt they share and what follows (TRL's rule)."""
    from trl.data_utils import extract_prompt  # heavy, and few files need it

    parts: Any = extract_prompt({"chosen": chosen, "rejected": rejected})
    if not parts["prompt"]:
        raise RowError("no shared prompt", "chosen", "the first messages differ")
    return parts["prompt"], parts["chosen"], parts["rejected"]


def preference_pair(row: Mapping[str, Any], margins: str, notes: Counter[str]) -> Row:
    """A row with ``chosen`` and ``rejected``, with or without ``prompt``, text or messages.

    Text without a prompt stays as it is, as ``RewardTrainer`` takes it: a common prefix of
    characters would cut through words. Messages without a prompt are split where they part
    (:func:`trl.data_utils.extract_prompt`). Transcripts in the form of hh-rlhf become messages.

    Parameters
    ----------
    row : mapping
    margins : {"given", "ratings", "none"}
        ``given`` keeps a ``margin`` field; ``ratings`` makes it from the ratings of the two
        (Llama 2, Touvron et al. 2023, section 3.2.2); ``none`` drops it.
    notes : Counter
        Counts what was changed.
    """
    chosen, rejected = require(row, "chosen"), require(row, "rejected")
    prompt: Any = row.get("prompt")
    if is_transcript(chosen) and is_transcript(rejected):
        chosen = parse_transcript(chosen, "chosen")
        rejected = parse_transcript(rejected, "rejected")
        prompt = None
        notes["transcripts made messages"] += 1
    elif is_transcript(prompt) and isinstance(chosen, str) and isinstance(rejected, str):
        prompt = parse_transcript(prompt, "prompt", open_end=True)
        chosen, rejected = _reply(chosen), _reply(rejected)
        notes["transcripts made messages"] += 1
    chosen = clean_text(chosen, "chosen", empty="empty completion")
    rejected = clean_text(rejected, "rejected", empty="empty completion")
    if form(chosen) != form(rejected):
        raise RowError("mixed types", "rejected", f"{form(rejected)}; chosen is {form(chosen)}")
    if same_text(chosen, rejected):
        raise RowError("chosen equals rejected", "chosen")
    if prompt is not None:
        prompt = clean_text(prompt, "prompt", empty="empty prompt")
    prompt, chosen, rejected = _fit_forms(prompt, chosen, rejected, notes)
    pair = {} if prompt is None else {"prompt": prompt}
    pair |= {"chosen": chosen, "rejected": rejected}
    pair |= _margin(row, margins, notes)
    return pair | without(row, "prompt", "chosen", "rejected", "margin")


def _reply(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text.strip()}]


def _fit_forms(
    prompt: Text | None, chosen: Text, rejected: Text, notes: Counter[str]
) -> tuple[Text | None, Text, Text]:
    """Bring prompt and completions to one form, and take out a prompt that stands in both."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        if isinstance(prompt, list):
            notes["completion text made an assistant message"] += 1
            return prompt, _reply(plain(chosen)), _reply(plain(rejected))
        return prompt, chosen, rejected
    whole = chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant"
    if isinstance(prompt, str) and not whole:
        notes["prompt text made a user message"] += 1
        return [{"role": "user", "content": prompt}], chosen, rejected
    if isinstance(prompt, list):
        n = len(prompt)
        if chosen[:n] == prompt == rejected[:n] and min(len(chosen), len(rejected)) > n:
            # Otherwise the template would write the prompt twice.
            notes["prompt stood in both completions too"] += 1
            return prompt, chosen[n:], rejected[n:]
        return prompt, chosen, rejected
    return shared_prompt(chosen, rejected)


def _margin(row: Mapping[str, Any], margins: str, notes: Counter[str]) -> dict[str, float]:
    columns = next((pair for pair in SCORE_COLUMNS if pair[0] in row and pair[1] in row), None)
    if margins == "ratings":
        if columns is None:
            raise RowError("missing field", "score_chosen", "margins come from ratings")
        high, low = (finite(row[name], name, "rating not finite") for name in columns)
        if high < low:
            notes["the rejected one is rated higher: the margin is negative"] += 1
        return {"margin": high - low}
    if margins == "given" and row.get("margin") is not None:
        return {"margin": finite(row["margin"], "margin", "margin not finite")}
    if margins == "given" and columns is not None:
        notes["ratings kept as columns; margins='ratings' makes margins of them"] += 1
    return {}


def ranking_pairs(ranking: Mapping[str, Any], margins: str, left_out: Counter[str]) -> list[Row]:
    """All pairs of a ranking whose ranks differ, K(K−1)/2 at most (InstructGPT, section 3.5).

    With ``margins="ratings"`` the margin is the difference of ratings. Rows of one prompt stay
    together under :func:`companion.data.split_by_prompt`.
    """
    ranks, ratings = ranking["ranks"], ranking.get("ratings")
    if margins == "ratings" and ratings is None:
        raise RowError("missing field", "ratings", "margins come from ratings")
    pairs: list[Row] = []
    size = len(ranks)
    extras = without(ranking, "prompt", "completions", "ranks", "ratings")
    # One number a completion (gold rewards): each pair gets those of its two.
    each = {key: extras.pop(key) for key in list(extras) if _one_number_each(extras[key], size)}
    for i, j in combinations(range(size), 2):
        if ranks[i] is None or ranks[j] is None:
            left_out["pairs with a completion that has no rank"] += 1
            continue
        if ranks[i] == ranks[j]:
            left_out["pairs with tied ranks"] += 1
            continue
        best, worst = (i, j) if ranks[i] < ranks[j] else (j, i)
        chosen, rejected = ranking["completions"][best], ranking["completions"][worst]
        if same_text(chosen, rejected):
            left_out["pairs of equal completions"] += 1
            continue
        pair = {"prompt": ranking["prompt"], "chosen": chosen, "rejected": rejected}
        if ratings is not None:
            pair |= {"score_chosen": ratings[best], "score_rejected": ratings[worst]}
            if margins == "ratings":
                pair["margin"] = ratings[best] - ratings[worst]
        pair |= extras
        for key, values in each.items():
            stem = key.removesuffix("s")
            pair |= {f"{stem}_chosen": values[best], f"{stem}_rejected": values[worst]}
        if extras.get("id") is not None:
            pair["id"] = f"{extras['id']}/{best}>{worst}"
        pairs.append(pair)
    return pairs


def _one_number_each(value: Any, size: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == size
        and all(isinstance(item, (bool, int, float)) for item in value)
    )


def verdict_side(verdict: Any, name: str) -> str:
    """``a``, ``b``, ``tie`` or ``none`` from the names that files have for them."""
    side = _VERDICTS.get(verdict.strip().lower()) if isinstance(verdict, str) else None
    if side is None:
        raise RowError("unknown preference", name, f"{verdict!r}")
    return side


def judged_pair(
    row: Mapping[str, Any], margins: str, notes: Counter[str], left_out: Counter[str]
) -> list[Row]:
    """A row with two sides and a verdict ``a``, ``b`` or ``tie``; a tie, or none, gives no pair.

    The verdict's column stays, so that position bias can still be looked at.
    """
    sides, name = side_columns(row), verdict_column(row)
    side = verdict_side(require(row, name), name)
    first, second = require(row, sides[0]), require(row, sides[1])
    if side in ("tie", "none"):
        left_out["ties" if side == "tie" else "pairs without a verdict"] += 1
        return []
    chosen, rejected = (first, second) if side == "a" else (second, first)
    pair = without(row, *sides) | {"chosen": chosen, "rejected": rejected}
    try:
        return [preference_pair(pair, margins, notes)]
    except RowError as error:
        own = dict(zip(("chosen", "rejected"), sides if side == "a" else sides[::-1], strict=True))
        raise RowError(
            error.reason, own.get(error.field or "", error.field), error.detail
        ) from error
