"""``train_process``: solutions with labelled steps in, a saved process model out. Chapter 3."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from transformers import TrainerCallback

from companion.models.readout import TokenReadout
from companion.token_evaluation import LabelledSteps, labelled_steps, token_table, true_errors
from companion.token_metrics import fit_threshold, process_metrics
from companion.training.config import ModelArguments, RowArguments
from companion.training.process import ProcessRewardConfig, ProcessRewardTrainer, format_steps
from companion.training.stages import RowKind, Run, Say, start_run, train_and_score
from companion.training.token_run import TokenTrainingResult, finish_token, load_start, prompts_of

Array = np.ndarray


def train_process(
    config: ProcessRewardConfig,
    model: ModelArguments,
    data: RowArguments,
    *,
    say: Say | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> TokenTrainingResult:
    """Train, measure and save a process reward model.

    Parameters
    ----------
    config : ProcessRewardConfig
        ``output_dir`` becomes a plain token-classification checkpoint with
        ``reward_manifest.json``; :class:`companion.scoring.TokenScorer` loads it.
    model : ModelArguments
    data : RowArguments
        Rows of the kind ``steps``, and which to hold out.
    say : callable, optional
        Gets lines of text on rank 0; default: ``print``.
    callbacks : list of TrainerCallback, optional

    Returns
    -------
    TokenTrainingResult
        Its figures are those of :func:`companion.token_metrics.process_metrics`, on held-out rows
        that were not looked at during training; the threshold of the first error is fitted on the
        others.

    Raises
    ------
    CompanionError
        For settings, rows or a base that cannot be used, with the cure.
    """
    kind = RowKind(
        "steps",
        partial(
            format_steps,
            separator=config.step_separator,
            label_type=config.label_type,
            neutral=config.neutral,
            chat=config.as_chat,
        ),
        lambda config, model: load_start(config, model, labels),
    )
    labels = config.num_labels
    run = start_run(kind, config, model, data, say=say)
    trainer, train_metrics, predictions = train_and_score(run, ProcessRewardTrainer, callbacks)
    readout = TokenReadout(
        "process",
        labels,
        config.aggregation,  # type: ignore[arg-type]
        separator=config.step_separator,
        step_score=config.step_score,
        chat=config.as_chat,
    )
    calibration = _labelled(run, predictions, run.calibration_rows, readout)
    threshold = fit_threshold(calibration.solutions)
    readout = TokenReadout(**{**vars(readout), "threshold": threshold})
    metrics: dict[str, Any] = {}
    if config.process_index == 0:
        test = _labelled(run, predictions, run.test_rows, readout)
        metrics = process_metrics(
            test.solutions,
            threshold=threshold,
            right=test.right,
            labels=test.labels,
            truth=_truth(run),
            groups=prompts_of(run, run.test_rows),
        )
    return finish_token(run, trainer, train_metrics, readout, metrics)


def _labelled(
    run: Run, predictions: Array, places: Sequence[int], readout: TokenReadout
) -> LabelledSteps:
    """The labelled steps of some of the held-out rows, with what the model says of them."""
    targets = list(run.formatted["held_out"].select(places)["targets"])
    logits = [
        predictions[place].reshape(-1, readout.labels)[: len(target)]
        for place, target in zip(places, targets, strict=True)
    ]
    return labelled_steps(logits, targets, readout)


def _truth(run: Run) -> list[Array] | None:
    """Which labelled steps of the test rows are really wrong; the tutor's rows know."""
    given = run.sets.held_out
    if "true_labels" not in given.column_names:
        return None
    rows = run.formatted["held_out"].select(run.test_rows)
    return [
        true_errors(given[row]["true_labels"], targets)
        for row, targets in zip(rows["row"], rows["targets"], strict=True)
    ]


def summary(result: TokenTrainingResult) -> str:
    """The table that ends a run."""
    return f"{token_table(result.metrics)}\nsaved in {result.output_dir}"
