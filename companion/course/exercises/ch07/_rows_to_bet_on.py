"""Write which labelled rows an alarm may use."""

from __future__ import annotations

from typing import Any

from companion.course.exercise import Exercise, Mutant, Property, Unusable
from companion.course.exercises._tools import Attempt, a_kind, expect, show

Row = dict[str, Any]


def _row(name: str, prompt: str, look: int, sampling: str | None = "random", **other: Any) -> Row:
    row: Row = {"id": name, "prompt_id": prompt, "look": look, "label": "a", **other}
    return row if sampling is None else row | {"sampling": sampling}


def _chosen(
    rows: list[Row],
    *,
    rule: bool = True,
    silent: bool = False,
    twice: bool = False,
    again: bool = False,
    once_a_look: bool = False,
    ties: bool = True,
    set_aside_counts: bool = False,
) -> list[int]:
    first: dict[str, int] = {}
    seen: set[str] = set()
    out = []
    for i, row in enumerate(rows):
        rule_of_row = row.get("sampling", "random" if silent else None)
        if rule and rule_of_row != "random":
            if set_aside_counts:
                first.setdefault(row["prompt_id"], row["look"])
            continue
        if row["id"] in seen and not twice:
            continue
        seen.add(row["id"])
        fresh = row["prompt_id"] not in first
        look = first.setdefault(row["prompt_id"], row["look"])
        if once_a_look and not fresh:
            continue
        if look != row["look"] and not again:
            continue
        if row["label"] == "tie" and not ties:
            continue
        out.append(i)
    return out


def _same(attempt: Attempt, rows: list[Row], setting: str) -> None:
    got = attempt([dict(row) for row in rows])
    if isinstance(got, (str, dict)) or not hasattr(got, "__iter__"):
        raise Unusable(f"the result: expected a list of places, got {a_kind(got)}")
    try:
        places = [int(one) for one in got]
    except (TypeError, ValueError):
        raise Unusable(f"the result: expected places, got {show(got)}") from None
    want = _chosen(rows)
    expect(places == want, f"{setting}: {show(places)}; it should be {show(want)}")


def _rule(attempt: Attempt) -> None:
    rows = [_row("1", "p", 1), _row("2", "q", 1, "uncertain"), _row("3", "r", 2, "complaint")]
    _same(attempt, rows, "rows by the rules random, uncertain and complaint")


def _silent(attempt: Attempt) -> None:
    _same(attempt, [_row("1", "p", 1, None), _row("2", "q", 1)], "the first row names no rule")


def _twice(attempt: Attempt) -> None:
    rows = [_row("1", "p", 1), _row("2", "q", 1), _row("1", "p", 1)]
    _same(attempt, rows, "the row with id 1 comes twice in a look")


def _again(attempt: Attempt) -> None:
    rows = [_row("1", "p", 1), _row("2", "q", 2), _row("3", "p", 2), _row("4", "p", 3)]
    _same(attempt, rows, "prompt p is labelled in looks 1, 2 and 3")


def _together(attempt: Attempt) -> None:
    rows = [_row("1", "p", 1), _row("2", "p", 1), _row("3", "p", 1)]
    _same(attempt, rows, "three pairs of one prompt in one look")


def _tie(attempt: Attempt) -> None:
    _same(attempt, [_row("1", "p", 1), _row("2", "q", 1, label="tie")], "the second row is a tie")


def _aside(attempt: Attempt) -> None:
    rows = [_row("1", "p", 1, "uncertain"), _row("2", "p", 2)]
    _same(attempt, rows, "prompt p was labelled by the rule uncertain, and a look later at random")


def every_row(rows: list[Row]) -> Any:
    return _chosen(rows, rule=False)


def silence_is_random(rows: list[Row]) -> Any:
    return _chosen(rows, silent=True)


def each_time(rows: list[Row]) -> Any:
    return _chosen(rows, twice=True)


def each_look(rows: list[Row]) -> Any:
    return _chosen(rows, again=True)


def one_a_prompt(rows: list[Row]) -> Any:
    return _chosen(rows, once_a_look=True)


def decided_only(rows: list[Row]) -> Any:
    return _chosen(rows, ties=False)


def aside_counts(rows: list[Row]) -> Any:
    return _chosen(rows, set_aside_counts=True)


def _probes() -> list[tuple[Any, ...]]:
    rows = [
        _row("1", "p", 1),
        _row("2", "p", 1),
        _row("1", "p", 1),
        _row("3", "q", 1, "uncertain"),
        _row("4", "r", 1, None),
        _row("5", "s", 2, label="tie"),
        _row("6", "p", 2),
        _row("7", "q", 2),
    ]
    return [(rows,)]


EXERCISE = Exercise(
    id="ch07.rows_to_bet_on",
    parameters=("rows",),
    properties=(
        Property("only random rows", "Rows chosen by another rule are set aside.", _rule),
        Property(
            "a row that names no rule is set aside",
            "Nobody knows how a row without `sampling` was chosen.",
            _silent,
        ),
        Property("a row counts once", "Of rows with one id the first is taken.", _twice),
        Property(
            "a prompt is bet on in one look",
            "Pairs of a prompt that an earlier look has bet on are left out.",
            _again,
        ),
        Property(
            "pairs of a prompt may come together",
            "Several pairs of a prompt in one look are all taken.",
            _together,
        ),
        Property("a tie is evidence", "Ties are taken as well.", _tie),
        Property(
            "what was set aside does not count",
            "A prompt is bet on if it was bet on, not if a row of it was seen.",
            _aside,
        ),
    ),
    mutants=(
        Mutant(
            "All rows are bet on. Doubtful pairs are harder than those of the reference, so the "
            "model seems to fall.",
            every_row,
        ),
        Mutant(
            "Silence is taken for random. A row that does not say how it was chosen may be from "
            "a list of complaints.",
            silence_is_random,
        ),
        Mutant(
            "A row that was delivered twice is bet on twice: one piece of evidence counts as two.",
            each_time,
        ),
        Mutant(
            "A prompt is bet on in every look that has a pair of it. What the first look saw "
            "tells about the others: the bets are no longer fair.",
            each_look,
        ),
        Mutant(
            "One pair a prompt is taken. Their mean is one fair bet, with less noise than one of "
            "them.",
            one_a_prompt,
        ),
        Mutant(
            "Ties are left out. A model that was right on a pair which people now call a tie has "
            "lost half of it.",
            decided_only,
        ),
        Mutant(
            "A row that was set aside blocks its prompt. Nothing was bet on it, so nothing was "
            "given away.",
            aside_counts,
        ),
    ),
    probes=_probes,
    hints=(
        "Go through the rows in order. What do you have to remember of those that you have taken?",
        "Remember the ids that you took, and for each prompt the look in which you took its first.",
        "`if row.get('sampling') != 'random': continue`, then the id, then "
        "`first.setdefault(row['prompt_id'], row['look']) == row['look']`.",
    ),
    right="The rows that are left out are not lost: they are labelled, and train the next model.",
)
