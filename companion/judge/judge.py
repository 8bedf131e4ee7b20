"""A generative judge: asks in both orders, reads without guessing, keeps what it was told.

Zheng et al. (2023, arXiv 2306.05685) found judges that prefer what they see first; they call a
winner only what wins in both orders, and so does this module. Chapter 3.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from companion.errors import DataError
from companion.judge.backend import Answer, Backend, Question
from companion.judge.cache import AnswerCache
from companion.judge.items import Item, read_item
from companion.judge.local import LocalBackend
from companion.judge.server import ServerBackend
from companion.judge.templates import JudgeTemplate, Outcome, load_template

Progress = Callable[[int], None]
TemplateLike = str | os.PathLike[str] | JudgeTemplate
_MIRROR: Final[dict[Any, str]] = {"a": "b", "b": "a", "tie": "tie"}


def combine_orders(first: str | None, swapped: str | None) -> str | None:
    """One preference from the verdicts of both orders.

    Parameters
    ----------
    first, swapped : {"a", "b", "tie"} or None
        Both name the *completion* that won, not the place it stood in; None is unparsed.

    Returns
    -------
    str or None
        The verdict if both agree, ``tie`` if they do not (Zheng et al. 2023, section 3.4), None if
        one of them is unparsed. Chapter 3.
    """
    if first is None or swapped is None:
        return None
    return first if first == swapped else "tie"


@dataclass(frozen=True)
class PairVerdict:
    """What a judge says of a pair. Chapter 3.

    Attributes
    ----------
    preference : {"a", "b", "tie"} or None
        See :func:`combine_orders`.
    reason : str or None
        Why there is none (``no verdict``, ``conflicting verdicts``, ``cut off``, or what the model
        refused), or ``disagreement`` where a tie comes of two verdicts.
    first, swapped : {"a", "b", "tie"} or None
        The verdicts with a shown first and with b shown first; both name the completion.
    logit_first, logit_swapped : float or None
        log P(a) / P(b) at the token that decided, in each order, in nats; None where the backend
        gives no probabilities.
    answers : tuple of str
        What the model wrote in each order.
    """

    preference: str | None
    reason: str | None
    first: str | None
    swapped: str | None
    logit_first: float | None = None
    logit_swapped: float | None = None
    answers: tuple[str, str] = ("", "")

    @property
    def logit(self) -> float | None:
        """Mean of both logits: what a preference for a place adds to the one, it takes off the
        other."""
        if self.logit_first is None or self.logit_swapped is None:
            return None
        return (self.logit_first + self.logit_swapped) / 2

    @property
    def probability(self) -> float | None:
        """P(a is better), from :attr:`logit`."""
        if self.logit is None:
            return None
        return 1 / (1 + math.exp(-self.logit)) if self.logit > -700 else 0.0

    @property
    def position_logit(self) -> float | None:
        """Half of what standing first, and not second, adds to a logit: the bias of the place."""
        if self.logit_first is None or self.logit_swapped is None:
            return None
        return (self.logit_first - self.logit_swapped) / 2


@dataclass(frozen=True)
class Grading:
    """What a judge says of one completion. Chapter 3.

    Attributes
    ----------
    rating : float or None
        The grade that the judge wrote.
    reason : str or None
        Why there is none.
    expected_rating : float or None
        Mean over the grades' probabilities where the backend gives them (G-Eval, Liu et al. 2023,
        arXiv 2303.16634): finer than the grade, fewer ties.
    answer : str
        What the model wrote.
    """

    rating: float | None
    reason: str | None
    expected_rating: float | None = None
    answer: str = ""


class Judge:
    """A generative judge over any causal language model. Chapter 3.

    Parameters
    ----------
    backend : Backend
        :meth:`from_pretrained` and :meth:`from_server` make one.
    template : str, path or JudgeTemplate
        See :func:`companion.judge.load_template`.
    cache : str or path, optional
        Where answers are kept; see :class:`companion.judge.AnswerCache`.
    max_tokens : int, optional
        How long an answer may be; default: what the template says.

    Attributes
    ----------
    counts : Counter
        ``asked``, ``from cache``, and each reason for which an answer was unparsed.
    """

    def __init__(
        self,
        backend: Backend,
        template: TemplateLike = "pairwise",
        *,
        cache: str | os.PathLike[str] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.backend = backend
        self.template = load_template(template)
        self.max_tokens = self.template.max_tokens if max_tokens is None else max_tokens
        if self.max_tokens < 1:
            raise DataError(f"max_tokens is {max_tokens}", "use a positive number")
        self.cache = None if cache is None else AnswerCache(cache)
        self.counts: Counter[str] = Counter()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        template: TemplateLike = "pairwise",
        *,
        cache: str | os.PathLike[str] | None = None,
        max_tokens: int | None = None,
        **options: Any,
    ) -> Judge:
        """A judge in this process; options as in :meth:`LocalBackend.from_pretrained`."""
        backend = LocalBackend.from_pretrained(path_or_id, **options)
        return cls(backend, template, cache=cache, max_tokens=max_tokens)

    @classmethod
    def from_server(
        cls,
        model: str,
        base_url: str,
        template: TemplateLike = "pairwise",
        *,
        cache: str | os.PathLike[str] | None = None,
        max_tokens: int | None = None,
        **options: Any,
    ) -> Judge:
        """A judge behind an OpenAI-compatible server; options as in :class:`ServerBackend`."""
        backend = ServerBackend(model, base_url, **options)
        return cls(backend, template, cache=cache, max_tokens=max_tokens)

    def close(self) -> None:
        """Let the cache go."""
        if self.cache is not None:
            self.cache.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    # ------------------------------------------------------------------ judging

    def compare(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> list[PairVerdict]:
        """Judge pairs, each in both orders.

        Parameters
        ----------
        rows : sequence of mappings
            ``prompt`` with ``a`` and ``b``, or with ``chosen`` and ``rejected``. Of the latter the
            verdict's ``a`` is not always the chosen one: see
            :func:`companion.judge.read_item`, whose ``row`` says which.
        names : sequence of str, optional
            How to call the rows in errors; default ``row 0``, …
        progress : callable, optional
            Called with the number of answers that came.

        Returns
        -------
        list of PairVerdict
            One a row, in order.

        Raises
        ------
        DataError
            For a bad row, or a template that is not pairwise.
        JudgeError
            If the model cannot be asked; what was answered is in the cache.
        """
        return self.compare_items(self._items(rows, names, "pairwise"), progress=progress)

    def compare_items(
        self, items: Sequence[Item], *, progress: Progress | None = None
    ) -> list[PairVerdict]:
        """:meth:`compare` for rows that were read before."""
        questions = []
        for item in items:
            swapped = {**item.texts, "a": item.texts["b"], "b": item.texts["a"]}
            questions += [self._question(item.texts), self._question(swapped)]
        answers = self._answers(questions, progress)
        return [self._verdict(*answers[2 * i : 2 * i + 2]) for i in range(len(items))]

    def grade(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> list[Grading]:
        """Grade single completions (``prompt`` and ``completion``); see :meth:`compare`."""
        return self.grade_items(self._items(rows, names, "pointwise"), progress=progress)

    def grade_items(
        self, items: Sequence[Item], *, progress: Progress | None = None
    ) -> list[Grading]:
        """:meth:`grade` for rows that were read before."""
        answers = self._answers([self._question(item.texts) for item in items], progress)
        return [self._grading(answer) for answer in answers]

    # ------------------------------------------------------------------ inside

    def _items(self, rows: Sequence[Any], names: Sequence[str] | None, mode: str) -> list[Item]:
        if self.template.mode != mode:
            raise DataError(
                f"the template {self.template.name!r} is {self.template.mode}",
                "pairwise templates compare, pointwise ones grade",
            )
        names = [f"row {i}" for i in range(len(rows))] if names is None else names
        return [read_item(row, mode, name) for row, name in zip(rows, names, strict=True)]

    def _question(self, texts: Mapping[str, str]) -> Question:
        return Question(tuple(self.template.messages(texts)), self.template, self.max_tokens)

    def _answers(self, questions: Sequence[Question], progress: Progress | None) -> list[Answer]:
        """From the cache or the model; equal questions are asked once."""
        identity = self.backend.identity()
        keys = [question.key(identity) for question in questions]
        times = Counter(keys)
        done: dict[str, Answer] = {}
        for key, answer in self._by_key(dict(zip(keys, questions, strict=True))):
            done[key] = answer
            if progress is not None:
                progress(times[key])
        return [done[key] for key in keys]

    def _by_key(self, questions: Mapping[str, Question]) -> Iterator[tuple[str, Answer]]:
        open_keys = []
        for key in questions:
            kept = None if self.cache is None else self.cache.get(key)
            if kept is None:
                open_keys.append(key)
            else:
                self.counts["from cache"] += 1
                yield key, kept
        asked = [questions[key] for key in open_keys]
        for number, answer in self.backend.answers(asked) if asked else ():
            self.counts["asked"] += 1
            if self.cache is not None and answer.refused is None and answer.kept:
                self.cache.put(open_keys[number], answer)
            yield open_keys[number], answer

    def _outcome(self, answer: Answer) -> tuple[Outcome | None, str | None]:
        if answer.refused is not None:
            self.counts["refused"] += 1
            return None, answer.refused
        reading = self.template.read(answer.text, finished=answer.finished)
        if reading.reason is not None:
            self.counts[reading.reason] += 1
        return reading.outcome, reading.reason

    def _verdict(self, one: Answer, two: Answer) -> PairVerdict:
        (first, why_first), (second, why_second) = self._outcome(one), self._outcome(two)
        won = None if first is None else str(first)
        swapped = _MIRROR.get(second)
        reason = why_first or why_second
        if reason is None and won != swapped:
            reason = "disagreement"
        logit = _logit(two)
        return PairVerdict(
            combine_orders(won, swapped),
            reason,
            won,
            swapped,
            _logit(one),
            None if logit is None else -logit,
            (one.text, two.text),
        )

    def _grading(self, answer: Answer) -> Grading:
        outcome, reason = self._outcome(answer)
        found = answer.probabilities or {}
        mass, expected = sum(found.values()), None
        if outcome is not None and mass > 0:
            expected = sum(float(o) * p for o, p in found.items()) / mass
        return Grading(None if outcome is None else float(outcome), reason, expected, answer.text)


def _logit(answer: Answer) -> float | None:
    """log P(A) / P(B) of one answer; None unless both are known."""
    found = answer.probabilities
    if found is None or not (found.get("a") and found.get("b")):
        return None
    return math.log(found["a"]) - math.log(found["b"])
