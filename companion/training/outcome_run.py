"""``train_outcome``: solutions that are right or wrong in, a saved outcome model out. Chapter 3."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from transformers import TrainerCallback

from companion.models.readout import TokenReadout
from companion.token_evaluation import token_table
from companion.token_metrics import outcome_metrics
from companion.training.config import ModelArguments, RowArguments
from companion.training.outcome import (
    MEASURED,
    OutcomeRewardConfig,
    OutcomeRewardTrainer,
    format_outcomes,
)
from companion.training.stages import RowKind, Run, Say, start_run, train_and_score
from companion.training.token_run import (
    TokenTrainingResult,
    finish_token,
    load_start,
    prompts_of,
)


def train_outcome(
    config: OutcomeRewardConfig,
    model: ModelArguments,
    data: RowArguments,
    *,
    say: Say | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> TokenTrainingResult:
    """Train, measure and save an outcome reward model.

    Parameters
    ----------
    config : OutcomeRewardConfig
        ``output_dir`` becomes a plain token-classification checkpoint with
        ``reward_manifest.json``; :class:`companion.scoring.TokenScorer` loads it.
    model : ModelArguments
    data : RowArguments
        Rows of the kind ``outcomes``, and which to hold out.
    say : callable, optional
        Gets lines of text on rank 0; default: ``print``.
    callbacks : list of TrainerCallback, optional

    Returns
    -------
    TokenTrainingResult
        Its figures are those of :func:`companion.token_metrics.outcome_metrics`, on held-out rows
        that were not looked at during training.

    Raises
    ------
    CompanionError
        For settings, rows or a base that cannot be used, with the cure.
    """
    kind = RowKind(
        "outcomes",
        partial(format_outcomes, chat=config.as_chat),
        lambda config, model: load_start(config, model, 1),
    )
    run = start_run(kind, config, model, data, say=say)
    trainer, train_metrics, predictions = train_and_score(run, OutcomeRewardTrainer, callbacks)
    metrics = _figures(run, config, predictions) if config.process_index == 0 else {}
    readout = TokenReadout("outcome", 1, config.aggregation, chat=config.as_chat)  # type: ignore[arg-type]
    return finish_token(run, trainer, train_metrics, readout, metrics)


def _figures(run: Run, config: OutcomeRewardConfig, predictions: np.ndarray) -> dict[str, Any]:
    places = np.asarray(run.test_rows)
    rows = run.formatted["held_out"].select(places)
    table = predictions[places].astype(np.float64)
    aggregates: dict[str, np.ndarray] = {how: table[:, i] for i, how in enumerate(MEASURED)}
    aggregates["product"] = np.exp(aggregates["log_product"])
    given = run.sets.held_out
    truth = None
    if "correct" in given.column_names:  # the tutor knows what is right behind the noise
        truth = np.array([float(given[i]["correct"]) for i in rows["row"]])
    return outcome_metrics(
        aggregates,
        np.asarray(rows["label"][:], dtype=np.float64),
        how=config.aggregation,
        lengths=np.asarray(rows["length"][:], dtype=np.float64),
        groups=prompts_of(run, run.test_rows),
        truth=truth,
    )


def summary(result: TokenTrainingResult) -> str:
    """The table that ends a run."""
    return f"{token_table(result.metrics)}\nsaved in {result.output_dir}"
