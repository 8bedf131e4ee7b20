"""What a published benchmark is: its rows as items, and its figure from what was said of them.

A benchmark brings two things: :meth:`Benchmark.item` reads a row of its schema, and
:meth:`Benchmark.results` forms the published figures. What stands between (asking a model, the
floors, the intervals) is the same for all: :mod:`companion.evaluation.benchmarks.running`.

Chapter 4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, NamedTuple

import numpy as np

from companion.data.messages import Text, plain
from companion.errors import DataError
from companion.functional.resampling import Array

Row = Mapping[str, Any]
#: What a benchmark asks of a model: which of two is better (a score of each will do); a score of
#: each text; or which steps are wrong.
Needs = Literal["pairs", "scores", "steps"]

#: Headings, items of lists, bold words and fences of code.
_MARKDOWN: Final = re.compile(
    r"^ {0,3}#{1,6} |^\s*(?:[-*+]|\d+[.)]) |\*\*[^*\n]+\*\*|__[^_\n]+__|^\s*```", re.MULTILINE
)


@dataclass(frozen=True)
class Item:
    """One row of a benchmark, ready to be asked about.

    Attributes
    ----------
    subset : str
        What its figure counts in.
    prompt : str or list of messages
    completions : tuple
        The texts that are scored, the right ones first; of a solution its steps.
    n_right : int
        How many of the completions are right ones.
    wrong : frozenset of int
        Of a solution, the places of its wrong steps.
    group : str or None
        What the bootstrap draws as a whole with other items; None: all of the same prompt.
    tags : mapping of str to float
        Other facts of the row that a figure counts by.
    """

    subset: str
    prompt: Text
    completions: tuple[Text, ...]
    n_right: int = 1
    wrong: frozenset[int] = frozenset()
    group: str | None = None
    tags: Mapping[str, float] | None = None


class Result(NamedTuple):
    """One line of a benchmark's table.

    Attributes
    ----------
    name : str
    level : {"overall", "section", "subset"}
    n : int
        Items that count.
    figures : dict of str to float
        The one that stands for the line first, then its parts; NaN where there is nothing to
        count.
    """

    name: str
    level: str
    n: int
    figures: dict[str, float]

    @property
    def value(self) -> float:
        """The figure that stands for the line."""
        return next(iter(self.figures.values()))


class Benchmark:
    """A published benchmark.

    Attributes
    ----------
    name : str
        For the command line.
    title : str
    dataset : str
        Id on the Hugging Face hub.
    splits : tuple of str
        Those that are read of a hub dataset or a folder, if none is named.
    fields : str
        Of a row, for errors.
    needs : {"pairs", "scores", "steps"}
    subsets : tuple of str
        Those that the published set has; empty if it names none.
    even : float
        What a pair counts whose verdicts, of a judge, come out even.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    dataset: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    fields: ClassVar[str]
    needs: ClassVar[Needs] = "pairs"
    subsets: ClassVar[tuple[str, ...]] = ()
    even: ClassVar[float] = 0.0

    def item(self, row: Row) -> Item | str:
        """A row of the published schema; or why the published figure leaves it out.

        Raises
        ------
        DataError
            Names the field and the cure.
        """
        raise NotImplementedError

    def outcomes(self, items: Sequence[Item], said: Sequence[Array], tie: float = 0.0) -> Array:
        """What the figures are formed of, ``[n, k]``; NaN in a column that an item has no part in.

        Parameters
        ----------
        items : sequence of Item
        said : sequence of arrays
            What a model said of each: a score of each completion; of each step 1 where it is called
            wrong, else 0; where the benchmark needs pairs, margins ``[right, wrong]`` of each right
            completion over each wrong one.
        tie : float
            What a comparison that comes out even counts. Floors toss a coin: one half.
        """
        raise NotImplementedError

    def results(self, outcomes: Mapping[str, Array]) -> list[Result]:
        """The published figures from the outcomes of each subset; the overall one first."""
        raise NotImplementedError

    def floors(self, items: Sequence[Item]) -> dict[str, Array]:
        """Outcomes of rules that know nothing, by name: ``longer`` and ``more markdown``."""
        floors = {"longer": lambda text: len(plain(text)), "more markdown": markdown_marks}
        found = {}
        for name, rule in floors.items():
            scores = [np.array([float(rule(x)) for x in item.completions]) for item in items]
            if self.needs == "pairs":
                scores = [margins(own, item) for own, item in zip(scores, items, strict=True)]
            found[name] = self.outcomes(items, scores, tie=0.5)
        return found


class PairBenchmark(Benchmark):
    """A benchmark of pairs: an item's outcome is the share of its pairs that are ordered right."""

    def outcomes(self, items: Sequence[Item], said: Sequence[Array], tie: float = 0.0) -> Array:
        """``[n, 1]``: the share of the item's pairs in which the right one is above the wrong."""
        return np.array([[float(wins(own, tie).mean())] for own in said]).reshape(-1, 1)


class StepBenchmark(Benchmark):
    """A benchmark of solutions whose wrong steps are known. Its items' completions are steps.

    Its outcomes are also defined where a step is called wrong with a probability: expected ones,
    each step by itself.
    """

    needs = "steps"

    def floors(self, items: Sequence[Item]) -> dict[str, Array]:
        """``longest step``: it alone is called wrong; ``guessing``: each, with the best rate."""
        lengths = [np.array([len(plain(step)) for step in item.completions]) for item in items]
        longest = [(np.arange(own.size) == own.argmax()).astype(np.float64) for own in lengths]
        subsets = np.array([item.subset for item in items])

        def overall(outcomes: Array) -> float:
            parts = {str(name): outcomes[subsets == name] for name in np.unique(subsets)}
            return float(np.nan_to_num(self.results(parts)[0].value))

        rates = np.linspace(0, 1, 21)
        guesses = [self.outcomes(items, [np.full(own.size, q) for own in lengths]) for q in rates]
        return {
            "longest step": self.outcomes(items, longest),
            "guessing": max(guesses, key=overall),
        }


def margins(scores: Array, item: Item) -> Array:
    """``[right, wrong]``: how far each right completion scores above each wrong one."""
    return np.subtract.outer(scores[: item.n_right], scores[item.n_right :])


def wins(margin: Array, tie: float) -> Array:
    """1 where a margin is positive, 0 where it is negative, `tie` where it is 0."""
    return np.where(margin == 0, tie, (margin > 0).astype(np.float64))


def markdown_marks(text: Text) -> int:
    """Headings, items of lists, bold words and fences of code in a text.

    What LMArena's style control counts beside the length (Li et al. 2024, 'Does style matter?'),
    and fences.
    """
    return len(_MARKDOWN.findall(plain(text)))


def pooled(outcomes: Mapping[str, Array]) -> Array:
    """The outcomes of all subsets, one below the other."""
    return np.concatenate(list(outcomes.values()))


def share(outcomes: Array, column: int = 0) -> float:
    """Mean of a column over the items that have a part in it; NaN if none has."""
    own = outcomes[:, column]
    own = own[~np.isnan(own)]
    return float(own.mean()) if own.size else float("nan")


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Weighted mean of the figures that there are; NaN if there is none."""
    weights = [1.0] * len(values) if weights is None else weights
    there = [(x, weight) for x, weight in zip(values, weights, strict=True) if x == x]
    if not there:
        return float("nan")
    return sum(x * weight for x, weight in there) / sum(weight for _, weight in there)


def subset_results(outcomes: Mapping[str, Array], figure: str = "accuracy") -> list[Result]:
    """A line for each subset: the mean of its first column."""
    return [
        Result(name, "subset", len(own), {figure: share(own)}) for name, own in outcomes.items()
    ]


# ---------------------------------------------------------------------- fields of a row


def text_of(row: Row, name: str) -> str:
    """A field that holds a text which is not empty."""
    value = _there(row, name)
    if not isinstance(value, str):
        raise DataError(f"field {name!r}: {type(value).__name__} in place of a text")
    return _read(value, name)


def prompt_of(row: Row, name: str = "prompt") -> Text:
    """A prompt: a text, or messages."""
    value = _there(row, name)
    if isinstance(value, (list, tuple)):
        turns = [turn for turn in value if isinstance(turn, Mapping)]
        texts = [turn.get(key) for turn in turns for key in ("role", "content")]
        if turns and len(turns) == len(value) and all(isinstance(x, str) for x in texts):
            _read(plain([dict(turn) for turn in turns]), name)
            return [dict(turn) for turn in turns]
        raise DataError(f"field {name!r}: neither a text nor a list of messages")
    return text_of(row, name)


def texts_of(row: Row, name: str, n: int | None = None) -> tuple[str, ...]:
    """A field that holds a list of texts, `n` of them."""
    value = _there(row, name)
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
        raise DataError(f"field {name!r}: no list of texts")
    if n is not None and len(value) != n:
        raise DataError(f"field {name!r}: {len(value)} texts in place of {n}")
    if not value:
        raise DataError(f"field {name!r}: an empty list")
    return tuple(_read(text, name) for text in value)


def choice_of(row: Row, name: str, choices: Sequence[str]) -> str:
    """A field that holds one of some words."""
    value = _there(row, name)
    if value not in choices:
        raise DataError(f"field {name!r}: {value!r} is none of {', '.join(choices)}")
    return str(value)


def _read(text: str, name: str) -> str:
    """A text that holds something, and that can be stored."""
    if not text.strip():
        raise DataError(f"field {name!r}: an empty text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"field {name!r}: half of a surrogate pair, which is no text") from error
    return text


def _there(row: Row, name: str) -> Any:
    if row.get(name) is None:
        there = ", ".join(sorted(str(key) for key, value in row.items() if value is not None))
        raise DataError(f"field {name!r}: missing; there are: {there or 'none'}")
    return row[name]
