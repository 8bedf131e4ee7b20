"""``train_process``: solutions with labelled steps in, a saved process model out. Chapter 3."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from companion.errors import DataError
from companion.evaluation import format_table
from companion.losses import IGNORE_INDEX
from companion.models.token_readout import TokenReadout
from companion.token_metrics import fit_threshold, process_metrics
from companion.training.config import ModelArguments, RowArguments
from companion.training.process import ProcessRewardConfig, ProcessRewardTrainer, format_steps
from companion.training.stages import RowKind, Run, Say, start_run
from companion.training.token_run import TokenTrainingResult, finish_token, load_start, shown

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
    rows = run.formatted["held_out"]
    trainer = ProcessRewardTrainer(
        run.reward_model.model,
        config,
        train_dataset=run.formatted["train"],
        eval_dataset=rows.select(run.calibration_rows),
        formatter=run.reward_model.formatter,
        processing_class=run.reward_model.tokenizer,
        callbacks=callbacks,
    )
    output = trainer.train(resume_from_checkpoint=run.resume)
    predictions: Any = trainer.predict(rows, metric_key_prefix="held_out").predictions
    readout = TokenReadout(
        "process",
        labels,
        config.aggregation,  # type: ignore[arg-type]
        separator=config.step_separator,
        step_score=config.step_score,
        chat=config.as_chat,
    )
    calibration, _, _ = _labelled(run, predictions, run.calibration_rows, readout)
    threshold = fit_threshold(calibration)
    readout = TokenReadout(**{**vars(readout), "threshold": threshold})
    metrics: dict[str, Any] = {}
    if config.process_index == 0:
        solutions, right, classes = _labelled(run, predictions, run.test_rows, readout)
        metrics = process_metrics(
            solutions, threshold=threshold, right=right, labels=classes, truth=_truth(run)
        )
    return finish_token(run, trainer, output.metrics, readout, metrics)


def _labelled(
    run: Run, predictions: Array, places: Sequence[int], readout: TokenReadout
) -> tuple[list[tuple[Array, Array]], list[Array], list[Array]]:
    """Of the labelled steps of some rows: P(wrong) and whether wrong; whether right; class."""
    solutions, right, classes = [], [], []
    for place, targets in zip(
        places, run.formatted["held_out"].select(places)["targets"], strict=True
    ):
        target = np.asarray(targets, dtype=np.float64)
        kept = target != IGNORE_INDEX
        if not kept.any():
            raise DataError("a tokenised row has no label", "format the rows anew")
        logits = predictions[place].reshape(-1, readout.labels)[: len(target)][kept]
        target = target[kept]
        tensor = torch.from_numpy(logits.astype(np.float64))
        probabilities = readout.wrong(tensor).numpy()
        if readout.labels == 3:
            solutions.append((probabilities, (target == 0).astype(np.float64)))
            right.append((logits.argmax(axis=1) == target).astype(np.float64))
            classes.append(target)
        else:
            solutions.append((probabilities, (target <= 0.5).astype(np.float64)))
            right.append(((logits[:, 0] > 0) == (target > 0.5)).astype(np.float64))
            classes.append((target > 0.5).astype(np.float64))
    return solutions, right, classes


def _truth(run: Run) -> list[Array] | None:
    """Which labelled steps of the test rows are really wrong; the tutor's rows know."""
    given = run.sets.held_out
    if "true_labels" not in given.column_names:
        return None
    rows = run.formatted["held_out"].select(run.test_rows)
    found = []
    for row, targets in zip(rows["row"], rows["targets"], strict=True):
        wrong = np.asarray([label == -1 for label in given[row]["true_labels"]], dtype=np.float64)
        found.append(wrong[np.asarray(targets) != IGNORE_INDEX])
    return found


def summary(result: TokenTrainingResult) -> str:
    """The table that ends a run."""
    figures = result.metrics
    first, at_half = figures["first_error"], figures["first_error_at_half"]
    rows = [
        (
            "first-error F1",
            *(shown(x) for x in (first["first_error_f1"], figures["guessing_f1"])),
            shown(figures["limit_f1"]),
        ),
        ("  solutions with an error", shown(first["accuracy_on_errors"]), "–", "–"),
        ("  solutions without", shown(first["accuracy_on_right"]), "–", "–"),
        ("step accuracy", shown(figures["step_accuracy"]), shown(figures["majority"]), "–"),
        ("AUC of wrong steps", shown(figures["wrong_auc"]), "0.500", "–"),
    ]
    return "\n".join(
        [
            format_table(("held-out figure", "ours", "floor", "best possible"), rows),
            "",
            f"{figures['n']:,} solutions ({first['n_errors']:,} with an error), "
            f"{figures['n_steps']:,} labelled steps; a step is wrong if P(wrong) > "
            f"{figures['threshold']:.3f}, fitted on other rows (F1 at 0.5: "
            f"{shown(at_half['first_error_f1'])})",
            "floors: guessing at the best rate for the F1, the most frequent label for the steps",
            f"saved in {result.output_dir}",
        ]
    )
