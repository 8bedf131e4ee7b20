"""Find four bugs in how a judge's replies are counted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, expect, kind, number

KEYS = ("first", "second", "tie", "unparsed", "first_place")
Replies = list[tuple[str, str]]
A, B, C = "It adds up. [[A]]", "Clearer steps. [[B]]", "Both are right. [[C]]"

GUESS = (
    "A verdict is guessed from any letter A or B: 'A fair try, but [[B]]' counts for A, and so "
    "does every reply that begins with 'A'. Only what stands in double brackets is a verdict."
)
LETTERS = (
    "A and B are places, not completions. In the second order the completions have changed places, "
    "so [[A]] there speaks for the *second* one. Read as completions, a judge that always says A "
    "looks as if it agreed with itself."
)
FIRST_ORDER = (
    "Where the two orders disagree, the first one decides. Then the swap was for nothing: what the "
    "judge prefers for its place is counted as a win. A disagreement is a tie."
)
UNPARSED = (
    "A pair without two verdicts counts as a tie. A judge that fails to answer then looks like one "
    "that finds both equally good, and every win rate moves towards one half. Count it by itself."
)


def _item(one: str, other: str, times: int = 1) -> Replies:
    return [(one, other)] * times


def _count(attempt: Attempt, replies: Replies) -> dict[str, float]:
    got = attempt(replies)
    kind(got, Mapping, "a dict of counts")
    missing = [key for key in KEYS if key not in got]
    expect(not missing, f"these keys are missing: {', '.join(missing)}")
    return {key: number(got[key], f"`{key}`") for key in KEYS}


def _expect(attempt: Attempt, replies: Replies, **want: float) -> None:
    got = _count(attempt, replies)
    shown = "; ".join(f"({one!r}, {other!r})" for one, other in replies[:2])
    for key, value in want.items():
        same = math.isnan(got[key]) if math.isnan(value) else abs(got[key] - value) < 1e-6
        expect(same, f"{shown}{' …' if replies[2:] else ''}: `{key}` is {got[key]:g}; "
                     f"it should be {value:g}")  # fmt: skip


def _sum(attempt: Attempt) -> None:
    replies = [*_item(A, B, 3), *_item(B, A, 2), *_item(C, C), *_item(A, "no idea")]
    got = _count(attempt, replies)
    total = sum(got[key] for key in KEYS[:4])
    expect(total == len(replies), f"{len(replies)} pairs, but the four counts add up to {total:g}")


def _wins(attempt: Attempt) -> None:
    _expect(attempt, _item(A, B), first=1, second=0, tie=0, unparsed=0)
    _expect(attempt, _item(B, A), first=0, second=1, tie=0, unparsed=0)
    _expect(attempt, [*_item(A, B, 5), *_item(B, A, 2)], first=5, second=2)


def _ties(attempt: Attempt) -> None:
    for pair in ((A, A), (B, B), (C, C), (A, C), (C, A), (B, C)):
        _expect(attempt, _item(*pair), first=0, second=0, tie=1, unparsed=0)


def _unparsed(attempt: Attempt) -> None:
    for bad in ("", "Both have merits.", "Answer: none", "[[D]]"):
        for pair in ((bad, B), (A, bad), (bad, bad)):
            _expect(attempt, _item(*pair), first=0, second=0, tie=0, unparsed=1)


def _guess(attempt: Attempt) -> None:
    _expect(attempt, _item("A fair try, but [[B]]", "Both add. [[A]]"), first=0, second=1)
    _expect(attempt, _item("A is better.", "B is better."), first=0, tie=0, unparsed=1)
    _expect(attempt, _item("I say A", "I say B"), first=0, unparsed=1)


def _contradictions(attempt: Attempt) -> None:
    both = "[[A]] at first sight, on reflection [[B]]"
    _expect(attempt, _item(both, B), first=0, second=0, tie=0, unparsed=1)
    _expect(attempt, _item("[[A]] ... so: [[A]]", B), first=1, unparsed=0)


def _place(attempt: Attempt) -> None:
    _expect(attempt, [*_item(A, B, 4), *_item(B, A, 1)], first_place=0.5)
    _expect(attempt, _item(A, A, 3), first_place=1.0)
    _expect(attempt, _item(B, B, 3), first_place=0.0)
    _expect(attempt, [*_item(A, B, 2), *_item(A, A, 2)], first_place=0.75)
    _expect(attempt, [*_item(A, B, 2), *_item(A, C, 5), *_item(A, "", 5)], first_place=0.5)


def _place_of_nothing(attempt: Attempt) -> None:
    _expect(attempt, [*_item(C, C), *_item("", A)], first_place=float("nan"))


def _letter(reply: str, parse: str) -> str | None:
    """The letter of the verdict: never guessed, or as the mutants do it."""
    if parse == "guess":
        found = re.findall(r"[ABC]", reply)
        return found[0] if found else None
    marked = re.findall(r"\[\[([ABC])\]\]", reply)
    if parse in ("first", "last"):
        return marked[0 if parse == "first" else -1] if marked else None
    return marked[0] if len(set(marked)) == 1 else None


def _verdicts(
    replies: Replies,
    *,
    parse: str = "one",
    swap: bool = True,
    disagreement: str = "tie",
    failed: str = "unparsed",
    place: str = "both",
) -> dict[str, float]:
    """The right counts, with switches for what can go wrong."""
    counts = dict.fromkeys(KEYS[:4], 0.0)
    named: list[str] = []
    for pair in replies:
        one, other = (_letter(reply, parse) for reply in pair)
        if one is None or other is None:
            if failed == "half":  # the reply that there is decides
                left = {"A": "first", "B": "second"}.get(one or "")
                left = left or {"A": "second", "B": "first"}.get(other or "", "unparsed")
                counts[left] += 1
            elif failed != "drop":
                counts[failed] += 1
            continue
        if place == "all" or (one != "C" and other != "C"):
            named += [one] if place == "first" else [one, other]
        in_first = {"A": "first", "B": "second", "C": "tie"}
        in_second = {"A": "second", "B": "first", "C": "tie"} if swap else in_first
        a, b = in_first[one], in_second[other]
        counts[a if a == b or disagreement == "first" else disagreement] += 1
    voted = [letter for letter in named if letter != "C"]
    share = voted.count("A") / len(voted) if voted else float("nan")
    return {**counts, "first_place": share}


def broken(replies: Replies) -> dict[str, float]:
    counts = {"first": 0, "second": 0, "tie": 0, "unparsed": 0}
    named = []
    for pair in replies:
        letters = []
        for reply in pair:
            found = re.search(r"[ABC]", reply)
            letters.append(found.group() if found else None)
        if None in letters:
            counts["tie"] += 1
            continue
        if "C" not in letters:
            named += letters
        meaning = {"A": "first", "B": "second", "C": "tie"}
        in_one, in_other = (meaning[letter] for letter in letters)  # type: ignore[index]
        if in_one == in_other:
            counts[in_one] += 1
        else:
            counts[in_one] += 1
    share = named.count("A") / len(named) if named else float("nan")
    return {**counts, "first_place": share}


def guesses(replies: Replies) -> dict[str, float]:
    return _verdicts(replies, parse="guess")


def letters_as_completions(replies: Replies) -> dict[str, float]:
    return _verdicts(replies, swap=False)


def first_order_decides(replies: Replies) -> dict[str, float]:
    return _verdicts(replies, disagreement="first")


def unparsed_as_tie(replies: Replies) -> dict[str, float]:
    return _verdicts(replies, failed="tie")


def last_word(replies: Replies) -> dict[str, float]:
    return _verdicts(replies, parse="last")


def first_word(replies: Replies) -> dict[str, float]:
    return _verdicts(replies, parse="first")


def survivor_decides(replies: Replies) -> dict[str, float]:
    return _verdicts(replies, failed="half")


def dropped(replies: Replies) -> dict[str, float]:
    return _verdicts(replies, failed="drop")


def disagreement_unparsed(replies: Replies) -> dict[str, float]:
    return _verdicts(replies, disagreement="unparsed")


def one_order(replies: Replies) -> dict[str, float]:
    return _verdicts(replies, place="first")


def zero_for_nothing(replies: Replies) -> dict[str, float]:
    counts = _verdicts(replies)
    return {key: 0.0 if math.isnan(value) else value for key, value in counts.items()}


def _probes() -> list[tuple[Any, ...]]:
    both = "[[A]] at first sight, on reflection [[B]]"
    return [
        ([*_item(A, B, 5), *_item(B, A, 2), *_item(A, A, 3), *_item(C, A)],),
        ([*_item("A fair try, but [[B]]", "Both add. [[A]]", 2), *_item("A is it", "B is it")],),
        ([*_item("", B, 2), *_item(A, "none"), *_item("", ""), *_item(A, B)],),
        ([*_item(both, B, 2), *_item(both, A), *_item(A, both), *_item(B, A)],),
        (_item(C, C),),
    ]


EXERCISE = Exercise(
    id="ch03.count_verdicts",
    parameters=("replies",),
    broken=broken,
    properties=(
        Property(
            "four counts that add up to the pairs, and a share",
            "Each pair counts once: as a win of the first or the second completion, as a tie, or "
            "as unparsed.",
            _sum,
        ),
        Property(
            "the second order's letters are turned back",
            "A and B are places: in the second order [[A]] speaks for the *second* completion.",
            _wins,
        ),
        Property(
            "a disagreement is a tie",
            "The two orders must name the same completion; anything else that was parsed is a tie.",
            _ties,
        ),
        Property(
            "a pair without two verdicts is unparsed",
            "A pair of which a reply has no verdict should count as unparsed, and as nothing else.",
            _unparsed,
        ),
        Property(
            "a verdict is never guessed",
            "Only what stands in double brackets is a verdict.",
            _guess,
        ),
        Property(
            "a reply with two different verdicts has none",
            "A reply that holds both [[A]] and [[B]] contradicts itself, and should count as not "
            "parsed.",
            _contradictions,
        ),
        Property(
            "the share of the first place",
            "Of the pairs in which both replies name a completion, count how many of *all* their "
            "replies are an A.",
            _place,
        ),
        Property(
            "no share where nobody named a completion",
            "Without any A or B there is no share: NaN, not a number that looks like a finding.",
            _place_of_nothing,
        ),
    ),
    mutants=(
        Mutant("All four bugs are still there. The first: " + LETTERS, broken),
        Mutant(GUESS, guesses),
        Mutant(LETTERS, letters_as_completions),
        Mutant(FIRST_ORDER, first_order_decides),
        Mutant(UNPARSED, unparsed_as_tie, "NeMo Gym #2103"),
        Mutant(
            "Of two different verdicts in one reply the last one counts. It may be the judge's "
            "conclusion, or a quotation of its instructions: that is a guess.",
            last_word,
        ),
        Mutant(
            "Of two different verdicts in one reply the first one counts. A judge that thinks "
            "aloud corrects itself: that is a guess.",
            first_word,
        ),
        Mutant(
            "Where one reply cannot be read, the other one decides alone. Half of a swap is no "
            "swap: that verdict has its place's bias in full.",
            survivor_decides,
        ),
        Mutant(
            "Pairs that cannot be read are left out of all counts, so nobody sees how many there "
            "were. Count them.",
            dropped,
        ),
        Mutant(
            "A disagreement is counted as unparsed. Both replies could be read; what they say "
            "together is that the judge sees no difference beyond the place: a tie.",
            disagreement_unparsed,
        ),
        Mutant(
            "The share of the first place is taken over the first order alone. There it measures "
            "which completion is better, not what the place is worth; over both orders the "
            "completions cancel.",
            one_order,
        ),
        Mutant(
            "Where nobody named a completion the share is 0, which reads as 'always the second "
            "place'. Nothing was measured: NaN.",
            zero_for_nothing,
        ),
    ),
    probes=_probes,
    hints=(
        "Try it with a judge that always says [[A]], with one that always says nothing, and with "
        "the reply 'A fair try, but [[B]]'.",
        "Read with a pattern for the brackets; demand exactly one *kind* of verdict in a reply. "
        "For the second order another dict translates the letters.",
        '`set(re.findall(r"\\[\\[([ABC])\\]\\]", reply))` must have one element; in the second '
        'order "A" means "second" and "B" "first"; a disagreement is a tie; a '
        "missing verdict unparsed.",
    ),
    right="With both orders asked, a judge without any bias has a share of one half, however "
    "different the completions are. So the share measures the judge alone.",
)
