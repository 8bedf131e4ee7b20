"""Begin to watch a model, and look at it: what `companion monitor` does. Chapter 7."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from companion.data.problems import RowProblem
from companion.data.writing import write_text
from companion.errors import DataError, ModelError
from companion.monitoring.evidence import measure
from companion.monitoring.golden import check_target, read_golden
from companion.monitoring.plan import Plan, make_plan
from companion.monitoring.planner import Change, Population, promise
from companion.monitoring.rows import LabelRow, read_labels
from companion.monitoring.store import Store
from companion.monitoring.traffic import (
    TrafficSummary,
    compare_traffic,
    merge_summaries,
    read_traffic,
    seconds_of,
    summarise_traffic,
)
from companion.monitoring.verdict import judge

if TYPE_CHECKING:
    from companion.scoring import Scorer

#: labels that are scored and kept together
_BATCH: Final = 256
#: looks with traffic that make the baseline of later ones
_BASELINE: Final = 4
#: bad rows that are named; all are counted
_NAMED: Final = 5
#: what the monitor's own requests are called in a server's log: its labels are no traffic
TAG: Final = "companion-monitor"
#: Opens the scorer, the first time that something has to be scored.
OpenScorer = Callable[[], "Scorer[Any]"]


def plan_of(
    scorer: Scorer[Any],
    reference: str | os.PathLike[str] | None,
    *,
    model: str,
    alpha: float = 0.01,
    accuracy_tolerance: float = 0.0,
    calibration_tolerance: float = 0.01,
    sampling: str = "random",
    catch: Sequence[Change] = (Change("accuracy", 0.05), Change("temperature", 1.5)),
    within: int = 8,
    power: float = 0.9,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Plan:
    """What a model is to be watched against.

    Parameters
    ----------
    scorer : Scorer
        Of the model, here or on a server.
    reference : path or None
        Labelled pairs on prompts that it did not train on, as in
        :func:`companion.monitoring.read_labels`; None only for a model that scores no pairs.
    model : str
        How the model is called, and where it is loaded from.
    alpha, accuracy_tolerance, calibration_tolerance
        As in :func:`companion.monitoring.make_plan`.
    sampling : str
        The rule by which pairs that may raise an alarm are chosen for labelling.
    catch : sequence of Change
        What the planner plans for.
    within, power, seed
        As in :func:`companion.monitoring.promise`.
    progress : callable, optional
        Called with the number of texts just scored.

    Raises
    ------
    DataError
        For a bad row of the reference, too few rows, or none where some are needed.
    ModelError
        If the golden texts cannot be read.
    """
    manifest = scorer.manifest
    _tag(scorer)
    plan = Plan(model, _version_of(scorer), alpha, sampling=sampling)
    if scorer.readout.kind != "scalar":
        if reference is not None:
            raise DataError(
                f"{model}: scores no pairs, so that no pairs can be its reference",
                "leave --reference out: its golden texts and its traffic are watched",
            )
        plan.notes.append(
            f"a model of the kind {scorer.readout.kind}: only its golden texts and its traffic are "
            "watched, neither accuracy nor calibration"
        )
    elif reference is None:
        raise DataError(
            f"{model}: no reference", "give labelled pairs that it did not train on: --reference"
        )
    else:
        rows = _good_rows(Path(reference))
        margins = _margins(scorer, rows, progress)
        kept = np.isfinite(margins)
        rows, margins = [row for row, keep in zip(rows, kept, strict=True) if keep], margins[kept]
        plan = make_plan(
            margins,
            np.array([row.outcome for row in rows]),
            [row.prompt for row in rows],
            model=model,
            model_version=plan.model_version,
            temperature=None if manifest is None else manifest.temperature,
            slices=[row.slice for row in rows],
            alpha=alpha,
            accuracy_tolerance=accuracy_tolerance,
            calibration_tolerance=calibration_tolerance,
            source=f"{len(rows):,} pairs of {Path(reference).name}",
        )
        plan.sampling = sampling
        if not kept.all():
            plan.notes.append(
                f"{int((~kept).sum()):,} of {len(kept):,} reference pairs have no score (too long, "
                "most likely), and are no part of the reference"
            )
        plan.promise = _promises(plan, np.abs(margins), catch, within, power, seed)
    plan.golden = read_golden(model)
    if plan.golden is None:
        plan.notes.append("the model has no golden texts: a fault in its serving is not seen")
    if manifest is not None and manifest.reference is not None:
        plan.scale = dict(vars(manifest.reference))
    return plan


def _promises(
    plan: Plan, margins: Any, catch: Sequence[Change], within: int, power: float, seed: int
) -> list[dict[str, Any]]:
    assert plan.accuracy is not None
    known = plan.calibration
    inverse = known.inverse[0] if known is not None else _as_accurate(margins, plan.accuracy.mean)
    settings: dict[str, Any] = {"alpha": plan.alpha, "accuracy_tolerance": plan.accuracy.tolerance}
    if known is not None:
        settings["calibration_tolerance"] = known.tolerance
    return [
        promise(
            Population(margins, inverse),
            change,
            reference=plan.accuracy.prompts,
            within=within,
            power=power,
            seed=seed,
            **settings,
        )
        for change in catch
        if change.kind == "accuracy" or known is not None
    ]


def _as_accurate(margins: Any, accuracy: float) -> float:
    """The 1/T at which pairs of these margins would be ordered rightly as often as they were."""
    low, high = 0.0, 1e3 / max(float(margins.max()), 1e-9)
    for _ in range(60):
        half = (low + high) / 2
        right = float((1 / (1 + np.exp(-margins * half))).mean())
        low, high = (half, high) if right < accuracy else (low, half)
    return high


def look(
    store: Store,
    *,
    labels: str | os.PathLike[str] | None = None,
    traffic: str | os.PathLike[str] | None = None,
    open_scorer: OpenScorer | None = None,
    sampling: str | None = None,
    golden: bool = True,
    target: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Take what is new, look, and judge.

    Parameters
    ----------
    store : Store
    labels : path, optional
        Judgements, see :func:`companion.monitoring.read_labels`. Those that are known are skipped,
        so that the same file may grow and be given again. A label belongs to the look that sees it
        first, however late it comes: what it says was not known before.
    traffic : path, optional
        Texts without labels: a file, or the folder of the server's ``--log_dir``. Those from before
        the last look are skipped, where they say their time.
    open_scorer : callable, optional
        Called at most once, when a label brings no scores.
    sampling : str, optional
        The rule of rows that do not say theirs.
    golden : bool
        Check the golden texts.
    target : mapping, optional
        Where, as in :func:`companion.monitoring.check_target`: ``url``, ``protocol``, …; default:
        the model's folder.
    progress : callable, optional
        Called with the number of labels just taken.

    Returns
    -------
    dict
        See :func:`companion.monitoring.judge`.

    Raises
    ------
    DataError
        If another run is going on, a file cannot be read, or labels are given for a model that
        scores no pairs. Bad rows are named in the verdict and left out.
    """
    with store.alone():
        plan = store.plan()
        if labels is not None and plan.accuracy is None:
            raise DataError(f"{plan.model}: scores no pairs", "give --traffic, or nothing")
        number = store.begin()
        bad = _Bad()
        if labels is not None:
            _take(
                store, plan, number, read_labels(Path(labels)), open_scorer, sampling, bad, progress
            )
        warnings, summary = [], None
        if traffic is not None:
            summary = _summary(store, plan, traffic)
            warnings = _traffic_warnings(store, plan, summary)
        told = None
        if golden and plan.golden is not None:
            check = check_target(**{"model": plan.model, "golden": plan.golden, **(target or {})})
            told = {**check.to_dict(), "lines": check.lines()}
        evidence = measure(plan, store.labels(sampling=plan.sampling))
        verdict = judge(
            store, evidence, look=number, golden=told, traffic=warnings, refused=bad.reasons
        )
        verdict["bad_rows"] = bad.named
        store.end(number, verdict, None if summary is None else summary.to_dict())
    return verdict


class _Bad:
    """Rows that are not taken."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.named: list[str] = []

    def add(self, reason: str, said: str) -> None:
        self.reasons[reason] += 1
        if len(self.named) < _NAMED:
            self.named.append(said)


def _take(
    store: Store,
    plan: Plan,
    number: int,
    rows: Iterator[LabelRow | RowProblem],
    open_scorer: OpenScorer | None,
    sampling: str | None,
    bad: _Bad,
    progress: Callable[[int], object] | None,
) -> None:
    """Labels of a file into the store, a batch at a time."""
    scorer: Scorer[Any] | None = None
    reference = set(plan.prompts)
    while batch := list(islice(rows, _BATCH)):
        good = []
        for row in batch:
            if isinstance(row, RowProblem):
                bad.add(row.reason, str(row))
            elif row.prompt in reference:
                bad.add("prompt of the reference", f"id {row.id}: the reference has this prompt")
            elif row.scores is not None and row.model_version != plan.model_version:
                bad.add(
                    "scores of another model version",
                    f"id {row.id}: scores of the model version {row.model_version}, and "
                    f"{plan.model_version} is watched",
                )
            else:
                good.append(row)
        known = store.known(good)
        new = [row for row, there in zip(good, known, strict=True) if not there]
        if any(row.scores is None for row in new) and scorer is None:
            if open_scorer is None:
                raise DataError("labels without scores", "give a scorer, or rows with scores")
            scorer = open_scorer()
            _tag(scorer)
            found = _version_of(scorer)
            if plan.model_version and found and found != plan.model_version:
                raise ModelError(
                    f"the model's version is {found}, and {plan.model_version} is watched",
                    "of a new model: companion monitor restart, with a reference of its own; of "
                    "the same one, ask where init asked (the folder, or the same server)",
                )
        margins = np.array([np.nan if r.scores is None else r.scores[0] - r.scores[1] for r in new])
        asked = [i for i, row in enumerate(new) if row.scores is None]
        if asked and scorer is not None:
            margins[asked] = _margins(scorer, [new[i] for i in asked])
        for row, margin in zip(new, margins, strict=True):
            if not np.isfinite(margin):
                bad.add("no score", f"id {row.id}: the model gives it no score")
        there = np.isfinite(margins)
        store.add(
            number,
            [_ruled(row, sampling) for row, keep in zip(new, there, strict=True) if keep],
            margins[there].tolist(),
        )
        if progress is not None:
            progress(len(batch))


def _ruled(row: LabelRow, sampling: str | None) -> LabelRow:
    from dataclasses import replace

    return row if row.sampling is not None else replace(row, sampling=sampling)


def _good_rows(path: Path) -> list[LabelRow]:
    """The rows of a reference; a bad one is an error, since all is held against it."""
    rows: dict[tuple[str, str], LabelRow] = {}
    for row in read_labels(path):
        if isinstance(row, RowProblem):
            raise row.as_error()
        rows.setdefault((row.id, row.annotator), row)
    if not rows:
        raise DataError(f"{path}: empty, no rows", "give labelled pairs")
    return list(rows.values())


def _margins(
    scorer: Scorer[Any],
    rows: Sequence[LabelRow],
    progress: Callable[[int], object] | None = None,
) -> Any:
    """Raw score of the first minus that of the second; NaN where one has none."""
    found = scorer.score_pairs(
        [row.texts for row in rows],
        on_error="skip",
        names=[f"id {row.id}" for row in rows],
        progress=progress,  # type: ignore[arg-type]
    )
    return found.chosen - found.rejected


def _tag(scorer: Scorer[Any]) -> None:
    if hasattr(scorer, "tag_requests"):
        scorer.tag_requests(TAG)


def _version_of(scorer: Scorer[Any]) -> str:
    """The version of a scorer's model; empty for an engine that says none."""
    from companion.models import identity_of
    from companion.scoring import LocalScorer

    if isinstance(scorer, LocalScorer):
        return identity_of(scorer.reward_model).version
    scorer.score(["a"], on_error="skip")  # a server says it in its answers
    return str(getattr(scorer, "model_version", None) or "")


# ---------------------------------------------------------------------- traffic


def _summary(store: Store, plan: Plan, path: str | os.PathLike[str]) -> TrafficSummary:
    """What came since the last look."""
    ends = [seconds_of(look.traffic["end"]) for look in store.looks() if look.traffic]
    since = max((end for end in ends if end is not None), default=-math.inf)
    own = [] if plan.golden is None else plan.golden["input_ids"]  # a look's own questions
    return summarise_traffic(_after(read_traffic(path), since), golden=own)


def _after(rows: Iterable[Any], since: float) -> Iterator[Any]:
    for row in rows:
        if isinstance(row, Mapping) and str(row.get("request", "")).startswith(f"{TAG}-"):
            continue
        time = seconds_of(row.get("time")) if isinstance(row, Mapping) else None
        # (the end of a summary has no parts of a second)
        if time is None or math.floor(time) > since:
            yield row


def _traffic_warnings(store: Store, plan: Plan, summary: TrafficSummary) -> list[str]:
    before = [
        TrafficSummary.from_dict(look.traffic)
        for look in store.looks()
        if look.traffic and look.phase == store.phase and look.ended
    ][:_BASELINE]
    baseline = merge_summaries(before) if any(week.texts for week in before) else None
    scale: Any = None
    if plan.scale is not None:
        scale = SimpleNamespace(**plan.scale)
    return [warning.what for warning in compare_traffic(summary, baseline, scale)]


def write_json(path: Path, verdict: Mapping[str, Any]) -> None:
    """A verdict as a file, whole or not at all."""
    write_text(path, json.dumps(verdict, indent=1) + "\n")
