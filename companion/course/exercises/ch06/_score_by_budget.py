"""Score texts in batches within a budget of padded tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property, Unusable
from companion.course.exercises._tools import Attempt, a_kind, close, expect

Texts = list[list[int]]
ScoreBatch = Callable[[Texts], list[float]]


def value(text: list[int]) -> float:
    """Score of a text: depends on all its ids, and on their order."""
    return math.sin(sum((place + 1) * one for place, one in enumerate(text)))


def scorer(texts: Texts) -> list[float]:
    """A model that scores a batch."""
    if not texts:
        raise ValueError("a batch without texts")
    return [value(text) for text in texts]


class Watched:
    """A model that notes the lengths of each batch."""

    def __init__(self, score: ScoreBatch = scorer) -> None:
        self.score = score
        self.batches: list[list[int]] = []

    def __call__(self, texts: Texts) -> list[float]:
        self.batches.append([len(text) for text in texts])
        return self.score(texts)


def _texts(seed: int, count: int = 60) -> Texts:
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(3, 1, count)), 1, 200).astype(int)
    return [rng.integers(1, 60, int(n)).tolist() for n in lengths]


def _greedy(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices, longest first, each batch filled to the budget."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _padded(batches: list[list[int]]) -> int:
    return sum(len(batch) * max(batch) for batch in batches if batch)


def _ask(attempt: Attempt, texts: Texts, budget: int) -> tuple[list[float], list[list[int]]]:
    watched = Watched()
    got = attempt(texts, watched, budget)
    if not isinstance(got, list):
        raise Unusable(f"the result: expected a list of scores, got {a_kind(got)}")
    return got, watched.batches


def _each(attempt: Attempt) -> None:
    for seed in range(3):
        texts = _texts(seed)
        for budget in (400, 80):
            got, _ = _ask(attempt, texts, budget)
            expect(len(got) == len(texts), f"60 texts, budget {budget}, and {len(got)} scores")


def _order(attempt: Attempt) -> None:
    for seed in range(3):
        texts = _texts(seed)
        got, _ = _ask(attempt, texts, 400)
        close(got, [value(text) for text in texts], "60 texts of 1 to 200 tokens, budget 400")


def _within(attempt: Attempt) -> None:
    for seed in range(3):
        for budget in (200, 400, 1000):
            _, batches = _ask(attempt, _texts(seed), budget)
            for lengths in batches:
                size = len(lengths) * max(lengths, default=0)
                expect(size <= budget, f"a batch of {len(lengths)} texts, the longest of "
                       f"{max(lengths, default=0)} tokens, is {size} padded tokens: the budget is "
                       f"{budget}")  # fmt: skip


def _little(attempt: Attempt) -> None:
    for seed in range(3):
        texts = _texts(seed)
        lengths = [len(text) for text in texts]
        plan = [[lengths[i] for i in batch] for batch in _greedy(lengths, 400)]
        _, batches = _ask(attempt, texts, 400)
        got, want = _padded(batches), _padded(plan)
        expect(got <= 1.15 * want, f"{got} padded tokens are computed for {sum(lengths)}; "
                                   f"with like beside like it is {want}")  # fmt: skip


def _few_calls(attempt: Attempt) -> None:
    for seed in range(3):
        texts = _texts(seed)
        want = len(_greedy([len(text) for text in texts], 400))
        _, batches = _ask(attempt, texts, 400)
        expect(len(batches) <= 1.25 * want + 1, f"60 texts in {len(batches)} batches; the budget "
                                                f"of 400 asks for {want}")  # fmt: skip


def _long(attempt: Attempt) -> None:
    texts = [*_texts(4, 12), list(range(1, 501)), [3, 1, 2]]
    got, batches = _ask(attempt, texts, 300)
    close(got, [value(text) for text in texts], "one of 14 texts has 500 tokens, the budget is 300")
    beside = next((b for b in batches if 500 in b), [])
    expect(beside == [500], f"the text of 500 tokens, over the budget of 300, shares its batch: "
                            f"{beside}")  # fmt: skip


def _none(attempt: Attempt) -> None:
    got, batches = _ask(attempt, [], 300)
    expect(got == [] and batches == [], f"no texts: {got} after {len(batches)} calls of the model")


def _run(texts: Texts, score: ScoreBatch, batches: list[list[int]]) -> list[float]:
    out = [0.0] * len(texts)
    for batch in batches:
        for index, one in zip(batch, score([texts[i] for i in batch]), strict=True):
            out[index] = one
    return out


def _lengths(texts: Texts) -> list[int]:
    return [len(text) for text in texts]


def sorted_order(texts: Texts, score: ScoreBatch, budget: int) -> list[float]:
    batches = _greedy(_lengths(texts), budget)
    return [one for batch in batches for one in score([texts[i] for i in batch])]


def inverse_order(texts: Texts, score: ScoreBatch, budget: int) -> list[float]:
    batches = _greedy(_lengths(texts), budget)
    flat = [one for batch in batches for one in score([texts[i] for i in batch])]
    return [flat[i] for batch in batches for i in batch]


def by_sum(texts: Texts, score: ScoreBatch, budget: int) -> list[float]:
    lengths = _lengths(texts)
    batches: list[list[int]] = []
    used = 0
    for i in sorted(range(len(texts)), key=lambda i: -lengths[i]):
        if batches and used + lengths[i] <= budget:
            batches[-1].append(i)
            used += lengths[i]
        else:
            batches.append([i])
            used = lengths[i]
    return _run(texts, score, batches)


def as_they_come(texts: Texts, score: ScoreBatch, budget: int) -> list[float]:
    lengths = _lengths(texts)
    batches: list[list[int]] = []
    for i in range(len(texts)):
        widest = max([lengths[j] for j in (batches[-1] if batches else [])] + [lengths[i]])
        if batches and (len(batches[-1]) + 1) * widest <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return _run(texts, score, batches)


def width_of_the_first(texts: Texts, score: ScoreBatch, budget: int) -> list[float]:
    lengths = _lengths(texts)
    batches: list[list[int]] = []
    for i in sorted(range(len(texts)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return _run(texts, score, batches)


def one_by_one(texts: Texts, score: ScoreBatch, budget: int) -> list[float]:
    return [score([text])[0] for text in texts]


def sixteen(texts: Texts, score: ScoreBatch, budget: int) -> list[float]:
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    return _run(texts, score, [order[i : i + 16] for i in range(0, len(order), 16)])


def by_longest_of_all(texts: Texts, score: ScoreBatch, budget: int) -> list[float]:
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    rows = max(1, budget // max(map(len, texts))) if texts else 1
    return _run(texts, score, [order[i : i + rows] for i in range(0, len(order), rows)])


def drops_long(texts: Texts, score: ScoreBatch, budget: int) -> list[float]:
    short = [i for i, text in enumerate(texts) if len(text) <= budget]
    batches = _greedy([len(texts[i]) for i in short], budget)
    return _run([texts[i] for i in short], score, batches)


def cuts_long(texts: Texts, score: ScoreBatch, budget: int) -> list[float]:
    cut = [text[:budget] for text in texts]
    return _run(cut, score, _greedy(_lengths(cut), budget))


def long_gets_zero(texts: Texts, score: ScoreBatch, budget: int) -> list[float]:
    batches = _greedy(_lengths(texts), budget)
    return _run(texts, score, [b for b in batches if len(texts[b[0]]) <= budget])


def loses_the_last(texts: Texts, score: ScoreBatch, budget: int) -> list[float]:
    return _run(texts, score, _greedy(_lengths(texts), budget)[:-1])


def calls_for_nothing(texts: Texts, score: ScoreBatch, budget: int) -> list[float]:
    if not texts:
        return score([])
    return _run(texts, score, _greedy(_lengths(texts), budget))


def _probes() -> list[tuple[Any, ...]]:
    over = [*_texts(4, 12), list(range(1, 501)), [3, 1, 2]]
    return [(_texts(9), scorer, 400), (_texts(10), scorer, 250), (over, scorer, 300),
            ([], scorer, 300)]  # fmt: skip


def _look(attempt: Attempt, arguments: tuple[Any, ...]) -> Any:
    """Scores, and the batches in which they were made, whatever their order."""
    texts, score, budget = arguments
    watched = Watched(score if score is scorer else scorer)
    scores = attempt(texts, watched, budget)
    return scores, sorted(sorted(batch) for batch in watched.batches)


EXERCISE = Exercise(
    id="ch06.score_by_budget",
    parameters=("texts", "score", "budget"),
    properties=(
        Property("one score for each text", "Return as many scores as there are texts.", _each),
        Property(
            "in the order of the texts",
            "The i-th score should be that of the i-th text.",
            _order,
        ),
        Property(
            "each batch within the budget",
            "Rows times the longest row of a batch should be at most the budget.",
            _within,
        ),
        Property(
            "little padding",
            "Texts of like length should share a batch, so that little padding is computed.",
            _little,
        ),
        Property(
            "no more batches than the budget asks for",
            "A batch should be filled as far as the budget allows.",
            _few_calls,
        ),
        Property(
            "a text above the budget goes alone",
            "A text that is longer than the budget should be scored whole, in a batch of its own.",
            _long,
        ),
        Property(
            "no text, no call",
            "Without texts the model should not be called, and the result is an empty list.",
            _none,
        ),
    ),
    mutants=(
        Mutant(
            "The scores come back in the order in which they were computed, longest text first: "
            "each text has another one's score.",
            sorted_order,
        ),
        Mutant(
            "The order is undone the wrong way: `scores[order]` sorts once more. Text `order[k]` "
            "has the k-th score, so write `out[order[k]] = scores[k]`.",
            inverse_order,
        ),
        Mutant(
            "The lengths are added up. A padded batch is a rectangle: rows times the *longest* "
            "row, and that is what memory has to hold.",
            by_sum,
        ),
        Mutant(
            "The batches are filled in the order of arrival. They keep to the budget, and one "
            "long text makes all its neighbours as wide as itself.",
            as_they_come,
        ),
        Mutant(
            "The first row is taken for the longest. From short to long it is the shortest one, "
            "and the batch goes over the budget.",
            width_of_the_first,
        ),
        Mutant(
            "Each text has a batch of its own. There is no padding so, and no company either: a "
            "call costs the same for one row as for many.",
            one_by_one,
        ),
        Mutant(
            "A batch has a fixed number of rows. Sixteen long texts are over the budget, sixteen "
            "short ones leave it empty.",
            sixteen,
        ),
        Mutant(
            "The longest text of *all* says how many rows every batch has. Short texts could go "
            "together by the dozen.",
            by_longest_of_all,
        ),
        Mutant(
            "Texts above the budget are left out, so there are fewer scores than texts, and those "
            "behind them move up.",
            drops_long,
        ),
        Mutant(
            "Texts above the budget are cut. That is another text, with another score, and nobody "
            "is told.",
            cuts_long,
        ),
        Mutant(
            "Texts above the budget get 0, which nobody can tell from a score.",
            long_gets_zero,
            "verl-omni #366",
        ),
        Mutant(
            "The last batch is lost: it was begun, and not full when the texts ended.",
            loses_the_last,
        ),
        Mutant(
            "The model is called without a text. Tensors without rows crash somewhere below.",
            calls_for_nothing,
        ),
    ),
    probes=_probes,
    look=_look,
    hints=(
        "Sort indices, not texts: then you know where each score belongs.",
        "From long to short the first row of a batch is its widest, and one more row fits while "
        "(rows + 1) · first ≤ budget.",
        "For each batch `for index, one in zip(batch, score([texts[i] for i in batch])): "
        "out[index] = one`. An empty list of texts makes no batch at all.",
    ),
    right="Longest first has a second use: if memory does not suffice, the first batch says so, "
    "not the last one after an hour. The companion plans by `token_budget_batches`.",
)
