"""Two reward models on the same rows: how scores, ranks, thresholds and decisions move. Chapter 6.

A raw score of one model says nothing beside that of another, nor does a raw threshold. What can be
compared is ranks, z and percentiles, each against the model's own reference, and decisions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

from companion.errors import DataError, ModelError
from companion.evaluation.evaluation import Evaluation
from companion.evaluation.pairs import prompt_groups
from companion.evaluation.tables import format_table, number, percent
from companion.functional.resampling import Array, bootstrap_interval
from companion.layouts import with_prompt
from companion.models.identity import identity_of, text_hashes
from companion.models.manifest import ReferenceStats
from companion.scoring.golden import check_golden
from companion.scoring.scorer import LocalScorer

if TYPE_CHECKING:
    from companion.scoring import Scorer

Bools: TypeAlias = npt.NDArray[np.bool_]
#: the two models, as tables and notes call them
SIDES: Final = ("old", "new")
#: a share of accepted texts further from what the percentile promises, in points, is said
_FAR: Final = 0.02
_NEEDED: Final = "take its reference from these texts: companion compare … --write_reference"


@dataclass
class Comparison(Evaluation):
    """Rows scored by two models, and how their scores and decisions differ.

    Attributes
    ----------
    old, new : ndarray ``[T]``
        Raw scores of the texts, NaN where either model has none; of pairs first all of the chosen
        side, then all of the rejected, so that ``T = 2 × rows``.
    groups : list of str
        Of each row its prompt: intervals resample prompts.
    labelled : bool
        Whether the rows are pairs.
    percentile : float
        A text is accepted above this percentile of a model's reference.
    references : dict of str to ReferenceStats or None
        Of ``old`` and ``new``.
    temperatures : dict of str to float or None
        Of ``old`` and ``new``.
    reasons : dict of str to list of (str or None)
        Of each side, why a row has no score.
    seed : int
        Of the bootstrap.
    notes : list of str
        What the figures cannot say, and why.
    info, metrics : dict
        As in :class:`companion.evaluation.Evaluation`; see :meth:`measure`.
    """

    old: Array
    new: Array
    groups: list[str]
    labelled: bool
    percentile: float
    references: dict[str, ReferenceStats | None]
    temperatures: dict[str, float | None]
    reasons: dict[str, list[str | None]]
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> Bools:
        """``[rows]`` bool: rows of which both models have all scores."""
        there = np.isfinite(self.old) & np.isfinite(self.new)
        return np.asarray(there.reshape(self._width, -1).all(axis=0))

    @property
    def _width(self) -> int:
        return 2 if self.labelled else 1

    def __len__(self) -> int:
        return int(self.kept.sum())

    def raw(self, side: str) -> Array:
        """Raw scores ``[T]`` of the texts that both models scored."""
        values: Array = self.old if side == "old" else self.new
        return values[np.tile(self.kept, self._width)]

    def reference_of(self, side: str, source: str) -> ReferenceStats:
        """A reference set of one model, made of these texts.

        Parameters
        ----------
        side : {"old", "new"}
        source : str
            Which texts, in words.
        """
        return ReferenceStats.from_scores(self.raw(side), source)

    def measure(self) -> Self:
        """Compute :attr:`metrics`.

        ``n`` rows and ``n_texts`` that both scored, ``dropped``; ``correlation`` (spearman,
        kendall); ``raw``, ``z`` and ``percentile`` of both; ``accepted``: shares above the
        percentile, by each model under its own reference (``own``), with the new model's reference
        made of these texts (``new_remade``) and with both so made (``both_remade``), each with the
        texts whose decision flips, and what the old model's raw threshold would accept (``raw``);
        for pairs ``pairs``: accuracy, log loss at each model's temperature, and agreement, with
        paired differences new − old and intervals over prompts.

        Raises
        ------
        DataError
            If fewer than two texts have a score of both.
        """
        n_texts = len(self) * self._width
        if n_texts < 2:
            raise DataError(
                f"{n_texts} of {self.old.size} texts have a score of both models; first reason: "
                f"{next((r for s in SIDES for r in self.reasons[s] if r), 'none')}",
                "give two texts at least that both models can score",
            )
        for side in SIDES:
            one = self.references[side]
            if one is None:
                self._note(f"{side.upper()} has no reference set: no z, no percentile", _NEEDED)
        scores = {side: self.raw(side) for side in SIDES}
        own = self.references.items()
        z = {side: None if one is None else one.z(scores[side]) for side, one in own}
        ranks = {side: _percentile(scores[side], one) for side, one in own}
        moved = None
        if ranks["old"] is not None and ranks["new"] is not None:
            moved = float(np.abs(ranks["new"] - ranks["old"]).mean())
        self.metrics = {
            "n": len(self),
            "n_rows": len(self.groups),
            "n_texts": n_texts,
            "n_prompts": len({g for g, kept in zip(self.groups, self.kept, strict=True) if kept}),
            "dropped": self._dropped(),
            "correlation": _correlation(scores["old"], scores["new"]),
            "raw": {side: _moments(values) for side, values in scores.items()},
            "z": {side: _moments(values) for side, values in z.items()},
            "percentile": {side: _moments(values) for side, values in ranks.items()}
            | {"mean_move": moved},
            "accepted": self._accepted(scores),
            "pairs": self._pairs() if self.labelled else None,
        }
        return self

    # ------------------------------------------------------------------ figures

    def _note(self, what: str, cure: str = "") -> None:
        note = f"{what} ({cure})" if cure else what
        if note not in self.notes:
            self.notes.append(note)

    def _dropped(self) -> dict[str, Any]:
        reasons = {
            side: dict(Counter(reason for reason in self.reasons[side] if reason is not None))
            for side in SIDES
        }
        return {"total": len(self.groups) - len(self), **reasons}

    def _interval(self, values: Array | Bools) -> list[float]:
        """Of the mean of one value a row, or a text, over prompts."""
        own = np.asarray(self.groups, dtype=object)[self.kept]
        groups = np.tile(own, len(values) // len(own))
        return list(bootstrap_interval(values.astype(np.float64), groups, seed=self.seed))

    def _share(self, accepted: Bools) -> dict[str, Any]:
        return {"share": float(accepted.mean()), "interval": self._interval(accepted)}

    def _accepted(self, scores: dict[str, Array]) -> dict[str, Any]:
        remade = {side: ReferenceStats.from_scores(scores[side], "these texts") for side in SIDES}
        own = self.references
        found: dict[str, Any] = {"percentile": self.percentile}
        for name, references in (
            ("own", own),
            ("new_remade", {"old": own["old"], "new": remade["new"]}),
            ("both_remade", remade),
        ):
            ranks = {side: _percentile(scores[side], references[side]) for side in SIDES}
            above = {s: None if r is None else r > self.percentile for s, r in ranks.items()}
            was, now = above["old"], above["new"]
            found[name] = {s: None if a is None else self._share(a) for s, a in above.items()}
            found[name]["flipped"] = None
            if was is not None and now is not None:
                found[name]["flipped"] = self._share(was != now) | {
                    "taken_in": float((now & ~was).mean()),
                    "left_out": float((was & ~now).mean()),
                }
        found["raw"] = None
        if own["old"] is not None:
            grid = np.linspace(0, 100, len(own["old"].quantiles))
            limit = float(np.interp(self.percentile, grid, own["old"].quantiles))
            shares = {side: self._share(scores[side] > limit) for side in SIDES}
            found["raw"] = {"threshold": limit, **shares}
            share, (low, high) = found["own"]["old"]["share"], found["own"]["old"]["interval"]
            promised = 1 - self.percentile / 100
            if abs(share - promised) > _FAR and not low <= promised <= high:
                self._note(
                    f"OLD accepts {percent(share)} of these texts above percentile "
                    f"{self.percentile:g}: they are unlike those of its reference "
                    f"({own['old'].source}), and with a reference made of these texts a percentile "
                    "of NEW means something else",
                    "compare on the texts of OLD's reference, or make OLD's of these texts too",
                )
        return found

    def _pairs(self) -> dict[str, Any]:
        margins = {side: -np.diff(self.raw(side).reshape(2, -1), axis=0)[0] for side in SIDES}
        right = {side: (margin > 0).astype(np.float64) for side, margin in margins.items()}
        losses: dict[str, Array | None] = {}
        for side, margin in margins.items():
            warm = self.temperatures[side]
            losses[side] = None if warm is None else np.logaddexp(0.0, -margin / warm)
            if warm is None:
                self._note(
                    f"{side.upper()} has no temperature, so its margins are no probabilities and "
                    "it has no log loss",
                    "train it with 50 held-out pairs at least",
                )
        agree = np.sign(margins["old"]) == np.sign(margins["new"])
        return {
            "accuracy": self._paired(right),
            "log_loss": self._paired(losses) | {"temperatures": dict(self.temperatures)},
            "agreement": self._share(agree),
            "ties": {side: int((margin == 0).sum()) for side, margin in margins.items()},
        }

    def _paired(self, values: Mapping[str, Array | None]) -> dict[str, Any]:
        found: dict[str, Any] = {
            side: None
            if one is None
            else {"mean": float(one.mean()), "interval": self._interval(one)}
            for side, one in values.items()
        }
        was, now = values["old"], values["new"]
        found["difference"] = found["interval"] = None
        if was is not None and now is not None:
            found["difference"] = float((now - was).mean())
            found["interval"] = self._interval(now - was)
        return found

    # ------------------------------------------------------------------ text

    def table(self) -> str:
        """The figures as text: of each model, then what moves between them."""
        figures = self.metrics
        accepted, pairs = figures["accepted"], figures["pairs"]

        def both(name: str, found: Mapping[str, Any], key: str, digits: int = 3) -> tuple[str, ...]:
            own = [found[side] and found[side][key] for side in SIDES]
            return (name, *(number(value, digits=digits) for value in own), "")

        def shares(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
            own = [found[side] for side in SIDES]
            change = None
            if None not in own:
                change = own[1]["share"] - own[0]["share"]
            return (name, *(percent(one and one["share"]) for one in own), percent(change))

        above = f"accepted above percentile {accepted['percentile']:g}"
        rows = [
            both("raw score, mean", figures["raw"], "mean"),
            both("raw score, sd", figures["raw"], "sd"),
            both("z, mean", figures["z"], "mean"),
            both("z, sd", figures["z"], "sd"),
            both("percentile, mean", figures["percentile"], "mean", 1),
            shares(f"{above}, own references", accepted["own"]),
            shares("… NEW's reference of these texts", accepted["new_remade"]),
            shares("… both references of these texts", accepted["both_remade"]),
        ]
        if accepted["raw"]:
            name = f"raw score above {accepted['raw']['threshold']:.3f} (OLD's)"
            rows.append(shares(name, accepted["raw"]))
        if pairs:
            for name, key, show in (
                ("accuracy", "accuracy", percent),
                ("log loss (nats)", "log_loss", number),
            ):
                found = pairs[key]
                own = [show(found[side] and found[side]["mean"]) for side in SIDES]
                rows.append((name, *own, show(found["difference"], found["interval"])))
        moved = [("texts that both scored", f"{figures['n_texts']:,}")]
        if dropped := figures["dropped"]["total"]:
            moved.append(("rows left out", f"{dropped:,} of {figures['n_rows']:,}"))
        links = figures["correlation"]
        moved += [
            ("rank correlation (Spearman)", number(links["spearman"], digits=4)),
            ("rank correlation (Kendall)", number(links["kendall"], digits=4)),
        ]
        if figures["percentile"]["mean_move"] is not None:
            moved.append(("percentile moves by, mean", number(figures["percentile"]["mean_move"])))
        for name, key in (
            ("decisions that flip [95%]", "own"),
            ("… NEW's reference of these texts", "new_remade"),
            ("… both references of these texts", "both_remade"),
        ):
            flipped = accepted[key]["flipped"]
            if flipped:
                moved.append((name, percent(flipped["share"], flipped["interval"])))
        if pairs:
            agree = pairs["agreement"]
            moved.append(("pairs with the same favourite", percent(**_ends(agree))))
        tables = [
            format_table(("figure", "OLD", "NEW", "NEW − OLD [95%]"), rows),
            format_table(("between them", ""), moved),
        ]
        return "\n\n".join(tables)

    def to_dict(self) -> dict[str, Any]:
        """Metrics, info and notes as plain JSON values."""
        return super().to_dict() | {"notes": list(self.notes)}


def _ends(share: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": share["share"], "ends": share["interval"]}


def _percentile(scores: Array, reference: ReferenceStats | None) -> Array | None:
    """Percentiles without the last bits: a text that *is* a quantile must not flip by rounding."""
    return None if reference is None else np.round(reference.percentile(scores), 9)


def _moments(values: Array | None) -> dict[str, float] | None:
    if values is None:
        return None
    return {"mean": float(values.mean()), "sd": float(values.std(ddof=1))}


def _correlation(a: Array, b: Array) -> dict[str, float | None]:
    """Of ranks; None where one side gives every text the same score."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"spearman": None, "kendall": None}
    return {
        "spearman": float(stats.spearmanr(a, b).statistic),
        "kendall": float(stats.kendalltau(a, b).statistic),
    }


# ---------------------------------------------------------------------- from scorers


def compare_scorers(
    old: Scorer[Any],
    new: Scorer[Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    percentile: float = 50.0,
    info: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Comparison:
    """Score the same rows with two models and compare them.

    Parameters
    ----------
    old, new : Scorer
        Here or on a server. Each must still say of its golden texts what was saved with it.
    rows : sequence of mappings
        Labelled pairs (``chosen``, ``rejected``), or rows as :meth:`Scorer.score` takes them.
    percentile : float, default 50
        A text is accepted above this percentile of a model's reference, in (0, 100).
    info : mapping, optional
        What goes into the result's ``info``.
    progress : callable, optional
        Called with the number of texts scored since the last call; each counts once a model.
    names : sequence of str, optional
        How to call the rows in errors.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    Comparison
        Measured.

    Raises
    ------
    DataError
        For no rows, a percentile outside (0, 100), pairs among other rows, or a bad row.
    ModelError
        If a model's golden texts have moved.
    ServiceError
        If a server cannot be asked.
    """
    if not 0 < percentile < 100:
        raise DataError(f"percentile is {percentile:g}", "give a number between 0 and 100")
    rows = list(rows)
    if not rows:
        raise DataError("there are no rows to compare on", "check the file and the limit")
    pairs = [isinstance(row, Mapping) and {"chosen", "rejected"} <= row.keys() for row in rows]
    if any(pairs) and not all(pairs):
        where = pairs.index(not pairs[0])
        name = names[where] if names is not None else f"row {where}"
        raise DataError(
            f"{name}: {'no pair' if pairs[0] else 'a pair'}, unlike the rows before",
            "give a file of pairs, or one of single texts",
        )
    scorers = dict(zip(SIDES, (old, new), strict=True))
    notes = [note for side, scorer in scorers.items() if (note := _golden(side, scorer))]
    values: dict[str, Array] = {}
    reasons: dict[str, list[str | None]] = {}
    for side, scorer in scorers.items():
        scores: Any
        if pairs[0]:
            scores = scorer.score_pairs(rows, names=names, progress=progress)
            values[side] = np.concatenate([scores.chosen, scores.rejected])
        else:
            scores = scorer.score(rows, names=names, progress=progress)
            values[side] = scores.raw
        reasons[side] = list(scores.reasons)
    known = {side: _identity(scorer) for side, scorer in scorers.items()}
    versions = {side: version for side, (version, _) in known.items()}
    (_, one), (_, other) = known.values()
    differs = [name for name in one if name in other and one[name] != other[name]]
    if versions["old"] is not None and versions["old"] == versions["new"]:
        notes.append(f"OLD and NEW are the same version, {versions['old']}")
    manifests = {side: scorer.manifest for side, scorer in scorers.items()}
    return Comparison(
        values["old"],
        values["new"],
        prompt_groups(rows) if pairs[0] else prompt_groups([_with_prompt(row) for row in rows]),
        pairs[0],
        float(percentile),
        references={side: scorer.reference for side, scorer in scorers.items()},
        temperatures={s: None if m is None else m.temperature for s, m in manifests.items()},
        reasons=reasons,
        seed=seed,
        notes=notes,
        info={**(info or {}), "versions": versions, "differs": differs},
    ).measure()


def _golden(side: str, scorer: Scorer[Any]) -> str | None:
    """Check a model's golden texts; the note that it has none."""
    report = check_golden(scorer)
    if report is None:
        return f"{side.upper()} has no golden texts, so nothing says that it is as it was saved"
    if not report.ok:
        raise ModelError(
            f"{side.upper()} is not as it was saved: {'; '.join(report.lines())}",
            "take the model, the tokenizer and the settings that it was saved with, or a server "
            "that gives raw scores",
        )
    return None


def _identity(scorer: Scorer[Any]) -> tuple[str | None, dict[str, str]]:
    """The version, where somebody says it, and the hashes that are known here."""
    if isinstance(scorer, LocalScorer):
        identity = identity_of(scorer.reward_model)
        return identity.version, identity.to_dict()
    version = getattr(scorer, "model_version", None)
    return version, text_hashes(scorer.formatter, scorer.readout)


def _with_prompt(row: Any) -> Mapping[str, Any]:
    """A scored row with its prompt told apart, as far as it can be."""
    if isinstance(row, Mapping) and row.get("messages") is None:
        return with_prompt(row)
    messages = row["messages"] if isinstance(row, Mapping) else row
    if isinstance(messages, str) or len(messages) < 2:
        return {}
    return {"prompt": messages[:-1]}
