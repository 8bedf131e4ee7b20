"""Which completions of the policy to have labelled next, as pairs of one prompt. Chapter 7.

*At random*: two draws of the policy for one prompt, prompts in random order. On such pairs the
share that the model orders rightly estimates its accuracy on what the policy writes now; so they,
and no others, may feed an alarm. *By uncertainty*: the pairs that the model is least sure about.
They teach a new model more for each label, and make any model look bad: it is right on about half.
"""

from __future__ import annotations

import json
import math
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from companion.data.messages import Text, completion_of, plain, prompt_of
from companion.data.problems import RowError, RowProblem
from companion.data.readers import read_file
from companion.data.splits import normalise, prompt_key
from companion.errors import DataError, ModelError
from companion.layouts import rename_columns, with_prompt
from companion.monitoring.labelling import pair_id

if TYPE_CHECKING:
    import os

    from companion.scoring import Scorer

Row = dict[str, Any]
#: prompt number and the places of two of its completions, in the file's order
_Place = tuple[int, int, int]

RULES: Final = ("random", "uncertainty")
#: what a template needs to read the prompt: the same for all completions of a prompt
_OF_PROMPT: Final = ("tools", "chat_template_kwargs")
#: fields of a completion that say nothing of a pair
_OF_COMPLETION: Final = (
    *("completion", "completions", "terminated", "id", "index", "place", "n_tokens"),
    *("score", "scores", "centered", "z", "percentile", "model_version"),
)


@dataclass
class PromptCompletions:
    """What the policy wrote to one prompt.

    Attributes
    ----------
    prompt_id : str
        The rows', or a hash of the prompt.
    prompt : str or list of messages
    completions : list
    fields : list of dict
        Of each completion, what else its row said.
    """

    prompt_id: str
    prompt: Text
    completions: list[Text] = field(default_factory=list)
    fields: list[Row] = field(default_factory=list)


@dataclass
class Sample:
    """Pairs to label, and what became of the others.

    Attributes
    ----------
    rows : list of dict
        ``id``, ``prompt_id``, ``prompt``, ``a``, ``b``, ``sampling``, ``sampling_share``; with a
        model also ``scores`` and ``model_version``; and the other fields of the completions' rows:
        those that differ within a prompt (``reward``) as ``reward_a`` and ``reward_b``.
    counts : dict
        Numbers of prompts, completions and pairs, for a machine.
    notes : list of str
    """

    rows: list[Row]
    counts: dict[str, Any]
    notes: list[str]


def read_completions(
    path: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    on_error: str = "raise",
) -> tuple[list[PromptCompletions], Counter[str]]:
    """Completions of a file, by prompt.

    Parameters
    ----------
    path : str or path
        Rows with ``prompt`` and ``completion``, several of one prompt; or ``prompt`` and
        ``completions``, a list. ``terminated`` (a bool, or a list of them) says whether a
        completion ended: one that was cut off is left out and counted.
    columns : mapping of str to str, optional
        Old to new names of fields; an empty new name leaves the field out.
    on_error : {"raise", "skip"}
        ``skip`` leaves bad rows out and counts them.

    Returns
    -------
    prompts : list of PromptCompletions
        Rows whose prompts are the same to the letter stand together.
    left_out : Counter
        What was left out, and why.

    Raises
    ------
    DataError
        For a file without completions, or a bad row: line, field and cure.
    """
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error={on_error!r}", "take raise or skip")
    prompts: dict[tuple[str, str], PromptCompletions] = {}
    left_out: Counter[str] = Counter()
    bad: dict[str, list[str]] = {}
    rows = 0
    for where, record in read_file(Path(path), columns):
        rows += 1
        try:
            if isinstance(record, RowError):
                raise record
            row, completions, ended = _row(rename_columns(record, columns or {}, where))
        except RowError as error:
            problem = RowProblem.of(error, where)
            if on_error == "raise":
                raise problem.as_error() from error
            bad.setdefault(problem.reason, []).append(str(problem))
            continue
        identity = row.get("prompt_id")
        prompt_id = prompt_key(row) if identity is None else str(identity)
        exact = json.dumps([row["prompt"], *(row.get(name) for name in _OF_PROMPT)], sort_keys=True)
        own = prompts.setdefault((prompt_id, exact), PromptCompletions(prompt_id, row["prompt"]))
        rest = {k: v for k, v in row.items() if k not in (*_OF_COMPLETION, "prompt", "prompt_id")}
        each = {k: rest.pop(k) for k in list(rest) if _one_each(rest[k], row, completions)}
        for at, (completion, whole) in enumerate(zip(completions, ended, strict=True)):
            if whole:
                own.completions.append(completion)
                own.fields.append(
                    rest | {key.removesuffix("s"): values[at] for key, values in each.items()}
                )
            else:
                left_out["completions that were cut off"] += 1
    for reason, problems in bad.items():
        left_out[f"rows: {reason} (the first: {problems[0]})"] = len(problems)
    if not any(own.completions for own in prompts.values()):
        why = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
        raise DataError(
            f"{path}: no completions ({why or f'{rows} rows'})", "give what your policy wrote"
        )
    return list(prompts.values()), left_out


def _row(record: Row) -> tuple[Row, list[Text], list[bool]]:
    row = dict(with_prompt(record))
    row["prompt"] = prompt_of(row)
    value = row.get("prompt_id")
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
        raise RowError("wrong type", "prompt_id", f"{type(value).__name__}")
    if "completions" not in row:
        completions, ended = [completion_of(row)], [row.get("terminated")]
    else:
        if not isinstance(row["completions"], list):
            raise RowError("wrong type", "completions", "no list")
        listed = {f"completions[{i}]": item for i, item in enumerate(row["completions"])}
        completions = [completion_of(listed, name) for name in listed]
        ended = row.get("terminated") or [None] * len(completions)
        if not isinstance(ended, list) or len(ended) != len(completions):
            raise RowError("lengths differ", "terminated", f"{len(completions)} completions")
    if not all(one is None or isinstance(one, bool) for one in ended):
        raise RowError("wrong type", "terminated", "neither true nor false")
    return row, completions, [one is not False for one in ended]


def _one_each(value: Any, row: Row, completions: Sequence[Text]) -> bool:
    """Whether a field of a row of ``completions`` lists one number of each."""
    return (
        "completions" in row
        and isinstance(value, list)
        and len(value) == len(completions)
        and all(isinstance(item, (bool, int, float)) for item in value)
    )


def near(completion: Text) -> str:
    """What two completions share that a reader would call the same.

    Case, white space, Unicode forms and punctuation at the end do not count; anything else does,
    since one digit, sign or word can be the whole difference between right and wrong.
    """
    text = normalise(plain(completion))
    last = len(text)
    while last and unicodedata.category(text[last - 1])[0] == "P":
        last -= 1
    return text[:last].rstrip() or text


def sample_pairs(
    prompts: Sequence[PromptCompletions],
    n: int,
    *,
    rule: str = "random",
    random_share: float = 0.5,
    scorer: Scorer[Any] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Sample:
    """Choose the pairs to label next.

    At random: the completions of a prompt are shuffled and paired off, so that each is in one pair
    at most. One pair of each prompt is taken, in random order, then a second of each, until there
    are `n`. A pair of the same or nearly the same text twice holds no choice: it is left out, not
    replaced by another of its prompt, so what is left are two draws of the policy that differ.

    By uncertainty: `random_share` of `n` at random as above, whatever their scores; of all other
    pairs those with the least :math:`|Δ| / T`, first one of each prompt, then a second.

    Parameters
    ----------
    prompts : sequence of PromptCompletions
    n : int
    rule : {"random", "uncertainty"}
    random_share : float
        In [0, 1]; for ``uncertainty``.
    scorer : Scorer, optional
        A pairwise or k-wise model. Needed for ``uncertainty``; else its scores are written beside
        the pairs, so that a monitor need not score them.
    seed : int
    progress : callable, optional
        Called with the number of texts scored.

    Returns
    -------
    Sample
        In random order. ``sampling_share`` is the chance of the pair to be taken: of two given
        draws of a prompt, given how many pairs of each round there were; 1 by uncertainty, which
        leaves nothing to chance.

    Raises
    ------
    DataError
        If no prompt has two completions that differ, or for a setting.
    ModelError
        For a model whose scores are of no use for pairs.
    """
    if n < 1:
        raise DataError(f"n is {n}", "ask for at least one pair")
    if rule not in RULES:
        raise DataError(f"no rule {rule!r}", f"take one of: {', '.join(RULES)}")
    if not 0 <= random_share <= 1:
        raise DataError(f"random_share is {random_share}", "give a share in [0, 1]")
    if rule == "uncertainty" and scorer is None:
        raise DataError("the rule 'uncertainty' asks a model", "name one with --model")
    if scorer is not None and scorer.readout.kind != "scalar":
        raise ModelError(
            f"the model is of the kind {scorer.readout.kind!r}, whose scores are no margins",
            "name a pairwise or k-wise model, or sample at random without one",
        )
    left_out: Counter[str] = Counter()
    classes = [[near(text) for text in own.completions] for own in prompts]
    rng = random.Random(f"companion sample/{seed}")
    wanted = n if rule == "random" else round(n * random_share)
    chosen = _at_random(classes, wanted, rng, left_out)
    notes: list[str] = []
    if len(chosen) < wanted:
        notes.append(
            f"only {len(chosen):,} pairs at random, not {wanted:,}: each completion is used once. "
            "Draw more prompts, or more completions of each"
        )
    scores: dict[tuple[int, int], float] = {}
    taken: list[tuple[_Place, str, float]] = [(place, "random", p) for place, p in chosen.items()]
    if rule == "uncertainty":
        others = [place for place in _different(classes) if place not in chosen]
        scores = _score(scorer, prompts, [*chosen, *others], left_out, progress)
        known = [p for p in others if (p[0], p[1]) in scores and (p[0], p[2]) in scores]
        unsure = _least(known, scores)[: n - wanted]
        taken += [(place, "uncertainty", 1.0) for place in unsure]
        if len(unsure) < n - wanted:
            notes.append(f"only {len(unsure):,} pairs by uncertainty: there are no more")
        if not wanted:
            notes.append("no pair was chosen at random, so none of these labels may feed an alarm")
    elif scorer is not None:
        scores = _score(scorer, prompts, list(chosen), left_out, progress)
    if not taken:
        raise DataError(
            f"no pairs: {len(prompts):,} prompts, and none has two completions that differ",
            "draw two completions or more of each prompt",
        )
    rng.shuffle(taken)
    version = None
    if scores:
        version = _version(scorer)
        if version is None:
            notes.append(
                "the server does not say which version of the model it runs, so its scores are not "
                "written: with --protocol companion they are"
            )
    varying = {
        key
        for own in prompts
        for fields in own.fields
        for key in fields
        if any(fields[key] != other.get(key) for other in own.fields)
    }
    rows = [
        _pair(prompts[place[0]], place, name, p, varying, scores, version)
        for place, name, p in taken
    ]
    counts = {
        "prompts": len(prompts),
        "completions": sum(map(len, classes)),
        "pairs": len(rows),
        **{name: sum(row["sampling"] == name for row in rows) for name in RULES},
        "prompts_sampled": len({row["prompt_id"] for row in rows}),
        "left_out": dict(left_out),
    }
    return Sample(rows, counts, notes)


def _at_random(
    classes: Sequence[Sequence[str]], n: int, rng: random.Random, left_out: Counter[str]
) -> dict[_Place, float]:
    """Pairs taken at random, each with its chance; counts those that hold no choice."""
    left_out["prompts with one completion"] += sum(len(own) == 1 for own in classes)
    left_out["prompts without a completion"] += sum(not own for own in classes)
    rounds: dict[int, list[_Place]] = {}
    for number, own in enumerate(classes):
        places = list(range(len(own)))
        rng.shuffle(places)
        seen: set[frozenset[str]] = set()
        for turn in range(len(own) // 2):
            i, j = sorted(places[2 * turn : 2 * turn + 2])
            both = frozenset((own[i], own[j]))
            if len(both) == 1 or both in seen:
                left_out[_SAME if len(both) == 1 else _AGAIN] += 1
                continue
            seen.add(both)
            rounds.setdefault(turn, []).append((number, i, j))
    rates: dict[int, float] = {}
    chosen: list[_Place] = []
    for turn in sorted(rounds):
        found, room = rounds[turn], n - len(chosen)
        rates[turn] = min(1.0, room / len(found))
        chosen += found if room >= len(found) else rng.sample(found, room)
    return {place: _chance(len(classes[place[0]]), rates) for place in chosen}


_SAME: Final = "random pairs of the same or nearly the same text"
_AGAIN: Final = "random pairs whose two texts another pair of their prompt has"


def _chance(size: int, rates: Mapping[int, float]) -> float:
    """That two given draws of `size` are put together, in whatever round, and taken."""
    return sum(rates.get(turn, 0.0) for turn in range(size // 2)) / (size * (size - 1) / 2)


def _different(classes: Sequence[Sequence[str]]) -> Iterator[_Place]:
    """All pairs of a prompt whose texts differ, each pair of texts once."""
    for number, own in enumerate(classes):
        seen: set[frozenset[str]] = set()
        for i, j in combinations(range(len(own)), 2):
            both = frozenset((own[i], own[j]))
            if len(both) == 2 and both not in seen:
                seen.add(both)
                yield number, i, j


def _least(places: Sequence[_Place], scores: Mapping[tuple[int, int], float]) -> list[_Place]:
    """Pairs by |Δ|, first the least of each prompt, then the second of each, ….

    T is the same for all, so it does not change the order.
    """
    gap = {p: abs(scores[p[0], p[1]] - scores[p[0], p[2]]) for p in places}
    ordered = sorted(places, key=lambda place: (gap[place], place))
    turns: Counter[int] = Counter()
    ranked = []
    for place in ordered:
        ranked.append((turns[place[0]], gap[place], place))
        turns[place[0]] += 1
    return [place for *_, place in sorted(ranked)]


def _score(
    scorer: Any,
    prompts: Sequence[PromptCompletions],
    places: Sequence[_Place],
    left_out: Counter[str],
    progress: Callable[[int], None] | None,
) -> dict[tuple[int, int], float]:
    """Raw scores of the completions that stand in a pair; those without one are counted."""
    texts = sorted({(place[0], at) for place in places for at in place[1:]})
    rows = [
        {
            "prompt": prompts[number].prompt,
            "completion": prompts[number].completions[at],
            **{k: v for k, v in prompts[number].fields[at].items() if k in _OF_PROMPT},
        }
        for number, at in texts
    ]
    names = [f"prompt {prompts[number].prompt_id}, completion {at}" for number, at in texts]
    found = scorer.score(rows, on_error="skip", names=names, progress=progress)
    for reason in found.reasons:
        if reason is not None:
            left_out[f"completions without a score: {reason}"] += 1
    return {
        text: float(value)
        for text, value in zip(texts, found.raw, strict=True)
        if math.isfinite(value)
    }


def _version(scorer: Any) -> str | None:
    """The version of the model, as its server says it or as its files are."""
    if not hasattr(scorer, "reward_model"):
        return getattr(scorer, "model_version", None)
    from companion.models import identity_of

    return identity_of(scorer.reward_model).version


def _pair(
    own: PromptCompletions,
    place: _Place,
    rule: str,
    share: float,
    varying: set[str],
    scores: Mapping[tuple[int, int], float],
    version: str | None,
) -> Row:
    number, i, j = place
    texts = {"prompt": own.prompt, "a": own.completions[i], "b": own.completions[j]}
    row: Row = {"id": pair_id(texts), "prompt_id": own.prompt_id, **texts}
    row |= {"sampling": rule, "sampling_share": share}
    for key in {**own.fields[i], **own.fields[j]}:
        first, second = own.fields[i].get(key), own.fields[j].get(key)
        if key in varying:
            row |= {f"{key}_a": first, f"{key}_b": second}
        elif key not in row:
            row[key] = first
    if version is not None and (number, i) in scores and (number, j) in scores:
        row["scores"] = {"a": scores[number, i], "b": scores[number, j]}
        row["model_version"] = version
    return row
