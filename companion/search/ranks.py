"""What a file of ranks says: its figures, and the rows for fine-tuning and pairs. Chapter 5."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from companion.formatting.conversation import has_text
from companion.resampling import Interval, bootstrap_interval


@dataclass
class RankReport:
    """What :func:`companion.search.ranking.rank_file` did.

    Attributes
    ----------
    rows, resumed_at, failed : int
        Rows of the input, rows that earlier runs had done, and rows without a ranking.
    candidates, without_score, cut_off : int
        Completions; those without a score; those that were cut off.
    tied : int
        Prompts of which several completions are best; the first of them is taken.
    not_written : int
        Prompts that have no finished completion with a score, and so no row for fine-tuning.
    best, pairs : int
        Rows written for fine-tuning, and pairs.
    score_best, score_mean : float
        Mean score of the best completions, and of all.
    kl_bound, kl_measured : float
        Mean over prompts of :func:`companion.selection.best_of_n_kl` and of
        :func:`companion.selection.measured_best_of_n_kl`, in nats.
    kl_interval : companion.resampling.Interval
        95% bootstrap interval over prompts of the measured one.
    """

    rows: int
    resumed_at: int
    failed: int = 0
    candidates: int = 0
    without_score: int = 0
    cut_off: int = 0
    tied: int = 0
    not_written: int = 0
    best: int = 0
    pairs: int = 0
    score_best: float = float("nan")
    score_mean: float = float("nan")
    kl_bound: float = float("nan")
    kl_measured: float = float("nan")
    kl_interval: Interval | None = None


def _ranked(ranks: Path) -> Iterator[dict[str, Any]]:
    with open(ranks, encoding="utf-8") as file:
        yield from map(json.loads, file)


def _finished(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Completions that may be trained on, best first."""
    return [
        item
        for item in record.get("completions", [])
        if item["terminated"] and item["score"] is not None and _says_something(item["completion"])
    ]


def _says_something(completion: Any) -> bool:
    return has_text(completion if isinstance(completion, str) else completion[-1].get("content"))


def measure_ranks(ranks: Path, report: RankReport) -> None:
    """Fill in the counts and means of a file of ranks."""
    best, every, bounds, measured = [], [], [], []
    for record in _ranked(ranks):
        if "error" in record:
            report.failed += 1
            continue
        items = record["completions"]
        report.candidates += len(items)
        report.without_score += sum(item["score"] is None for item in items)
        report.cut_off += sum(not item["terminated"] for item in items)
        report.tied += record["n_tied"] > 1
        report.not_written += not _finished(record)
        scores = [item["score"] for item in items if item["score"] is not None]
        best.append(scores[0])
        every += scores
        bounds.append(record["kl_bound"])
        measured.append(record["kl_measured"])
    if best:
        report.score_best, report.score_mean = float(np.mean(best)), float(np.mean(every))
        report.kl_bound, report.kl_measured = float(np.mean(bounds)), float(np.mean(measured))
        report.kl_interval = bootstrap_interval(measured)


def _as_written(prompt: Any, completion: Any) -> Any:
    """Behind messages come messages."""
    if isinstance(completion, str) and not isinstance(prompt, str):
        return [{"role": "assistant", "content": completion}]
    return completion


def best_rows(ranks: Path, top_k: int) -> Iterator[dict[str, Any]]:
    """The best finished completions of each prompt, as ``prompt`` and ``completion``."""
    for record in _ranked(ranks):
        for item in _finished(record)[:top_k]:
            prompt = record["prompt"]
            yield {"prompt": prompt, "completion": _as_written(prompt, item["completion"])}


def pair_rows(ranks: Path) -> Iterator[dict[str, Any]]:
    """Best and worst finished completion of each prompt, as ``chosen`` and ``rejected``."""
    for record in _ranked(ranks):
        items = _finished(record)
        if items and items[0]["score"] > items[-1]["score"]:
            prompt = record["prompt"]
            yield {
                "prompt": prompt,
                "chosen": _as_written(prompt, items[0]["completion"]),
                "rejected": _as_written(prompt, items[-1]["completion"]),
            }
