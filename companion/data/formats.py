"""The six kinds of row, and how the forms that files have become them.

===========  ======================================================================================
kind         fields
===========  ======================================================================================
pairs        ``prompt`` (may be absent for text), ``chosen``, ``rejected``, ``margin`` (optional)
rankings     ``prompt``, ``completions``, ``ranks`` (1 is best; equal ranks are ties, null is no
             rank), ``ratings`` (optional)
outcomes     ``prompt``, ``completion``, ``label`` (bool, or 1 and 0: right or wrong)
scores       ``prompt``, ``completion``, ``score``; read as pairs or rankings, the answers to one
             prompt are compared
steps        ``prompt``, ``completions`` (the steps, text), ``labels`` (+1, 0, −1 or null each; or
             probabilities in [0, 1] that the step is good), ``rest`` (optional: steps that follow)
prompts      ``prompt``
===========  ======================================================================================

A prompt under another name (``instruction`` and ``input``, ``question``, ``messages``,
``conversations``, …) with ``system`` and ``history`` is read by :mod:`companion.layouts`, whose
table lists the known layouts; a column that may hold it and is not read is an error. Verdicts and
labels as public data sets have them are read by :mod:`companion.data.published`. Of several
``chosen`` and ``rejected`` (RewardBench 2) each is compared with each.

A prompt or completion is text or a list of messages, and the same in all rows of a file. Other
columns (``id``, ``subset``, gold columns) are kept as they are. Chapter 4.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Final

from companion.data.messages import (
    Message,
    Text,
    clean_text,
    completion_of,
    form,
    is_transcript,
    parse_transcript,
    plain,
    prompt_of,
    require,
    same_text,
)
from companion.data.problems import RowError
from companion.data.published import SCORES, STRENGTHS, own_columns
from companion.errors import DataError, listed
from companion.layouts import take_out, with_prompt

Row = dict[str, Any]

KINDS: Final = ("pairs", "rankings", "outcomes", "steps", "scores", "prompts")

#: What to do about margins, see :func:`preference_pair`.
MARGINS: Final = ("given", "ratings", "none")

_RANK_COLUMNS: Final = ("ranks", "rank")
_RATING_COLUMNS: Final = ("ratings", "rating", "scores", "score")
_ITEM_TEXT: Final = ("response", "completion", "text", "answer")
_ITEM_RATING: Final = ("overall_score", "rating", "score")

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
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response1", "response2"),
)
#: what is called so belongs to a preference, and a row that has it is no mere prompt
_COMPARED: Final = re.compile(
    r"chosen|reject|prefer|winner|better|worse|verdict"
    r"|(response|completion|answer|output|conversation|candidate|reply|generation|choice)s?"
    r"_?([ab]|\d+)$",
    re.IGNORECASE,
)
#: columns that hold the prompt in some files, if one knows that they hold prompts
_PROMPTS: Final = ("question", "query", "input", "messages", "conversations")
#: columns that hold the verdict
VERDICT_COLUMNS: Final = ("preference", "winner", "label")
_VERDICTS: Final = {
    **dict.fromkeys(("a", "model_a", "response_a", "completion_a"), "a"),
    **dict.fromkeys(("b", "model_b", "response_b", "completion_b"), "b"),
    **dict.fromkeys(("tie", "tie (bothbad)", "both_bad", "both", "neither", "equal"), "tie"),
    "none": "none",  # a judge whose answer could not be read
}

#: what a missing value becomes when it is printed
_MISSING: Final = frozenset(("na", "n/a", "nan", "none", "null"))

#: kind -> fields that a file of that kind has; for the message when none fits
_FIELDS: Final = {
    "pairs": "chosen and rejected; completions with ranks or ratings; or a, b and preference "
    "(winner, label)",
    "rankings": "prompt, completions, and ranks or ratings",
    "outcomes": "prompt, completion, label",
    "steps": "prompt, completions, labels",
    "scores": "prompt, completion, score",
    "prompts": "prompt",
}

#: kind -> layouts that fit another kind better, if nobody says which it is
_LATER: Final = {"pairs": ("rankings", "scores"), "rankings": ("preferences", "scores")}


@dataclass
class Conversion:
    """How the rows of one source become rows of one kind; counts what it did.

    Attributes
    ----------
    kind, layout : str
        What comes out, what goes in.
    chat : bool
        Prompts of text become conversations, since some rows have a system message or a history.
    left_out, notes : Counter
        As in :class:`companion.data.LoadReport`.
    """

    kind: str
    layout: str
    margins: str = "given"
    chat: bool = False
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def afresh(self) -> Conversion:
        """The same without its counts."""
        return Conversion(self.kind, self.layout, self.margins, self.chat)

    def __call__(self, row: Mapping[str, Any]) -> list[Row]:
        """One row of the source to a list of rows. Raises RowError."""
        rows: list[Row] = []
        for own in own_columns(row, self.notes):
            own = with_prompt(own, self.notes, alone=self.kind == "prompts", chat=self.chat)
            rows += _CONVERTERS[self.kind, self.layout](own, self)
        for name in ("prompt", "chosen", "rejected", "completion"):
            if any(
                str(out.get(name)).strip().lower() in _MISSING and out.get(name) for out in rows
            ):
                self.notes[f"{name!r} is NA, NaN, None or null: a missing value, printed?"] += 1
        return rows


def detect_kind(columns: Iterable[str]) -> str:
    """The kind that a file with these columns most likely holds.

    Raises
    ------
    DataError
        If no kind fits.
    """
    names = set(columns)
    for kind in ("pairs", "steps", "rankings", "scores", "outcomes", "prompts"):
        layout = _layout(names, kind)
        compared = sorted(filter(_COMPARED.search, names)) if kind == "prompts" else []
        if compared and layout is not None:
            raise DataError(
                f"beside a prompt there is {', '.join(compared)}: are these pairs? No known layout "
                "has these columns",
                f"rename columns (columns={{'old': 'new'}}) to {_FIELDS['pairs']}; if the prompts "
                "alone are meant, say so (kind='prompts', --kind prompts)",
            )
        if layout is not None and layout not in _LATER.get(kind, ()):
            return kind
    raise DataError(
        f"no kind of rows has the columns {listed(names)}",
        "rename columns (columns={'old': 'new'}), to one of: "
        + "; ".join(f"{kind}: {text}" for kind, text in _FIELDS.items()),
    )


def _layout(names: set[str], kind: str, asked: bool = False) -> str | None:
    # (with a completion, `label` says whether that is right)
    verdicts = names & set(VERDICT_COLUMNS) - ({"label"} if "completion" in names else set())
    judged = verdicts and any(set(s) <= names for s in SIDE_COLUMNS)
    scored = "completion" in names and "label" not in names and names & set(SCORES)
    fits = {
        "preferences": names & {"chosen", "rejected", "rejected_response", "rejected_messages"},
        "judgements": judged,
        "rankings": "completions" in names and "labels" not in names,
        "scores": scored and not names & {"chosen", "rejected"},
        "outcomes": names & {"completion", "label"} and "chosen" not in names and not scored,
        "steps": "labels" in names,
        "prompts": names & {"prompt", "instruction", *(_PROMPTS if asked else ())},
    }
    return next((layout for of, layout in _CONVERTERS if of == kind and fits[layout]), None)


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
    layout = _layout(names, kind, asked=True)
    if layout is None:
        cure = f"{kind} need {_FIELDS[kind]}; rename columns with columns={{'old': 'new'}}"
        with contextlib.suppress(DataError):
            cure += f"; these look like {detect_kind(names)} (kind={detect_kind(names)!r})"
        raise DataError(f"the columns do not fit {kind}: {listed(names)}", cure)
    return Conversion(kind, layout, margins)


def signature(row: Mapping[str, Any]) -> dict[str, str]:
    """Form of each canonical field; all rows of a file must agree (Arrow cannot hold both)."""
    out = {name: form(row.get(name)) for name in ("prompt", "chosen", "completion") if name in row}
    out.setdefault("prompt", "none")
    if "chosen" in row:
        out["margin"] = "number" if "margin" in row else "none"
    completions = row.get("completions")
    if "ranks" in row and completions and not row.keys() & {"chosen", "completion"}:
        out["completions"] = form(completions[0])
        out["ratings"] = "numbers" if "ratings" in row else "none"
    labels = row.get("labels") or ()
    if any(isinstance(label, float) for label in labels):  # (1 and 0 are either)
        out["labels"] = "probabilities"
    elif -1 in labels:
        out["labels"] = "classes"
    return out


def without(row: Mapping[str, Any], *names: str) -> Row:
    """The row's other fields."""
    return {key: value for key, value in row.items() if key not in names}


def side_columns(row: Mapping[str, Any]) -> tuple[str, str]:
    """What the row calls the two sides of a judgement."""
    present = {pair: sum(side in row for side in pair) for pair in SIDE_COLUMNS}
    return max(present, key=lambda pair: present[pair])  # the first of those with the most


def verdict_column(row: Mapping[str, Any]) -> str:
    """What the row calls the verdict."""
    return next((column for column in VERDICT_COLUMNS if column in row), VERDICT_COLUMNS[0])


def verdict_columns(row: Mapping[str, Any]) -> list[str]:
    """What of the row is a verdict: ``label`` beside another only if it reads as one."""
    found = [column for column in VERDICT_COLUMNS if row.get(column) is not None]
    label = row.get("label")
    if len(found) > 1 and not (isinstance(label, str) and label.strip().lower() in _VERDICTS):
        found = [column for column in found if column != "label"]
    return found


def finite(value: Any, name: str, reason: str) -> float:
    """A finite number as float; a bool or a text is none."""
    if value is None:
        raise RowError("null", name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(reason, name, f"{value!r} is {type(value).__name__}, no number")
    try:
        number = float(value)
    except OverflowError as error:
        raise RowError(reason, name, "more digits than a float holds") from error
    if not math.isfinite(number):
        raise RowError(reason, name, f"{value}")
    return number


def _one_form(prompt: Text, completion: Text, notes: Counter[str]) -> tuple[Text, Text]:
    """Text beside messages becomes a message."""
    if isinstance(prompt, str) and not isinstance(completion, str):
        notes["prompt text made a user message"] += 1
        return [{"role": "user", "content": prompt}], completion
    if isinstance(completion, str) and not isinstance(prompt, str):
        notes["completion text made an assistant message"] += 1
        return prompt, [{"role": "assistant", "content": completion}]
    return prompt, completion


# ---------------------------------------------------------------------- pairs


def preference_pair(row: Mapping[str, Any], how: Conversion) -> list[Row]:
    """A row with ``chosen`` and ``rejected``, with or without ``prompt``, text or messages.

    Text without a prompt stays as it is, as ``RewardTrainer`` takes it: a common prefix of
    characters would cut through words. Messages without a prompt are split where they part
    (:func:`trl.data_utils.extract_prompt`). Transcripts in the form of hh-rlhf become messages.

    Parameters
    ----------
    row : mapping
    how : Conversion
        Margins: ``given`` keeps a ``margin`` field; ``ratings`` makes it from the ratings of the
        two (Llama 2, Touvron et al. 2023, section 3.2.2); ``none`` drops it. Its notes count what
        was changed.
    """
    notes = how.notes
    chosen, rejected = require(row, "chosen"), require(row, "rejected")
    if _several(chosen) or _several(rejected):
        return _each_pair(row, how)
    prompt: Any = row.get("prompt")
    _check_verdict(row, chosen, rejected)
    if is_transcript(chosen) and is_transcript(rejected):
        if isinstance(prompt, str) and " ".join(prompt.split()) not in " ".join(chosen.split()):
            raise RowError("prompt is another", "prompt")
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
        whole = isinstance(prompt, list) and any(
            isinstance(side, list) and side[0]["role"] != "assistant" for side in (chosen, rejected)
        )
        reason = "prompt in one side only" if whole else "mixed types"
        raise RowError(reason, "rejected", f"{form(rejected)}; chosen is {form(chosen)}")
    if same_text(chosen, rejected):
        raise RowError("chosen equals rejected", "chosen")
    if prompt is not None:
        prompt = clean_text(prompt, "prompt", empty="empty prompt")
    prompt, chosen, rejected = _fit_forms(prompt, chosen, rejected, notes)
    pair = {} if prompt is None else {"prompt": prompt}
    pair |= {"chosen": chosen, "rejected": rejected}
    pair |= _margin(row, how)
    return [pair | without(row, "prompt", "chosen", "rejected", "margin")]


def _several(value: Any) -> bool:
    """Whether it is a list of completions: of texts, or of lists of messages."""
    if not isinstance(value, list) or not value:
        return False
    return isinstance(value[0], str) or all(isinstance(item, list) for item in value)


def _each_pair(row: Mapping[str, Any], how: Conversion) -> list[Row]:
    """Every chosen against every rejected one, where a row has several (RewardBench 2)."""
    sides = [row[name] if _several(row[name]) else [row[name]] for name in ("chosen", "rejected")]
    pairs: list[Row] = []
    for i, chosen in enumerate(sides[0]):
        for j, rejected in enumerate(sides[1]):
            try:
                pairs += preference_pair({**row, "chosen": chosen, "rejected": rejected}, how)
            except RowError as error:
                place = {"chosen": i, "rejected": j}.get(error.field or "")
                error.field += "" if place is None else f"[{place}]"  # type: ignore[operator]
                raise
            if row.get("id") is not None and len(sides[0]) * len(sides[1]) > 1:
                pairs[-1]["id"] = f"{row['id']}/{i}>{j}"
    if len(pairs) > 1:
        how.notes["several chosen or rejected: each chosen one against each rejected one"] += 1
    return pairs


def _sides_ranked(row: Mapping[str, Any], how: Conversion) -> list[Row]:
    """The chosen completions share the first rank, the rejected ones the second."""
    texts: dict[str, list[Any]] = {"chosen": [], "rejected": []}
    for pair in preference_pair(row, how):
        for name, found in texts.items():
            if pair[name] not in found:
                found.append(pair[name])
    ranks = [1] * len(texts["chosen"]) + [2] * len(texts["rejected"])
    rest = without(row, "chosen", "rejected", "margin")
    given = {**rest, "completions": texts["chosen"] + texts["rejected"], "ranks": ranks}
    if "prompt" in pair:
        given["prompt"] = pair["prompt"]
    return _ranking(given, how)


def _check_verdict(row: Mapping[str, Any], chosen: Any, rejected: Any) -> None:
    """Refuse a row that chooses one side and says that the other won."""
    sides, name = side_columns(row), verdict_column(row)
    if row.get(name) is None or any(row.get(side) is None for side in sides):
        return
    if [row[side] for side in sides] in ([chosen, rejected], [rejected, chosen]):
        said = _VERDICTS.get(str(row[name]).strip().lower())
        if said == ("b" if chosen == row[sides[0]] else "a"):
            raise RowError("verdicts disagree", name, f"{row[name]!r}, but chosen is the other one")


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
        if prompt is not None:
            prompt, (chosen, rejected) = take_out(prompt, (chosen, rejected), notes)
        return prompt, chosen, rejected
    whole = chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant"
    if isinstance(prompt, str) and not whole:
        notes["prompt text made a user message"] += 1
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        prompt, (chosen, rejected) = take_out(prompt, (chosen, rejected), notes)
        return prompt, chosen, rejected
    from trl.data_utils import extract_prompt  # heavy, and few files need it

    # what both conversations begin with is the prompt (TRL's rule)
    parts: Any = extract_prompt({"chosen": chosen, "rejected": rejected})
    if not parts["prompt"]:
        raise RowError("no shared prompt", "chosen", "the first messages differ")
    if prompt is not None and " ".join(prompt.split()) not in " ".join(
        plain(parts["prompt"]).split()
    ):
        raise RowError("prompt is another", "prompt")
    shared = clean_text(parts["prompt"], "prompt", empty="empty prompt")
    return shared, parts["chosen"], parts["rejected"]


def _margin(row: Mapping[str, Any], how: Conversion) -> dict[str, float]:
    margins, notes = how.margins, how.notes
    strength = next((name for name in STRENGTHS if name in row), None)
    if margins == "ratings" and strength is not None:
        return {"margin": abs(finite(row[strength], strength, "rating not finite"))}
    columns = next((pair for pair in SCORE_COLUMNS if pair[0] in row and pair[1] in row), None)
    if margins == "ratings":
        if columns is None:
            raise RowError("missing field", "score_chosen", "margins come from ratings")
        high, low = (finite(row[name], name, "rating not finite") for name in columns)
        if high < low:
            notes["the rejected one is rated higher: the margin is negative"] += 1
        return {"margin": high - low}
    for names in SCORE_COLUMNS:
        if _rises(*(row.get(name) for name in names)):
            notes["the rejected one is rated higher than the chosen one"] += 1
    if margins == "given" and row.get("margin") is not None:
        margin = finite(row["margin"], "margin", "margin not finite")
        if margin < 0:
            notes["the margin is negative, as if the rejected one were the better"] += 1
        return {"margin": margin}
    if margins == "given" and columns is not None:
        notes["ratings kept as columns; margins='ratings' makes margins of them"] += 1
    return {}


def _rises(first: Any, second: Any) -> bool:
    """Whether both are numbers, and the second is the greater."""
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (first, second))
    return numbers and second > first


def ranking_pairs(ranking: Mapping[str, Any], margins: str, left_out: Counter[str]) -> list[Row]:
    """All pairs of a ranking whose ranks differ, K(K−1)/2 at most (InstructGPT, section 3.5).

    With ``margins="ratings"`` the margin is the difference of ratings. Rows of one prompt stay
    together under :func:`companion.data.splits.split_by_prompt`.
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


def _ranking_pairs(row: Mapping[str, Any], how: Conversion) -> list[Row]:
    (ranking,) = _ranking(row, how)
    return ranking_pairs(ranking, how.margins, how.left_out)


def _judged_pair(row: Mapping[str, Any], how: Conversion) -> list[Row]:
    """A row with two sides and a verdict ``a``, ``b`` or ``tie``; a tie, or none, gives no pair.

    The verdict's column stays, so that position bias can still be looked at.
    """
    sides, name = side_columns(row), verdict_column(row)
    side = verdict_side(require(row, name), name)
    for other in verdict_columns(row):
        if verdict_side(row[other], other) != side:
            raise RowError("verdicts disagree", other, f"{row[other]!r}; {name!r} is {row[name]!r}")
    best, worst = ("a", "b") if side == "a" else ("b", "a")
    for stem in ("score", "rating"):
        if side in ("a", "b") and _rises(row.get(f"{stem}_{best}"), row.get(f"{stem}_{worst}")):
            how.notes["the rejected one is rated higher than the chosen one"] += 1
    texts = {column: require(row, column) for column in sides}
    if side in ("tie", "none"):
        how.left_out["ties" if side == "tie" else "pairs without a verdict"] += 1
        return []
    best, worst = sides if side == "a" else sides[::-1]
    try:
        pair = {"chosen": texts[best], "rejected": texts[worst]}
        return preference_pair(without(row, *sides) | pair, how)
    except RowError as error:  # it names the field as the row does
        error.field = {"chosen": best, "rejected": worst}.get(error.field or "", error.field)
        raise


# ---------------------------------------------------------------------- the other kinds


def _ranking(row: Mapping[str, Any], how: Conversion) -> list[Row]:
    """K completions with ranks or ratings, in lists or as items (UltraFeedback's form)."""
    prompt = prompt_of(row)
    items = _list(require(row, "completions"), "completions")
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
    prompt, cleaned = take_out(prompt, cleaned, how.notes)
    fitted = [_one_form(prompt, text, Counter()) for text in cleaned]
    out: Row = {"prompt": fitted[0][0], "completions": [text for _, text in fitted]}
    if fitted[0] != (prompt, cleaned[0]):
        how.notes["text beside messages made a message"] += 1
    if ratings is not None:
        ratings = _list(ratings, "ratings", len(texts))
        values = [finite(v, f"ratings[{i}]", "rating not finite") for i, v in enumerate(ratings)]
        out["ratings"] = values
        # Equal ratings share a rank; 1 is best.
        out["ranks"] = [1.0 + sum(other > value for other in values) for value in values]
    if ranks is not None:
        out["ranks"] = _ranks(ranks, len(texts))
        given = [
            (rank, rating)
            for rank, rating in zip(out["ranks"], out.get("ratings", ()), strict=False)
            if rank is not None
        ]
        if any(_rises(a[1], b[1]) for a in given for b in given if a[0] < b[0]):
            how.notes["ranks and ratings disagree: the ranks are taken"] += 1
    return [out | without(row, *taken)]


def _first_filled(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _list(value: Any, name: str, n_completions: int | None = None) -> list[Any]:
    """The value if it is a list, and one of as many items as there are completions."""
    if not isinstance(value, list):
        raise RowError("wrong type", name, f"{type(value).__name__}, no list")
    if n_completions is not None and len(value) != n_completions:
        detail = f"{n_completions} completions and {len(value)} {name}"
        raise RowError("lengths differ", name, detail)
    return value


def _ranks(values: Any, size: int) -> list[float | None]:
    """Ranks, null where a completion has none; at least two must have one."""
    ranks = [
        None if value is None else finite(value, f"ranks[{i}]", "rating not finite")
        for i, value in enumerate(_list(values, "ranks", size))
    ]
    if size - ranks.count(None) < 2:
        raise RowError("null", "ranks", "fewer than two completions have a rank")
    return ranks


def _outcome(row: Mapping[str, Any], how: Conversion) -> list[Row]:
    prompt = prompt_of(row)
    completion = completion_of(row)
    label = require(row, "label")
    if isinstance(label, (int, float)) and label in (0, 1) and not isinstance(label, bool):
        how.notes["labels 1 and 0 read as right and wrong"] += 1
        label = bool(label)
    if not isinstance(label, bool):
        raise RowError("label not bool", "label", f"{label!r} is {type(label).__name__}")
    prompt, completion = _one_form(prompt, completion, how.notes)
    prompt, (completion,) = take_out(prompt, [completion], how.notes)
    rest = without(row, "prompt", "completion", "label")
    return [{"prompt": prompt, "completion": completion, "label": label, **rest}]


def _scored_row(row: Mapping[str, Any], how: Conversion) -> list[Row]:
    """One completion and its score, under whichever of its names."""
    name = _first_filled(row, SCORES) or SCORES[0]
    score = finite(require(row, name), name, "rating not finite")
    (outcome,) = _outcome({**without(row, *SCORES), "label": True}, how)
    return [{**without(outcome, "label"), "score": score}]


def _step_row(row: Mapping[str, Any], how: Conversion) -> list[Row]:
    prompt = prompt_of(row)
    steps, labels = require(row, "completions"), require(row, "labels")
    _list(labels, "labels", len(_list(steps, "completions")))
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
    clean = [_step_label(label, i, soft=given == {float}) for i, label in enumerate(labels)]
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


def _step_label(label: Any, index: int, *, soft: bool) -> float | None:
    """+1, 0 or −1, also from true and false; soft: a probability that the step is good."""
    if label is None:
        return None
    if isinstance(label, bool):
        return 1 if label else -1
    if soft and 0 <= label <= 1:
        return float(label)
    if not soft and isinstance(label, int) and label in (-1, 0, 1):
        return label
    raise RowError("unknown label", f"labels[{index}]", f"{label!r}")


def _prompt_row(row: Mapping[str, Any], how: Conversion) -> list[Row]:
    return [{"prompt": prompt_of(row), **without(row, "prompt")}]


_CONVERTERS: Final[dict[tuple[str, str], Callable[[Mapping[str, Any], Conversion], list[Row]]]] = {
    ("pairs", "preferences"): preference_pair,
    ("pairs", "judgements"): _judged_pair,
    ("pairs", "rankings"): _ranking_pairs,
    ("rankings", "rankings"): _ranking,
    ("rankings", "preferences"): _sides_ranked,
    ("scores", "scores"): _scored_row,
    ("pairs", "scores"): _scored_row,
    ("rankings", "scores"): _scored_row,
    ("outcomes", "outcomes"): _outcome,
    ("steps", "steps"): _step_row,
    ("prompts", "prompts"): _prompt_row,
}
