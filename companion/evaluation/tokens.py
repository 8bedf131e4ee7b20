"""An outcome or process model on held-out rows: figures, each beside its floors.

What ``companion evaluate`` says of a token-level model, and the tables that end its training.
Chapter 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch

from companion.data.splits import prompt_key
from companion.errors import DataError
from companion.evaluation.evaluation import FEWEST_TO_FIT, Evaluation
from companion.evaluation.tables import format_table, interval, number
from companion.evaluation.token_metrics import fit_threshold, outcome_metrics, process_metrics
from companion.functional.labels import step_target
from companion.functional.losses import IGNORE_INDEX
from companion.functional.reduction import How, aggregate
from companion.functional.resampling import Array
from companion.models.manifest import RewardManifest
from companion.models.readout import TokenReadout

if TYPE_CHECKING:
    from companion.scoring import Scorer
    from companion.scoring.scorer import OnError

#: kind of model -> kind of the rows that it is evaluated on
ROWS = {"outcome": "outcomes", "process": "steps"}
#: aggregates of which every evaluation of an outcome model gives the AUC
AGGREGATES: tuple[How, ...] = ("mean", "min", "log_product", "last")
_UNLABELLED = "no step has a label"
_HEAD = ("held-out figure [95%]", "ours", "floor", "best possible")


class LabelledSteps(NamedTuple):
    """Of each solution its labelled steps, as ``process_metrics`` wants them.

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


@dataclass
class TokenEvaluation(Evaluation):
    """Rows with what an outcome or process model says of them, and the figures.

    Attributes
    ----------
    rows : list of dict
        With their labels, and optionally the truth behind noisy ones, which gives the limit.
    reasons : list of str or None
        Why a row does not count.
    readout : TokenReadout
    seed : int
        Of the bootstrap and the band.
    info, metrics : dict
        As in :class:`companion.evaluation.Evaluation`; the figures are those of
        :func:`companion.evaluation.outcome_metrics` or
        :func:`companion.evaluation.process_metrics`, with ``kind``, ``n_rows`` and
        ``dropped`` {total, reasons}.
    """

    rows: list[Mapping[str, Any]]
    reasons: list[str | None]
    readout: TokenReadout
    seed: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> list[int]:
        """The rows that count."""
        return [i for i, reason in enumerate(self.reasons) if reason is None]

    def __len__(self) -> int:
        return len(self.kept)

    def measure(self) -> Self:
        """Compute every figure."""
        lost = Counter(reason for reason in self.reasons if reason is not None)
        if not self.kept:
            listing = ", ".join(f"{count} × {reason}" for reason, count in lost.most_common())
            rows = ROWS[self.readout.kind]
            raise DataError(f"none of the {len(self.rows)} {rows} can be used: {listing}")
        self.metrics = {
            "kind": self.readout.kind,
            "n_rows": len(self.rows),
            "dropped": {"total": lost.total(), "reasons": dict(lost.most_common())},
            **self._figures(),
        }
        return self

    def _figures(self) -> dict[str, Any]:
        raise NotImplementedError

    def _of_kept(self, column: str) -> list[Any] | None:
        """A column of the rows that count; None if it is missing anywhere."""
        if any(row.get(column) is None for row in self.rows):
            return None
        return [self.rows[i][column] for i in self.kept]

    def _prompts(self) -> list[str]:
        return [prompt_key(self.rows[i]) for i in self.kept]

    def table(self) -> str:
        """Return the figures as text, with what they stand beside."""
        lines = self._table()
        dropped = self.metrics["dropped"]["total"]
        if dropped:
            lines.append(f"{dropped:,} of {self.metrics['n_rows']:,} rows left out")
        return "\n".join(lines)

    def _table(self) -> list[str]:
        raise NotImplementedError


@dataclass
class OutcomeEvaluation(TokenEvaluation):
    """As :class:`TokenEvaluation`, of an outcome model.

    Attributes
    ----------
    aggregates : dict of str to ndarray ``[n_rows]``
        Those of :data:`AGGREGATES` of each text's probabilities.
    lengths : ndarray ``[n_rows]``
        Tokens of each text.
    """

    aggregates: dict[str, Array] = field(default_factory=dict)
    lengths: Array = field(default_factory=lambda: np.zeros(0))

    def _figures(self) -> dict[str, Any]:
        kept = self.kept
        aggregates = {how: values[kept] for how, values in self.aggregates.items()}
        aggregates["product"] = np.exp(aggregates["log_product"])
        truth = self._of_kept("correct")
        return outcome_metrics(
            aggregates,
            np.array([float(self.rows[i]["label"]) for i in kept]),
            how=self.readout.aggregation,
            lengths=self.lengths[kept].astype(np.float64),
            groups=self._prompts(),
            truth=None if truth is None else np.array(truth, dtype=np.float64),
            seed=self.seed,
        )

    def _table(self) -> list[str]:
        figures = self.metrics
        by = figures["auc_by_aggregation"]
        auc = number(figures["auc"], figures["auc_interval"])
        accuracy = number(figures["accuracy"], figures["accuracy_interval"])
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
            "AUC by aggregation: "
            + ", ".join(f"{how} {number(value)}" for how, value in by.items()),
            "floors: the length for the AUC, the more frequent answer for the accuracy",
        ]
        if figures["auc"] is not None and figures["auc"] <= figures["length_auc"]:
            lines.append("the model does not beat the length")
        return lines


@dataclass
class StepEvaluation(TokenEvaluation):
    """As :class:`TokenEvaluation`, of a process model.

    Attributes
    ----------
    logits : list of (ndarray ``[S, labels]`` or None)
        Of all steps of each solution.
    targets : list of list of float
        Of each step a class (three labels) or the probability that it is good, or -100: what
        :func:`step_targets` makes of the labels.
    """

    logits: Sequence[Array | None] = ()
    targets: Sequence[Sequence[float]] = ()

    def __post_init__(self) -> None:
        self.reasons = [
            reason or (None if any(x != IGNORE_INDEX for x in target) else _UNLABELLED)
            for reason, target in zip(self.reasons, self.targets, strict=True)
        ]

    def _labelled(self) -> LabelledSteps:
        found = LabelledSteps([], [], [])
        for i in self.kept:
            target = np.asarray(self.targets[i], dtype=np.float64)
            has_label = target != IGNORE_INDEX
            label = target[has_label]
            values = np.asarray(self.logits[i])[has_label].astype(np.float64)
            if self.readout.labels == 3:
                guess = values.argmax(axis=1)
            else:
                good = values[:, 0] if self.readout.labels == 1 else values[:, 1] - values[:, 0]
                label, guess = (label > 0.5).astype(np.float64), good > 0
            probabilities = self.readout.wrong(torch.from_numpy(values)).numpy()
            found.solutions.append((probabilities, (label == 0).astype(np.float64)))
            found.right.append((guess == label).astype(np.float64))
            found.labels.append(label)
        return found

    def calibrate(self, manifest: RewardManifest, source: str) -> list[str]:
        """Fit the threshold of the first error; on fewer than 50 solutions it stays as it is."""
        solutions = self._labelled().solutions
        if len(solutions) < FEWEST_TO_FIT:
            return [
                f"the threshold stays at {self.readout.threshold:g}: {len(solutions)} solutions to "
                f"fit it on are fewer than {FEWEST_TO_FIT} (hold out more: --eval_fraction, "
                "--eval_dataset_name)"
            ]
        manifest.readout = {**manifest.readout, "threshold": fit_threshold(solutions)}
        return []

    def _figures(self) -> dict[str, Any]:
        labelled, truth = self._labelled(), self._of_kept("true_labels")
        if truth is not None:  # 1 where a labelled step is really wrong
            pairs = zip(truth, (self.targets[i] for i in self.kept), strict=True)
            truth = [
                np.array(
                    [own == -1 for own, x in zip(labels, target, strict=True) if x != IGNORE_INDEX],
                    dtype=np.float64,
                )
                for labels, target in pairs
            ]
        return process_metrics(
            labelled.solutions,
            threshold=self.readout.threshold,
            right=labelled.right,
            labels=labelled.labels,
            truth=truth,
            groups=self._prompts(),
            seed=self.seed,
        )

    def _table(self) -> list[str]:
        figures = self.metrics
        first, at_half = figures["first_error"], figures["first_error_at_half"]
        fitted = f", fitted on other rows (F1 at 0.5: {number(at_half['first_error_f1'])})"
        if figures["threshold"] == 0.5:
            fitted = ""
        f1 = number(first["first_error_f1"], figures["first_error_interval"])
        steps = number(figures["step_accuracy"], figures["step_accuracy_interval"])
        auc = number(figures["wrong_auc"], figures["wrong_auc_interval"])
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
            f"{figures['threshold']:.3f}{fitted}",
            "floors: guessing at the best rate for the F1, the most frequent label for the steps, "
            "the step's number for the AUC",
        ]


def _probability_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    band = figures["ece_band"]
    calibrated = "–" if band is None else "calibrated" + interval(band)
    return [
        ("Brier score", number(figures["brier"], figures["brier_interval"]), "–", "–"),
        ("calibration error", number(figures["ece"]), "–", calibrated),
    ]


def evaluate_tokens(
    scorer: Scorer[Any],
    dataset: Iterable[Mapping[str, Any]],
    *,
    info: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
) -> TokenEvaluation:
    """Score held-out rows with an outcome or process model and compute every figure. Chapter 3.

    Parameters
    ----------
    scorer : Scorer
        Of an outcome or process model, here or on a server. The threshold of the first error, and
        what a neutral step counts as, are those of its manifest: nothing is fitted here.
    dataset : iterable of mappings
        Rows of the kind ``outcomes`` for an outcome model, ``steps`` for a process model. A column
        ``correct`` or ``true_labels``, the truth behind noisy labels, gives the limit.
    info : mapping, optional
        What goes into the result's ``info``.
    progress : callable, optional
        Called with the number of texts scored since the last call.
    seed : int, default 0
        Of the bootstrap and the band.
    on_error : {"raise", "skip"}
        A row that cannot be formatted or scored is an error, or dropped with its reason.

    Raises
    ------
    DataError
        If there is no row, or none can be scored, or a label does not fit the model.
    """
    rows = [dict(row) for row in dataset]
    readout = scorer.readout
    if not isinstance(readout, TokenReadout):
        raise DataError("the model has one score a text", "evaluate it on pairs or rankings")
    if not rows:
        what = ROWS[readout.kind]
        raise DataError(f"there are no {what} to evaluate on", "check the split and limit")
    about: dict[str, Any] = {"seed": seed, "info": dict(info or {})}
    if readout.kind == "outcome":
        for i, row in enumerate(rows):
            if row.get("label") not in (0, 1):  # bools are
                raise DataError(f"row {i}, field 'label': {row.get('label')!r}", "true or false")
        scores = scorer.score(rows, on_error=on_error, progress=progress)
        found: TokenEvaluation = OutcomeEvaluation(
            list(rows),
            scores.reasons,
            readout,
            **about,
            aggregates=_aggregates(scores.values),
            lengths=scores.n_tokens,
        )
    else:
        targets = step_targets(rows, readout, getattr(scorer.manifest, "training", {}))
        scores = scorer.score(rows, on_error=on_error, progress=progress)
        found = StepEvaluation(
            list(rows), scores.reasons, readout, **about, logits=scores.logits, targets=targets
        )
    return found.measure()


def step_targets(
    rows: Sequence[Mapping[str, Any]], readout: TokenReadout, training: Mapping[str, Any]
) -> list[list[float]]:
    """The labels of each row's steps as :func:`companion.functional.step_target` has them.

    What a neutral step counts as is said by the settings of the model's `training`; with one
    logit, labels are soft if they were so in training, or if any of them is a float.
    """
    label_type, neutral = "three", training.get("neutral", "good")
    if readout.labels < 3:
        soft = training.get("label_type") == "soft" or any(
            isinstance(x, float) and x == x for row in rows for x in row["labels"]
        )
        label_type = "soft" if soft else "binary"
    found = []
    for i, row in enumerate(rows):
        if len(row["labels"]) != len(row["completions"]):
            raise DataError(
                f"row {i}: {len(row['completions'])} steps but {len(row['labels'])} labels"
            )
        found.append(
            [
                step_target(label, label_type, neutral, f"row {i}, labels[{k}]")
                for k, label in enumerate(row["labels"])
            ]
        )
    return found


def _aggregates(values: Sequence[Array | None]) -> dict[str, Array]:
    found: dict[str, Array] = {how: np.full(len(values), np.nan) for how in AGGREGATES}
    for place, own in enumerate(values):
        if own is not None:
            row = torch.from_numpy(np.asarray(own))[None]
            mask = torch.ones_like(row, dtype=torch.bool)
            for how in AGGREGATES:
                found[how][place] = float(aggregate(row, mask, how))
    return found
