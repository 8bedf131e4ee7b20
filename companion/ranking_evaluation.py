"""A reward model on held-out rankings: as pairs, and how often its favourite is the best.

Every completion is scored once. The figures of the pairs are those of
:func:`companion.evaluation.evaluate_pairs` on the pairs that the rankings hold; the pick of the
best of K is what best-of-N and reranking use. Chapter 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from companion.data.formats import ranking_pairs
from companion.data.splits import prompt_key
from companion.errors import DataError
from companion.evaluation import EvaluationResult, scored_pairs
from companion.metrics import accuracy_interval
from companion.rankings import best_is_best
from companion.scoring import PairScores, RewardScorer


def evaluate_rankings(
    scorer: RewardScorer,
    dataset: Iterable[Mapping[str, Any]],
    *,
    temperature: float | None = None,
    info: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
) -> EvaluationResult:
    """Score held-out rankings and compute every figure. Chapter 3.

    Parameters
    ----------
    scorer : RewardScorer
        Of a pairwise or a K-wise model.
    dataset : iterable of mappings
        Rows of the kind ``rankings`` (:mod:`companion.data.formats`), with an optional ``rewards``
        column (the truth of each completion) that gives the limit.
    temperature, info, progress, seed
        As for :func:`companion.evaluation.evaluate_pairs`.

    Returns
    -------
    EvaluationResult
        Of the pairs, with ``metrics["rankings"]``: ``n``; ``dropped``, rankings with a completion
        that has no score; ``best_is_best``, the share in which the highest score has the best rank,
        and its ``interval`` (95%); the floors ``random``, what a pick by lot would get, and
        ``longest``; ``limit``, what the true rewards get, or None.

    Raises
    ------
    DataError
        If there is no ranking, or no pair of them can be scored.
    """
    rows = [dict(row) for row in dataset]
    if not rows:
        raise DataError("there is no ranking to evaluate on", "check the split and the limit")
    texts = [
        {**_shared(row), "completion": completion}
        for row in rows
        for completion in row["completions"]
    ]
    names = [f"row {i}, completion {k}" for i, row in enumerate(rows) for k in _places(row)]
    scores = scorer.score(texts, names=names, progress=progress)
    pairs: list[dict[str, Any]] = []
    begin = 0
    parts: list[slice] = []
    for row in rows:
        part = slice(begin, begin + len(row["completions"]))
        begin = part.stop
        parts.append(part)
        numbers = {"_score": scores.raw[part].tolist(), "_length": scores.n_tokens[part].tolist()}
        places = {"_place": list(range(part.start, part.stop))}
        pairs += ranking_pairs({**row, **numbers, **places}, "none", Counter())
    if not pairs:
        raise DataError("no completion is ranked above another", "check the column of ranks")
    sides: dict[str, list[Any]] = {
        f"{name}_{side}": [pair.pop(f"{name}_{side}") for pair in pairs]
        for name in ("_score", "_length", "_place")
        for side in ("chosen", "rejected")
    }
    reasons = [
        scores.reasons[a] or scores.reasons[b]
        for a, b in zip(sides["_place_chosen"], sides["_place_rejected"], strict=True)
    ]
    gone = np.array([reason is not None for reason in reasons], dtype=bool)
    columns = [np.array(values, dtype=np.float64) for values in list(sides.values())[:4]]
    for column in columns[:2]:
        column[gone] = np.nan
    result = scored_pairs(
        scorer,
        pairs,
        PairScores(columns[0], columns[1], columns[2], columns[3], reasons),
        temperature=temperature,
        info=info,
        seed=seed,
    )
    result.metrics["rankings"] = _picks(
        rows, [scores.raw[p] for p in parts], [scores.n_tokens[p] for p in parts], seed
    )
    return result


def _shared(row: Mapping[str, Any]) -> dict[str, Any]:
    own = ("completions", "ranks", "ratings", "rewards")
    return {key: value for key, value in row.items() if key not in own}


def _places(row: Mapping[str, Any]) -> range:
    return range(len(row["completions"]))


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
