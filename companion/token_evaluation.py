"""An outcome or process model on held-out rows: figures, each beside its floors.

What ``companion evaluate`` says of a token-level model, and the tables that end its training.
Chapter 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from companion.data.splits import prompt_key
from companion.errors import DataError
from companion.evaluation import Figures
from companion.labels import step_target
from companion.losses import IGNORE_INDEX
from companion.models.readout import TokenReadout
from companion.reduction import How, aggregate
from companion.resampling import Array
from companion.scoring import Scorer, TokenScores
from companion.tables import format_table, interval, number
from companion.token_metrics import outcome_metrics, process_metrics

#: kind of model -> kind of the rows that it is evaluated on
ROWS = {"outcome": "outcomes", "process": "steps"}
#: aggregates of which every evaluation of an outcome model gives the AUC
AGGREGATES: tuple[How, ...] = ("mean", "min", "log_product", "last")
_UNLABELLED = "no step has a label"


class LabelledSteps(NamedTuple):
    """Of each solution its labelled steps, for :func:`companion.token_metrics.process_metrics`.

    Attributes
    ----------
    solutions : list of (ndarray, ndarray)
        P(wrong), and 1 where the step is wrong.
    right : list of ndarray
        1 where the most likely class is that of the label.
    labels : list of ndarray
        The classes; with one logit 1 for good and 0 for bad.
    """

    solutions: list[tuple[Array, Array]]
    right: list[Array]
    labels: list[Array]


def labelled_steps(
    logits: Sequence[Array], targets: Sequence[Sequence[float]], readout: TokenReadout
) -> LabelledSteps:
    """Set predictions of steps beside their labels. Chapter 3.

    Parameters
    ----------
    logits : sequence of arrays ``[S, labels]``
        Of all steps of each solution.
    targets : sequence of sequences of float
        Of each step a class (three labels) or the probability that it is good, or -100
        (:func:`companion.labels.step_target`).
    readout : TokenReadout

    Raises
    ------
    DataError
        If a solution has no labelled step.
    """
    found = LabelledSteps([], [], [])
    for own, given in zip(logits, targets, strict=True):
        target = np.asarray(given, dtype=np.float64)
        kept = target != IGNORE_INDEX
        if not kept.any():
            raise DataError(f"a solution's steps have no label at all ({len(target)} steps)")
        values = own[kept].astype(np.float64)
        probabilities = readout.wrong(torch.from_numpy(values)).numpy()
        if readout.labels == 3:
            label, guess, bad = target[kept], values.argmax(axis=1), target[kept] == 0
        else:
            label = (target[kept] > 0.5).astype(np.float64)
            guess, bad = values[:, 0] > 0, label == 0
        found.solutions.append((probabilities, bad.astype(np.float64)))
        found.right.append((guess == label).astype(np.float64))
        found.labels.append(label)
    return found


@dataclass
class TokenEvaluation(Figures):
    """Figures of an outcome or process model, and what they were computed from.

    Attributes
    ----------
    metrics : dict
        As :func:`companion.token_metrics.outcome_metrics` or
        :func:`companion.token_metrics.process_metrics` return them, with ``kind``, ``n_rows`` and
        ``dropped`` {total, reasons}.
    scores : TokenScores
        Of all rows.
    rows : list of dict
    info : dict
        What was evaluated on what.
    """

    metrics: dict[str, Any]
    scores: TokenScores
    rows: list[dict[str, Any]]
    info: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """Return the figures as text."""
        return token_table(self.metrics)


def evaluate_tokens(
    scorer: Scorer[Any],
    dataset: Iterable[Mapping[str, Any]],
    *,
    info: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
) -> TokenEvaluation:
    """Score held-out rows with an outcome or process model and compute every figure. Chapter 3.

    Parameters
    ----------
    scorer : Scorer
        Of an outcome or process model, here or on a server.
        The threshold of the first error is that of its manifest: none is fitted here.
    dataset : iterable of mappings
        Rows of the kind ``outcomes`` for an outcome model, ``steps`` for a process model. A column
        ``correct`` or ``true_labels``, the truth behind noisy labels, gives the limit.
    info : mapping, optional
        What goes into the result's ``info``.
    progress : callable, optional
        Called with the number of texts scored since the last call.
    seed : int, default 0
        Of the bootstrap and the band.

    Raises
    ------
    DataError
        If there is no row, or none can be scored, or a label does not fit the model.
    """
    rows = [dict(row) for row in dataset]
    if not isinstance(scorer.readout, TokenReadout):
        raise DataError("the model has one score a text", "evaluate it on pairs or rankings")
    kind = scorer.readout.kind
    if not rows:
        raise DataError(f"there are no {ROWS[kind]} to evaluate on", "check the split and limit")
    targets = _targets(rows, scorer.readout)
    scores = scorer.score(rows, progress=progress)
    reasons = [
        reason or (None if kind == "outcome" or _any_label(target) else _UNLABELLED)
        for reason, target in zip(scores.reasons, targets, strict=True)
    ]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    lost = Counter(reason for reason in reasons if reason is not None)
    if not kept:
        listing = ", ".join(f"{count} × {reason}" for reason, count in lost.most_common())
        raise DataError(f"none of the {len(rows)} {ROWS[kind]} can be used: {listing}")
    figures = _outcome_figures if kind == "outcome" else _step_figures
    metrics = {
        "kind": kind,
        "n_rows": len(rows),
        "dropped": {"total": len(rows) - len(kept), "reasons": dict(lost.most_common())},
        **figures(rows, scores, targets, kept, seed),
    }
    return TokenEvaluation(metrics, scores, rows, dict(info or {}))


def _any_label(target: Sequence[float]) -> bool:
    return any(value != IGNORE_INDEX for value in target)


def _targets(rows: Sequence[Mapping[str, Any]], readout: TokenReadout) -> list[list[float]]:
    """Each row's labels as numbers: one outcome, or one target a step."""
    if readout.kind == "outcome":
        for i, row in enumerate(rows):
            if row.get("label") not in (0, 1):  # bools are
                raise DataError(f"row {i}, field 'label': {row.get('label')!r}", "true or false")
        return [[float(row["label"])] for row in rows]
    label_type = "three"
    if readout.labels == 1:
        soft = any(isinstance(x, float) and x == x for row in rows for x in row["labels"])
        label_type = "soft" if soft else "binary"
    found = []
    for i, row in enumerate(rows):
        if len(row["labels"]) != len(row["completions"]):
            raise DataError(
                f"row {i}: {len(row['completions'])} steps but {len(row['labels'])} labels"
            )
        found.append(
            [
                step_target(label, label_type, "good", f"row {i}, labels[{k}]")
                for k, label in enumerate(row["labels"])
            ]
        )
    return found


def _groups(rows: Sequence[Mapping[str, Any]], kept: Sequence[int]) -> list[str]:
    return [prompt_key(rows[i]) for i in kept]


def _outcome_figures(
    rows: Sequence[Mapping[str, Any]],
    scores: TokenScores,
    targets: Sequence[Sequence[float]],
    kept: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    how = scores.readout.aggregation
    aggregates: dict[str, Any] = {name: np.empty(len(kept)) for name in AGGREGATES}
    for place, i in enumerate(kept):
        values = torch.from_numpy(np.asarray(scores.values[i]))[None]
        mask = torch.ones_like(values, dtype=torch.bool)
        for name in AGGREGATES:
            aggregates[name][place] = float(aggregate(values, mask, name))
    aggregates["product"] = np.exp(aggregates["log_product"])
    truth = None
    if all(row.get("correct") is not None for row in rows):
        truth = np.array([float(rows[i]["correct"]) for i in kept])
    return outcome_metrics(
        aggregates,
        np.array([targets[i][0] for i in kept]),
        how=how,
        lengths=scores.n_tokens[list(kept)].astype(np.float64),
        groups=_groups(rows, kept),
        truth=truth,
        seed=seed,
    )


def _step_figures(
    rows: Sequence[Mapping[str, Any]],
    scores: TokenScores,
    targets: Sequence[Sequence[float]],
    kept: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    logits = [np.asarray(scores.logits[i]) for i in kept]
    labelled = labelled_steps(logits, [targets[i] for i in kept], scores.readout)
    truth = None
    if all(row.get("true_labels") is not None for row in rows):
        truth = [true_errors(rows[i]["true_labels"], targets[i]) for i in kept]
    return process_metrics(
        labelled.solutions,
        threshold=scores.readout.threshold,
        right=labelled.right,
        labels=labelled.labels,
        truth=truth,
        groups=_groups(rows, kept),
        seed=seed,
    )


def true_errors(true_labels: Sequence[Any], targets: Sequence[float]) -> Array:
    """1 where a labelled step is really wrong, by the truth behind its label."""
    wrong = np.asarray([label == -1 for label in true_labels], dtype=np.float64)
    return wrong[np.asarray(targets) != IGNORE_INDEX]


# ---------------------------------------------------------------------- tables

_HEAD = ("held-out figure [95%]", "ours", "floor", "best possible")


def token_table(figures: Mapping[str, Any]) -> str:
    """The figures of an outcome or process model as text, with what they stand beside."""
    lines = _outcome_table(figures) if "auc" in figures else _process_table(figures)
    dropped = figures.get("dropped", {"total": 0})["total"]
    if dropped:
        lines.append(f"{dropped:,} of {figures['n_rows']:,} rows left out")
    return "\n".join(lines)


def _outcome_table(figures: Mapping[str, Any]) -> list[str]:
    by = figures["auc_by_aggregation"]
    auc = number(figures["auc"]) + interval(figures["auc_interval"])
    accuracy = number(figures["accuracy"]) + interval(figures["accuracy_interval"])
    rows = [
        ("AUC", auc, number(figures["length_auc"]), number(figures["limit_auc"])),
        ("accuracy at 0.5", accuracy, number(figures["majority"]), "–"),
        ("log loss, nats", number(figures["loss"]), "–", "–"),
        *_probability_rows(figures),
    ]
    lines = [
        format_table(_HEAD, rows),
        "",
        f"{figures['n']:,} texts, score = {figures['aggregation']} of the probabilities",
        "AUC by aggregation: " + ", ".join(f"{how} {number(value)}" for how, value in by.items()),
        "floors: the length for the AUC, the more frequent answer for the accuracy",
    ]
    if figures["auc"] is not None and figures["auc"] <= figures["length_auc"]:
        lines.append("the model does not beat the length")
    return lines


def _process_table(figures: Mapping[str, Any]) -> list[str]:
    first, at_half = figures["first_error"], figures["first_error_at_half"]
    f1 = number(first["first_error_f1"]) + interval(figures["first_error_interval"])
    steps = number(figures["step_accuracy"]) + interval(figures["step_accuracy_interval"])
    auc = number(figures["wrong_auc"]) + interval(figures["wrong_auc_interval"])
    rows = [
        ("first-error F1", f1, number(figures["guessing_f1"]), number(figures["limit_f1"])),
        ("  solutions with an error", number(first["accuracy_on_errors"]), "–", "–"),
        ("  solutions without", number(first["accuracy_on_right"]), "–", "–"),
        ("step accuracy", steps, number(figures["majority"]), "–"),
        ("AUC of wrong steps", auc, number(figures["position_auc"]), "–"),
        *_probability_rows(figures),
    ]
    return [
        format_table(_HEAD, rows),
        "",
        f"{figures['n']:,} solutions ({first['n_errors']:,} with an error), "
        f"{figures['n_steps']:,} labelled steps; a step is wrong if P(wrong) > "
        f"{figures['threshold']:.3f}, fitted on other rows (F1 at 0.5: "
        f"{number(at_half['first_error_f1'])})",
        "floors: guessing at the best rate for the F1, the most frequent label for the steps, the "
        "step's number for the AUC",
    ]


def _probability_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    band = figures["ece_band"]
    return [
        ("Brier score", number(figures["brier"]) + interval(figures["brier_interval"]), "–", "–"),
        (
            "calibration error",
            number(figures["ece"]),
            "–",
            "–" if band is None else "calibrated" + interval(band),
        ),
    ]
