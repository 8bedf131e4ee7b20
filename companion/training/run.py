"""``train_pairwise``: rows in, a saved reward model with honest figures out (Chapter 4).

The order of things: load and check the rows; hold out whole prompts; tokenise; train; on a part of
the held-out pairs fit the temperature and take the reference statistics; on the others, which
nothing was chosen by, compute the figures; save all of it as one checkpoint.
"""

from __future__ import annotations

from transformers import TrainerCallback

from companion.evaluation import format_table, summary_rows
from companion.training.config import DataArguments, ModelArguments, PairwiseRewardConfig
from companion.training.pairwise import PairwiseRewardTrainer
from companion.training.result import TrainingResult, scored_set
from companion.training.rows import format_pairs
from companion.training.stages import (
    RowKind,
    Say,
    finish_scalar,
    load_scalar,
    start_run,
    train_and_score,
)

PAIRS = RowKind("pairs", format_pairs, load_scalar)


def train_pairwise(
    config: PairwiseRewardConfig,
    model: ModelArguments,
    data: DataArguments,
    *,
    say: Say | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> TrainingResult:
    """Train, calibrate, measure and save a Bradley–Terry reward model.

    Parameters
    ----------
    config : PairwiseRewardConfig
        ``output_dir`` becomes a plain Hugging Face checkpoint with ``reward_manifest.json``;
        training checkpoints lie in it as ``checkpoint-N``.
    model : ModelArguments
        The base, and whether to train a LoRA adapter.
    data : DataArguments
        The pairs, and which to hold out.
    say : callable, optional
        Gets lines of text on rank 0; default: ``print``.
    callbacks : list of TrainerCallback, optional

    Returns
    -------
    TrainingResult

    Raises
    ------
    CompanionError
        For settings, rows or a base that cannot be used, with the cure.
    """
    run = start_run(PAIRS, config, model, data, say=say)
    trainer, train_metrics, predictions = train_and_score(run, PairwiseRewardTrainer, callbacks)
    scored = scored_set(run.sets.held_out, run.formatted["held_out"], predictions)
    return finish_scalar(run, trainer, train_metrics, scored)


def summary(result: TrainingResult) -> str:
    """The table that ends a run."""
    figures = result.metrics
    lines = [
        format_table(("held-out figure", "ours", "best possible"), summary_rows(figures)),
        "",
        f"temperature {result.temperature:.3f}, fitted on {len(result.calibration):,} pairs",
    ]
    floor = figures.get("longer_wins")
    if floor:
        better = figures["accuracy"] > floor["accuracy"]
        lines.append(
            f"{figures['n']:,} pairs: accuracy {figures['accuracy']:.3f}; preferring the longer "
            f"text is right in {floor['accuracy']:.3f}"
            + ("" if better else ": the model does not beat that floor")
        )
    lines.append(f"saved in {result.output_dir}")
    return "\n".join(lines)
