"""Best-of-N and step-guided beam search, batched over prompts; the rule by which one is chosen.

TRL has dropped its best-of-N sampler and its process models (trl #5048, #4291). Both searches count
the tokens that the policy generated, so that they can be compared with plain sampling and a vote
for the same price. Chapters 3 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from companion.errors import DataError, ModelError
from companion.formatting import Text
from companion.formatting.steps import split_steps
from companion.generation.policy import Policy, Sample
from companion.scoring.scorer import Scorer, TokenScorer

#: Rows (``prompt``, ``completion``, ``terminated``) in, a score each out; NaN for one without.
AnyScorer = Scorer[Any] | Callable[[list[dict[str, Any]]], Sequence[float]]


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


def best_first(score: float, terminated: bool) -> tuple[bool, bool, float]:
    """Sorts completions as :attr:`SearchResult.candidates` says."""
    without = math.isnan(score)
    return without, not terminated, 0.0 if without else -score


def order(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Best first, as :attr:`SearchResult.candidates` says."""
    return sorted(candidates, key=lambda item: best_first(item.score, item.terminated))


def score_rows(
    scorer: AnyScorer, rows: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, list[str | None], np.ndarray]:
    """Scores ``[N]`` float64 with NaN where there is none, the reasons, and tokens read ``[N]``.

    Raises
    ------
    DataError
        If a callable gives another number of scores than it got rows.
    """
    if not callable(scorer):
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
    scorer: AnyScorer, prompts: Sequence[Text], samples: Sequence[Sequence[Sample]]
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
        {
            "prompt": prompt,
            "completion": sample.text,
            "terminated": sample.terminated,
            "drawn": True,
        }
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


def best_of_n_search(
    policy: Policy,
    scorer: AnyScorer,
    prompts: Sequence[Text],
    n: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[SearchResult]:
    """Draw n completions of each prompt and order them by their scores. Chapter 5.

    Parameters
    ----------
    policy : Policy
    scorer : RewardScorer, TokenScorer or callable
        A callable gets rows with ``prompt``, ``completion`` (text) and ``terminated``, and gives a
        score each.
    prompts, n, temperature, top_p, max_new_tokens, seed
        As in :meth:`Policy.sample`.

    Returns
    -------
    list of SearchResult
        One a prompt, in order.
    """
    samples = policy.sample(
        prompts,
        n,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    return score_samples(scorer, prompts, samples)


@dataclass
class _Search:
    """One prompt's search: the beams that go on, those that ended, and what they cost."""

    prompt: Text
    beams: list[Candidate]
    ended: list[Candidate] = field(default_factory=list)
    n_generated: int = 0
    n_scored: int = 0


def step_beam_search(
    policy: Policy,
    scorer: TokenScorer,
    prompts: Sequence[Text],
    *,
    beams: int = 4,
    expand: int = 4,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_steps: int = 16,
    max_step_tokens: int = 128,
    seed: int = 0,
) -> list[SearchResult]:
    """Search step by step, guided by a process model (Snell et al. 2024, arXiv 2408.03314).

    Each round, every beam is gone on with by ``expand`` samples of one step (up to the separator);
    equal ones count once. The process model scores the steps of each, their aggregate (as the
    model's manifest says) is the beam's value, and the best ``beams`` are kept. A solution that
    has ended competes for these places too, is kept for the final choice in any case, and costs
    nothing more. The search ends when only ended ones hold places, or after ``max_steps``.
    Chapter 3.

    Parameters
    ----------
    policy : Policy
    scorer : TokenScorer
        Of a process model. Its separator ends a step.
    prompts : sequence
        Texts or lists of messages; the policy and the process model get the same.
    beams, expand : int
        Beams that are kept, and samples of each beam. The first step is sampled ``beams × expand``
        times.
    temperature, top_p, seed
        As in :meth:`Policy.sample`: what is found for a prompt does not depend on the others.
    max_steps, max_step_tokens : int
        A beam that has not ended by then, or a step that is longer, is cut off.

    Returns
    -------
    list of SearchResult
        One a prompt, in order. Its candidates are the solutions that ended and those that were cut
        off.

    Raises
    ------
    ModelError
        If the scorer is not of a process model.
    DataError
        For a setting below 1.
    """
    separator = scorer.readout.separator
    if scorer.readout.kind != "process" or separator is None:
        raise ModelError(
            "the scorer is not of a process model: it has no steps to score",
            "train one with `companion train process`, or use best_of_n_search",
        )
    if min(beams, expand, max_steps) < 1:
        raise DataError(f"beams={beams}, expand={expand}, max_steps={max_steps}: at least 1 each")
    searches = [_Search(prompt, [Candidate("", [], False, math.nan)]) for prompt in prompts]
    draw: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_step_tokens,
        "stop": separator,
        "seed": seed,
    }
    for step in range(max_steps):
        going = [(search, beam) for search in searches for beam in search.beams]
        if not going:
            break
        grown = policy.sample(
            [search.prompt for search, _ in going],
            beams * expand if step == 0 else expand,
            prefixes=[beam.token_ids for _, beam in going],
            **draw,
        )
        #: what is new, of which search, and whether it can go on; equal ones once
        fresh: dict[tuple[int, tuple[int, ...]], tuple[_Search, Candidate, bool]] = {}
        for (search, _), group in zip(going, grown, strict=True):
            for sample in group:
                search.n_generated += sample.n_tokens
                key = (id(search), tuple(sample.token_ids))
                new = Candidate(sample.text, sample.token_ids, sample.terminated, math.nan)
                fresh.setdefault(key, (search, new, sample.stopped))
        rows = [
            {
                "prompt": search.prompt,
                "completions": split_steps(new.text, separator),
                "terminated": new.terminated,
            }
            for search, new, _ in fresh.values()
        ]
        values, reasons, read = score_rows(scorer, rows)
        for search in searches:
            search.beams = []
        for (search, new, goes_on), value, reason, tokens in zip(
            fresh.values(), values, reasons, read, strict=True
        ):
            search.n_scored += int(tokens)
            live = goes_on and step < max_steps - 1 and reason is None
            scored = replace(new, score=float(value), reason=reason)
            (search.beams if live else search.ended).append(scored)
        for search in searches:
            search.beams = _places(search.beams, search.ended, beams)
    return [
        SearchResult(order(search.ended), search.n_generated, search.n_scored)
        for search in searches
    ]


def _places(live: Sequence[Candidate], ended: Sequence[Candidate], beams: int) -> list[Candidate]:
    """Of the best ``beams`` of all, those that go on; at equal values an ended one comes first."""
    finished = [item for item in ended if item.terminated and not math.isnan(item.score)]
    ranked = sorted([*finished, *live], key=lambda item: -item.score)[:beams]
    return [item for item in ranked if not item.terminated]
