"""A reward model on held-out rankings: as pairs, and how often its favourite is the best.

Every completion is scored once. The figures of the pairs are those of
:func:`companion.evaluation.evaluate_pairs` on the pairs that the rankings hold; the pick of
the best of K is what best-of-N and reranking use. Chapter 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from companion.data.formats import ranking_pairs
from companion.data.splits import prompt_key
from companion.errors import DataError
from companion.evaluation.pairs import PairEvaluation
from companion.functional.rankings import best_is_best
from companion.functional.resampling import Array, accuracy_interval

if TYPE_CHECKING:
    from companion.scoring import Scorer
    from companion.scoring.scorer import OnError

#: columns with one entry for each completion
_OF_COMPLETIONS = ("completions", "ranks", "ratings", "rewards")


@dataclass
class RankingEvaluation(PairEvaluation):
    """Rankings with the scores of a model: as the pairs that they hold, and as picks of the best.

    Attributes
    ----------
    rankings : list of dict
    scores, lengths : list of ndarray ``[K]``
        Of each ranking's completions; a score is NaN where there is none.
    metrics : dict
        Those of the pairs, with ``rankings``: ``n``; ``dropped``, rankings with a completion that
        has no score; ``best_is_best``, the share in which the highest score has the best rank, and
        its ``interval`` (95%); the floors ``random``, what a pick at random would get, and
        ``longest``; ``limit``, what the true rewards get, or None.
    """

    rankings: list[Mapping[str, Any]] = field(default_factory=list)
    scores: list[Array] = field(default_factory=list)
    lengths: list[Array] = field(default_factory=list)

    def measure(self) -> Self:
        """Compute the figures of the pairs, and of the picks."""
        super().measure()
        self.metrics["rankings"] = _picks(self.rankings, self.scores, self.lengths, self.seed)
        return self


def evaluate_rankings(
    scorer: Scorer[Any],
    dataset: Iterable[Mapping[str, Any]],
    *,
    temperature: float | None = None,
    info: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
) -> RankingEvaluation:
    """Score held-out rankings and compute every figure. Chapter 3.

    Parameters
    ----------
    scorer : Scorer
        Of a pairwise or a K-wise model.
    dataset : iterable of mappings
        Rows of the kind ``rankings`` (:mod:`companion.data.formats`), with an optional ``rewards``
        column (the truth of each completion) that gives the limit.
    temperature, info, progress, seed, on_error
        As for :func:`companion.evaluation.evaluate_pairs`.

    Raises
    ------
    DataError
        If there is no ranking, or no pair of them can be scored.
    """
    rows = [dict(row) for row in dataset]
    if not rows:
        raise DataError("there is no ranking to evaluate on", "check the split and the limit")
    texts, names, ends = [], [], []
    for i, row in enumerate(rows):
        shared = {key: value for key, value in row.items() if key not in _OF_COMPLETIONS}
        texts += [{**shared, "completion": completion} for completion in row["completions"]]
        names += [f"row {i}, completion {k}" for k in range(len(row["completions"]))]
        ends.append(len(texts))
    scores = scorer.score(texts, names=names, on_error=on_error, progress=progress)
    if temperature is None:
        temperature = getattr(scorer.manifest, "temperature", None)
    return scored_rankings(
        rows,
        np.split(scores.raw, ends[:-1]),
        np.split(scores.n_tokens, ends[:-1]),
        scores.reasons,
        temperature=temperature,
        info=info,
        seed=seed,
    ).measure()


def scored_rankings(
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[Array],
    lengths: Sequence[Array],
    reasons: Sequence[str | None],
    *,
    temperature: float | None = None,
    info: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> RankingEvaluation:
    """Rankings that have been scored, by a scorer or in training.

    Parameters
    ----------
    scores, lengths : sequence of arrays ``[K]``
        Score and tokens of each ranking's completions.
    reasons : sequence of str or None
        Why a completion has no score, of all rankings' completions one after the other.
    """
    pairs: list[dict[str, Any]] = []
    begin = 0
    for row in rows:
        end = begin + len(row["completions"])
        pairs += ranking_pairs({**row, "_place": list(range(begin, end))}, "none", Counter())
        begin = end
    if not pairs:
        raise DataError("no completion is ranked above another", "check the column of ranks")
    best, worst = (
        [pair.pop(f"_place_{side}") for pair in pairs] for side in ("chosen", "rejected")
    )
    why = [reasons[a] or reasons[b] for a, b in zip(best, worst, strict=True)]
    gone = np.array([reason is not None for reason in why])
    flat = np.concatenate(scores).astype(np.float64)
    tokens = np.concatenate(lengths).astype(np.float64)
    return RankingEvaluation(
        list(pairs),
        np.where(gone, np.nan, flat[best]),
        np.where(gone, np.nan, flat[worst]),
        tokens[best],
        tokens[worst],
        why,
        temperature=temperature,
        seed=seed,
        info=dict(info or {}),
        rankings=list(rows),
        scores=list(scores),
        lengths=list(lengths),
    )


def _picks(
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[np.ndarray],
    lengths: Sequence[np.ndarray],
    seed: int,
) -> dict[str, Any]:
    """How often the pick of the scores is the best, and that of simpler rules."""
    hits: dict[str, list[float]] = {"model": [], "random": [], "longest": [], "limit": []}
    groups, dropped = [], 0
    for row, own, size in zip(rows, scores, lengths, strict=True):
        kept = [k for k, rank in enumerate(row["ranks"]) if rank is not None]
        if not np.isfinite(own[kept]).all():
            dropped += 1
            continue
        ranks = torch.tensor([[float(row["ranks"][k]) for k in kept]], dtype=torch.float64)

        def hit(values: Any, ranks: torch.Tensor = ranks, kept: list[int] = kept) -> float:
            chosen = torch.tensor([[float(values[k]) for k in kept]], dtype=torch.float64)
            return float(best_is_best(chosen, ranks)[0])

        hits["model"].append(hit(own))
        hits["longest"].append(hit(size))
        hits["random"].append(float((ranks == ranks.min()).double().mean()))
        if row.get("rewards") is not None:
            hits["limit"].append(hit(row["rewards"]))
        groups.append(prompt_key(row))
    if not groups:
        raise DataError("no ranking has scores for all of its completions")
    correct = np.array(hits["model"])
    return {
        "n": len(groups),
        "dropped": dropped,
        "best_is_best": float(correct.mean()),
        "interval": list(accuracy_interval(correct, groups, seed)),
        "random": float(np.mean(hits["random"])),
        "longest": float(np.mean(hits["longest"])),
        "limit": float(np.mean(hits["limit"])) if len(hits["limit"]) == len(groups) else None,
    }
