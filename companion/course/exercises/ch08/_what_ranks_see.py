"""Predict what ranks see and what their gradient becomes, then run."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from companion.course.exercise import Prediction, Question

Array = np.ndarray[Any, np.dtype[np.float64]]


def by_accelerate(pairs: int, batch: int, ranks: int) -> list[list[list[int]]]:
    """Of each rank, the batches of row numbers that accelerate deals out to it."""
    with warnings.catch_warnings():  # of its progress bar, in a notebook
        warnings.simplefilter("ignore")
        from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    sampler = BatchSampler(SequentialSampler(range(pairs)), batch, drop_last=False)
    return [list(BatchSamplerShard(sampler, ranks, rank)) for rank in range(ranks)]


def step_weights(micro_batches: list[list[int]], pairs: int) -> Array:
    """Weight of each pair in a step that averages the means of its micro-batches."""
    weights = np.zeros(pairs)
    for rows in micro_batches:
        for row in rows:
            weights[row] += 1 / len(rows) / len(micro_batches)
    return weights


def by_ddp(own_sums: list[float], divisor: float) -> float:
    """What DDP makes of the ranks' sums over a divisor: it takes the mean over ranks."""
    return float(np.mean([total / divisor for total in own_sums]))


def run() -> dict[str, Any]:
    """Compute all four."""
    rows = [row for rank in by_accelerate(9, 4, 2) for batch in rank for row in batch]
    weights = step_weights([[0, 1, 2, 3], [4]], 5)
    gradients = np.random.default_rng(0).normal(1, 1, (2, 8))
    sums = [float(own.sum()) for own in gradients]
    ratio = by_ddp(sums, gradients.size) / float(gradients.mean())
    squares = np.arange(300.0) ** 2
    right = np.isclose(np.mean([own.mean() for own in np.split(squares, 3)]), squares.mean())
    return {
        "9 pairs, 2 ranks, batches of 4": f"{len(rows)} pairs",
        "the fifth of 5 pairs, batches of 4": f"{round(weights[4] / weights[0])} times",
        "sums over the pairs of all ranks": {0.5: "half", 1.0: "right", 2.0: "twice"}[
            round(ratio, 6)
        ],
        "shards of 100, 100, 100": "the mean of all" if right else "another number",
    }


EXERCISE = Prediction(
    id="ch08.what_ranks_see",
    run=run,
    questions=(
        Question(
            "9 pairs, 2 ranks, batches of 4",
            ("9 pairs", "10 pairs", "16 pairs"),
            {
                "9 pairs": "Each pair is taken to be seen once. Ranks have to keep in step, so "
                "accelerate fills the last batches up with pairs from the beginning.",
                "10 pairs": "The set is taken to be filled up to a multiple of the ranks. It is "
                "filled up to whole batches on all ranks.",
            },
            "accelerate #2316",
        ),
        Question(
            "the fifth of 5 pairs, batches of 4",
            ("1 times", "4 times", "5 times"),
            {
                "1 times": "Accumulation is taken to average over pairs. It averages means, and "
                "the fifth pair is a mean by itself.",
                "5 times": "The fifth pair is compared with the whole step. It has half of the "
                "weight, and the other half is shared by four.",
            },
            "trl #4104",
        ),
        Question(
            "sums over the pairs of all ranks",
            ("half", "right", "twice"),
            {
                "right": "DDP is taken to add gradients up. It averages them, so what was divided "
                "by the pairs of all ranks is divided by the ranks once more.",
                "twice": "DDP is taken to add gradients that were means already. They were "
                "divided by the pairs of all ranks, and DDP divides again.",
            },
            "fairseq #494",
        ),
        Question(
            "shards of 100, 100, 100",
            ("the mean of all", "another number"),
            {
                "another number": "The mean of means is taken to be wrong always. With equal "
                "shards it is right, which is why nobody sees the bug in a small trial.",
            },
        ),
    ),
    hints=(
        "For each, write down the weight of a single pair.",
        "Ranks must take the same number of steps with full batches; a mean of means gives each "
        "mean the same weight; DDP averages over ranks.",
        "Two ranks with two batches of 4 each are 16 places. Half of the step belongs to the "
        "second micro-batch, which holds one pair.",
    ),
    right="Two of the four are right by luck of the sizes. A test with equal shards tests nothing.",
)
