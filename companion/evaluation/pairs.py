"""A reward model on held-out pairs: scores, figures, and the best that any model could reach.

Where rows carry their truth (``probability``, or ``reward_chosen`` and ``reward_rejected``, as the
tutor's do) each figure stands beside its limit. Chapter 4.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from companion.data.splits import prompt_key
from companion.errors import DataError
from companion.evaluation.evaluation import FEWEST_TO_FIT, Evaluation
from companion.evaluation.metrics import pairwise_metrics
from companion.evaluation.tables import format_table, interval, number, percent
from companion.functional.calibration import fit_temperature
from companion.functional.resampling import Array
from companion.models.manifest import ReferenceStats, RewardManifest
from companion.scoring.results import PairScores

if TYPE_CHECKING:
    from companion.scoring import Scorer
    from companion.scoring.scorer import OnError


@dataclass
class PairEvaluation(Evaluation):
    """Pairs with the scores of a model, and their figures.

    Attributes
    ----------
    rows : list of dict
        The pairs, with an optional ``subset`` and optional truth (:func:`gold_probability`).
    chosen, rejected : ndarray ``[n_rows]``
        Raw scores, NaN where a row was dropped.
    chosen_lengths, rejected_lengths : ndarray ``[n_rows]``
        Tokens of the whole text, prompt and template included.
    reasons : list of str or None
        Why a row has no score.
    temperature : float or None
        Of the calibrated probability.
    seed : int
        Of the bootstrap and the band.
    probability : ndarray ``[n_rows]`` or None
        True probability that `chosen` is preferred.
    info, metrics : dict
        As in :class:`companion.evaluation.Evaluation`; the figures are those of
        :func:`companion.evaluation.pairwise_metrics`.
    """

    rows: list[Mapping[str, Any]]
    chosen: Array
    rejected: Array
    chosen_lengths: Array
    rejected_lengths: Array
    reasons: list[str | None]
    temperature: float | None = None
    seed: int = 0
    probability: Array | None = None
    info: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def margins(self) -> Array:
        """``chosen - rejected``, NaN where a row was dropped."""
        return self.chosen - self.rejected

    def __len__(self) -> int:
        return int(np.isfinite(self.margins).sum())

    def measure(self) -> Self:
        """Compute every figure; the limit too, where the rows carry their truth."""
        self.probability, source = gold_probability(self.rows)
        subsets = None
        if any(row.get("subset") is not None for row in self.rows):
            subsets = [
                "(none)" if row.get("subset") is None else str(row["subset"]) for row in self.rows
            ]
        self.metrics = pairwise_metrics(
            self.chosen,
            self.rejected,
            chosen_lengths=self.chosen_lengths,
            rejected_lengths=self.rejected_lengths,
            subsets=subsets,
            groups=prompt_groups(self.rows),
            probability=self.probability,
            reasons=self.reasons,
            temperature=self.temperature,
            seed=self.seed,
        )
        self.info |= {"limit_from": source, "length_unit": "tokens"}
        return self

    def calibrate(self, manifest: RewardManifest, source: str) -> list[str]:
        """Fit the temperature of the margins, and take the statistics of all scores.

        On fewer than 50 pairs no temperature is fitted: it would be off by a third and more (on 50
        calibrated pairs of accuracy 0.8 the standard error of log T is about 0.3).
        """
        scored = np.isfinite(self.margins)
        manifest.reference = ReferenceStats.from_scores(
            np.concatenate([self.chosen[scored], self.rejected[scored]]),
            f"{len(self):,} held-out pairs of {source}",
        )
        if scored.sum() < FEWEST_TO_FIT:
            return [
                f"no temperature: {scored.sum()} pairs to fit it on are fewer than {FEWEST_TO_FIT} "
                "(hold out more: --eval_fraction, --eval_dataset_name)"
            ]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            manifest.temperature = float(fit_temperature(self.margins[scored]))
        return [str(warning.message) for warning in caught]

    def table(self) -> str:
        """Return the figures as text: one table of all pairs, one of the subsets if there are."""
        parts = [format_table(("figure", "ours", "limit"), summary_rows(self.metrics))]
        if self.metrics["subsets"]:
            head, *body = subset_rows(self.metrics)
            parts.append(format_table(head, body))
        return "\n\n".join(parts)

    def closing(self, calibration: Evaluation) -> str:
        """A table, the temperature, and whether the floor was beaten."""
        figures = self.metrics
        lines = [
            format_table(("held-out figure", "ours", "best possible"), summary_rows(figures)),
            "",
        ]
        if self.temperature is not None:
            lines.append(
                f"temperature {self.temperature:.3f}, fitted on {len(calibration):,} pairs"
            )
        floor = figures.get("longer_wins")
        if floor:
            better = figures["accuracy"] > floor["accuracy"]
            lines.append(
                f"{figures['n']:,} pairs: accuracy {figures['accuracy']:.3f}; preferring the "
                f"longer text is right in {floor['accuracy']:.3f}"
                + ("" if better else ": the model does not beat that floor")
            )
        return "\n".join(lines)


def gold_probability(rows: Sequence[Mapping[str, Any]]) -> tuple[Array | None, str | None]:
    """True probability that `chosen` is preferred, where the rows say it.

    Parameters
    ----------
    rows : sequence of mappings
        With ``probability``; or ``reward_chosen`` and ``reward_rejected``, whose difference is
        taken for the logit. With neither in the first row there is no gold.

    Returns
    -------
    probability : ndarray ``[n]`` or None
    source : str or None
        Which columns it came from.

    Raises
    ------
    DataError
        If a later row lacks what the first one has; the row is named.
    """
    has = {name for row in rows[:1] for name, x in row.items() if isinstance(x, (int, float))}
    choices = (("probability",), ("reward_chosen", "reward_rejected"))
    columns = next((names for names in choices if has.issuperset(names)), None)
    if columns is None:
        return None, None
    table = np.empty((len(rows), len(columns)))
    for line, row in enumerate(rows):
        for place, column in enumerate(columns):
            value = row.get(column)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise DataError(
                    f"row {line}: {column} is {value!r}, though the first row has it",
                    f"give every row a {column}, or leave the column out",
                )
            table[line, place] = value
    if len(columns) == 1:
        outside = (table < 0) | (table > 1)
        if outside.any():
            raise DataError(f"row {int(outside.argmax())}: probability is not in [0, 1]")
        return table[:, 0], "probability"
    gap = table[:, 0] - table[:, 1]
    return np.exp(-np.logaddexp(0.0, -gap)), "reward_chosen - reward_rejected"


def prompt_groups(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each row what tells its prompt from others: what an interval resamples as a whole."""
    keys = []
    for place, row in enumerate(rows):
        try:
            keys.append(prompt_key(row))
        except DataError:  # a row whose prompt cannot be told apart is a prompt of its own
            keys.append(f"row {place}")
    return keys


def evaluate_pairs(
    scorer: Scorer[Any],
    dataset: Iterable[Mapping[str, Any]],
    *,
    temperature: float | None = None,
    info: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
) -> PairEvaluation:
    """Score held-out pairs and compute every figure.

    Parameters
    ----------
    scorer : Scorer
        Its ``score_pairs(rows)`` is called once with all rows.
    dataset : iterable of mappings
        Pairs (``companion.data.load_rows``), with an optional ``subset`` column and
        optional truth (:func:`gold_probability`).
    temperature : float, optional
        Of the calibrated probability; by default that of the scorer's manifest.
    info : mapping, optional
        What goes into the result's ``info``, such as the names of model and data.
    progress : callable, optional
        Called with the number of texts scored since the last call.
    seed : int, default 0
        Of the bootstrap and the band.
    on_error : {"raise", "skip"}
        A pair that cannot be formatted or scored is an error, or dropped with its reason.

    Raises
    ------
    DataError
        If there is no pair, or none can be scored.
    """
    rows = [dict(row) for row in dataset]
    if not rows:
        raise DataError("there is no pair to evaluate on", "check the split and the limit")
    scores = scorer.score_pairs(rows, on_error=on_error, progress=progress)
    if temperature is None:
        temperature = getattr(scorer.manifest, "temperature", None)
    return scored_pairs(rows, scores, temperature=temperature, info=info, seed=seed).measure()


def scored_pairs(
    rows: Sequence[Mapping[str, Any]],
    scores: PairScores,
    *,
    temperature: float | None = None,
    info: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> PairEvaluation:
    """Pairs that have been scored, by a scorer or in training; see :func:`evaluate_pairs`."""
    sides = (scores.chosen, scores.rejected, scores.chosen_tokens, scores.rejected_tokens)
    chosen, rejected, *lengths = (np.asarray(values, dtype=np.float64) for values in sides)
    return PairEvaluation(
        list(rows),
        chosen,
        rejected,
        lengths[0],
        lengths[1],
        list(scores.reasons),
        temperature=temperature,
        seed=seed,
        info=dict(info or {}),
    )


# --- tables -----------------------------------------------------------------------------------


def summary_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (figure, ours, limit) as text, for tables on a terminal and in a report.

    The limit is what the true probabilities reach on the same labels, an interval what a perfectly
    calibrated model shows by chance; '–' where there is none.

    Parameters
    ----------
    metrics : mapping
        Of :func:`pairwise_metrics`.
    """
    limit = metrics.get("limit") or {}
    best: Mapping[str, Any] = limit.get("rows", {})
    pairs = f"{metrics['n']:,}"
    if metrics.get("n_prompts") not in (None, metrics["n"]):
        pairs += f" ({metrics['n_prompts']:,} prompts)"
    accuracy = percent(metrics["accuracy"], metrics["accuracy_interval"])

    def calibrated(name: str, error: float, band: Sequence[float]) -> tuple[str, str, str]:
        return f"calibration error{name}", number(error), "calibrated" + interval(band)

    rows = [
        ("pairs scored", pairs, "–"),
        ("rows dropped", f"{metrics['dropped']['total']:,}", "–"),
        ("accuracy [95%]", accuracy, percent(best.get("accuracy"))),
        ("accuracy, ties as half", percent(metrics["accuracy_ties_half"]), "–"),
        ("ties", f"{metrics['ties']:,}", "–"),
    ]
    if ranked := metrics.get("rankings"):
        picked = percent(ranked["best_is_best"], ranked["interval"])
        rows += [
            ("best of a ranking picked [95%]", picked, percent(ranked["limit"])),
            ("floor: picked at random", percent(ranked["random"]), "–"),
            ("floor: the longest picked", percent(ranked["longest"]), "–"),
        ]
    if metrics.get("longer_wins"):
        rows.append(("floor: 'longer wins'", percent(metrics["longer_wins"]["accuracy"]), "–"))
    rows += [
        ("loss (nats)", number(metrics["loss"]), number(best.get("loss"))),
        ("mean margin", number(metrics["margin_mean"]), "–"),
        calibrated(", debiased", metrics["ece"], metrics["ece_band"]),
        calibrated(", plain", metrics["ece_plain"], metrics["ece_plain_band"]),
        ("Brier score", number(metrics["brier"]), number(best.get("brier"))),
    ]
    warm = metrics.get("at_temperature")
    if warm and warm["temperature"] != 1.0:
        name = f" at T = {warm['temperature']:.2f}"
        rows += [
            (f"loss{name}", number(warm["loss"]), number(best.get("loss"))),
            calibrated(name, warm["ece"], warm["ece_band"]),
        ]
    if limit.get("model_expected"):
        ours, ideal = limit["model_expected"], limit["expected"]
        rows += [
            ("accuracy, mean over labels", percent(ours["accuracy"]), percent(ideal["accuracy"])),
            ("loss, mean over labels", number(ours["loss"]), number(ideal["loss"])),
        ]
    if link := metrics.get("score_length"):
        r, rho = (number(link[name], digits=2) for name in ("pearson", "spearman"))
        rows.append(("score ~ length, r (ρ)", f"{r} ({rho})", "–"))
    return rows


def subset_rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a head and one row of text for each subset."""
    rows: list[tuple[str, ...]] = [
        ("subset", "pairs", "accuracy [95%]", "limit", "longer wins", "loss", "mean margin")
    ]
    for name, figures in metrics["subsets"].items():
        longer = figures.get("longer_wins") or {}
        rows.append(
            (
                name,
                f"{figures['n']:,}",
                percent(figures["accuracy"], figures["accuracy_interval"]),
                percent(figures["limit_accuracy"]),
                percent(longer.get("accuracy")),
                number(figures["loss"]),
                number(figures["margin_mean"]),
            )
        )
    return rows
