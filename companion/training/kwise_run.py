"""``train_kwise``: rankings in, a saved reward model out, with the figures of a pairwise one.

What is held out is measured as the pairs that its rankings hold, so that a K-wise model and one
trained on pairs of the same rankings stand side by side. Chapter 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback

from companion.training.config import ModelArguments, RowArguments
from companion.training.kwise import (
    KwiseRewardConfig,
    KwiseRewardTrainer,
    format_rankings,
    ranked_scores,
)
from companion.training.result import ScoredSet, TrainingResult
from companion.training.run import summary
from companion.training.stages import (
    RowKind,
    Say,
    finish_scalar,
    load_scalar,
    start_run,
    train_and_score,
)

__all__ = ["RANKINGS", "ScoredRankings", "summary", "train_kwise"]

RANKINGS = RowKind("rankings", format_rankings, load_scalar)


def train_kwise(
    config: KwiseRewardConfig,
    model: ModelArguments,
    data: RowArguments,
    *,
    say: Say | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> TrainingResult:
    """Train, calibrate, measure and save a reward model on whole rankings.

    Parameters
    ----------
    config : KwiseRewardConfig
        ``output_dir`` becomes the same plain checkpoint with ``reward_manifest.json`` that
        :func:`companion.training.run.train_pairwise` writes.
    model : ModelArguments
    data : RowArguments
        Rows of the kind ``rankings``, and which to hold out.
    say : callable, optional
        Gets lines of text on rank 0; default: ``print``.
    callbacks : list of TrainerCallback, optional

    Returns
    -------
    TrainingResult
        Its figures are those of the ordered pairs of the held-out rankings.

    Raises
    ------
    CompanionError
        For settings, rows or a base that cannot be used, with the cure.
    """
    run = start_run(RANKINGS, config, model, data, say=say)
    rows = run.formatted["held_out"]
    trainer, train_metrics, predictions = train_and_score(run, KwiseRewardTrainer, callbacks)
    scored = ScoredRankings(run.sets.held_out, rows, ranked_scores(predictions, rows))
    return finish_scalar(run, trainer, train_metrics, scored)


@dataclass
class ScoredRankings:
    """Held-out rankings with a score for each completion.

    Attributes
    ----------
    given, rows : Dataset
        The rankings as loaded, and as tokenised.
    scores : list of ndarray
        Of each tokenised row's completions.
    """

    given: Dataset
    rows: Dataset
    scores: list[np.ndarray]

    def select(self, places: Sequence[int]) -> ScoredSet:
        """The ordered pairs of some of the rankings."""
        pairs: list[dict[str, Any]] = []
        numbers: list[tuple[float, float, int, int]] = []
        for place in places:
            row, scores = self.rows[int(place)], self.scores[place]
            given = self.given[row["row"]]
            gold = given.get("rewards")
            lengths = [len(ids) for ids in row["completion_ids"]]
            for i, j in combinations(range(len(scores)), 2):
                if row["ranks"][i] == row["ranks"][j]:
                    continue
                best, worst = (i, j) if row["ranks"][i] < row["ranks"][j] else (j, i)
                pair = {key: given[key] for key in ("prompt", "subset") if key in given}
                if gold is not None:  # the tutor's truth: gives the limit
                    pair |= {
                        "reward_chosen": gold[row["place"][best]],
                        "reward_rejected": gold[row["place"][worst]],
                    }
                pairs.append(pair)
                numbers.append((scores[best], scores[worst], lengths[best], lengths[worst]))
        columns = np.array(numbers, dtype=np.float64).reshape(-1, 4).T
        return ScoredSet(pairs, columns[0], columns[1], columns[2], columns[3])
