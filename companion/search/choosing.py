"""Completions with their scores, and the rule by which one is chosen. Chapters 3 and 5."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from companion.errors import DataError
from companion.formatting import Text
from companion.scoring import scorer as scorers
from companion.search.results import Sample

#: Rows (``prompt``, ``completion``, ``terminated``) in, a score each out; NaN for one without.
Scorer = scorers.Scorer[Any] | Callable[[list[dict[str, Any]]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A completion that a search considered.

    Attributes
    ----------
    text : str
        Without special tokens.
    token_ids : list of int
        As the policy wrote them.
    terminated : bool
        Whether the policy ended it.
    score : float
        NaN if it has none.
    reason : str, optional
        Why it has none.
    """

    text: str
    token_ids: list[int]
    terminated: bool
    score: float
    reason: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """What a search found for one prompt.

    Attributes
    ----------
    candidates : list of Candidate
        Best first: finished ones before those that were cut off, then by score, then in the order
        in which they were drawn; those without a score last.
    n_generated : int
        Tokens that the policy generated, those of candidates that were thrown away included.
    n_scored : int
        Tokens that the scorer read; 0 for a callable, which does not say.
    """

    candidates: list[Candidate]
    n_generated: int
    n_scored: int

    @property
    def best(self) -> Candidate:
        """The first candidate.

        Raises
        ------
        DataError
            If none has a score.
        """
        if not self.candidates or math.isnan(self.candidates[0].score):
            why = self.candidates[0].reason if self.candidates else "no candidate"
            raise DataError(f"a prompt has no completion with a score: {why}")
        return self.candidates[0]

    @property
    def n_tied(self) -> int:
        """How many candidates are as good as the best by rule and score; 1 if there is no tie."""
        best = self.best
        return sum(
            other.terminated == best.terminated and other.score == best.score
            for other in self.candidates
        )


def order(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Best first, as :attr:`SearchResult.candidates` says."""
    return sorted(
        candidates,
        key=lambda item: (
            math.isnan(item.score),
            not item.terminated,
            0.0 if math.isnan(item.score) else -item.score,
        ),
    )


def score_rows(
    scorer: Scorer, rows: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, list[str | None], np.ndarray]:
    """Scores ``[N]`` float64 with NaN where there is none, the reasons, and tokens read ``[N]``.

    Raises
    ------
    DataError
        If a callable gives another number of scores than it got rows.
    """
    if isinstance(scorer, scorers.Scorer):
        scores = scorer.score(rows, on_error="skip")
        return scores.raw, list(scores.reasons), scores.n_tokens
    values = np.asarray(scorer([dict(row) for row in rows]), dtype=np.float64)
    if values.shape != (len(rows),):
        raise DataError(f"the scorer gave {list(values.shape)} scores for {len(rows)} rows")
    bad = ~np.isfinite(values)
    values = np.where(bad, np.nan, values)
    reasons = ["the score is not finite" if is_bad else None for is_bad in bad]
    return values, reasons, np.zeros(len(rows), dtype=np.int64)


def score_samples(
    scorer: Scorer, prompts: Sequence[Text], samples: Sequence[Sequence[Sample]]
) -> list[SearchResult]:
    """Score samples that are there, all in one call, and order them. Chapters 3 and 5.

    Parameters
    ----------
    scorer : RewardScorer, TokenScorer or callable
        A callable gets rows with ``prompt``, ``completion`` (text) and ``terminated``.
    prompts : sequence
        ``[P]`` texts or lists of messages.
    samples : sequence
        ``[P]`` lists of :class:`Sample`.
    """
    rows = [
        {"prompt": prompt, "completion": sample.text, "terminated": sample.terminated}
        for prompt, group in zip(prompts, samples, strict=True)
        for sample in group
    ]
    values, reasons, read = score_rows(scorer, rows)
    results, begin = [], 0
    for group in samples:
        part = slice(begin, begin + len(group))
        begin += len(group)
        candidates = [
            Candidate(s.text, s.token_ids, s.terminated, float(value), reason)
            for s, value, reason in zip(group, values[part], reasons[part], strict=True)
        ]
        results.append(
            SearchResult(order(candidates), sum(s.n_tokens for s in group), int(np.sum(read[part])))
        )
    return results


def within_tokens(samples: Sequence[Sample], budget: int) -> list[Sample]:
    """The first samples until they hold ``budget`` generated tokens, the one that does included.

    So a method that is given them has at least as many tokens as the one it is compared with.
    Chapter 3.

    Raises
    ------
    DataError
        If all of them hold fewer: the comparison would be unfair.
    """
    total = 0
    for count, sample in enumerate(samples, start=1):
        total += sample.n_tokens
        if total >= budget:
            return list(samples[:count])
    raise DataError(f"the samples hold {total} tokens, fewer than {budget}", "draw more of them")
