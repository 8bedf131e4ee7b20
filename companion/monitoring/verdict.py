"""What a look says: fine, warning, retrain or fault, why, and what to do. Chapter 7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from companion.errors import DataError
from companion.functional.agreement import annotator_agreement
from companion.functional.calibration import (
    calibrated_band,
    confidence_and_correctness,
    expected_calibration_error,
    inverse_temperature_limits,
    score_parts,
)
from companion.functional.resampling import Array, bootstrap_interval
from companion.monitoring.evidence import Evidence, Labels, Test
from companion.monitoring.plan import Plan, rightness
from companion.monitoring.store import Store, now

#: verdict -> exit code
CODES: Final = {"fine": 0, "warning": 10, "retrain": 20, "fault": 30}
_RETRAIN: Final = "retrain from the base with the new labels (companion retrain)"
#: of a look's pairs, a larger share without a score is said
_UNSCORED: Final = 0.05
#: bins of the calibration error; of equal mass
_BINS: Final = 10
#: of the labels that came, a larger share set aside is said
_MANY: Final = 0.5


def judge(
    store: Store,
    evidence: Evidence,
    *,
    look: int,
    golden: Mapping[str, Any] | None = None,
    traffic: Sequence[str] = (),
    refused: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The verdict of a look, as plain data.

    Parameters
    ----------
    store : Store
    evidence : Evidence
        Of all labels of the phase.
    look : int
        Its number.
    golden : mapping, optional
        What became of the golden texts.
    traffic : sequence of str
        Warnings of the unlabelled traffic, in words.
    refused : mapping of str to int, optional
        Why rows of this look were not taken, and how many.
    """
    plan = store.plan()
    labels = store.labels(sampling=plan.sampling)
    counts = store.counts()
    aside = sum(counts.values()) - len(labels)
    reasons, warnings, advice = [], list(traffic), []
    tests = []
    for test in evidence.tests:
        told = _told(test, plan, labels, store)
        tests.append(told)
        if told["alarm"]:
            reasons.append(told["what"])
            advice.append(told["advice"])
    if golden is not None and not golden["ok"]:
        lines = [str(line) for line in golden.get("lines", [])]
        if golden["state"] != "moved":  # not reached; or another hash, and the same scores
            warnings += lines
        else:
            reasons = [*lines, *reasons]
            advice.insert(
                0,
                "find what changed in the serving of the model, and put it right, before any label "
                "is read: the scores are not those of the model that was released",
            )
    if aside > _MANY * max(sum(counts.values()), 1):
        by = ", ".join(f"{n:,} {name}" for name, n in counts.items() if name != plan.sampling)
        warnings.append(
            f"{aside:,} of {sum(counts.values()):,} labels were not chosen at random ({by}), and "
            "no alarm may rest on them"
        )
    unscored = dict(refused or {}).get("no score", 0)
    if unscored > _UNSCORED * (taken := unscored + int((labels.look == look).sum())):
        warnings.append(
            f"the model gave no score to {unscored:,} of {taken:,} pairs (too long, most likely): "
            "those that are left are no random sample; give it a larger max_length"
        )
    if evidence.again > _MANY * max(len(labels), 1):
        warnings.append(
            f"{evidence.again:,} of {len(labels):,} pairs are of prompts that an earlier look has "
            "bet on; a prompt speaks once: label fresh prompts"
        )
    alarms = {test["name"] for test in tests if test["alarm"]}
    if alarms == {"calibration"}:
        advice.append(
            "until then, the order of completions may be as good as before: best-of-n and RL rest "
            "on it, probabilities and thresholds on margins do not hold any more"
        )
    fault = golden is not None and golden["state"] == "moved"
    verdict = "fault" if fault else "retrain" if alarms else "warning" if warnings else "fine"
    return {
        "verdict": verdict,
        "code": CODES[verdict],
        "time": now(),
        "look": look,
        "looks": len(evidence.looks),
        "phase": store.phase,
        "model": plan.model,
        "model_version": plan.model_version,
        "alpha": plan.alpha,
        "reasons": reasons,
        "warnings": warnings,
        "advice": list(dict.fromkeys(advice)),
        "labels": {
            "used": evidence.used,
            "prompt_seen_before": evidence.again,
            "set_aside": aside,
            "by_sampling": counts,
            "refused": dict(refused or {}),
        },
        "tests": tests,
        "figures": figures(plan, labels, store.judgements()),
        "golden": None if golden is None else dict(golden),
        "traffic": list(traffic),
        "notes": [*plan.notes, *evidence.notes],
    }


def _told(test: Test, plan: Plan, labels: Labels, store: Store) -> dict[str, Any]:
    """A test as plain data; with an alarm, what fell, by how much, since when, what to do."""
    told: dict[str, Any] = {
        "name": test.name,
        "e_value_log": test.log_e[-1],
        "threshold_log": test.threshold,
        "alarm": test.alarm is not None,
        "alarm_look": test.alarm,
        "since_look": test.since,
        "history": test.log_e,
    }
    if test.since is None:
        return told
    since = labels.part(labels.look >= test.since)
    times = store.times(test.since)
    when = f"look {test.since}" + (f" (labels from {times[0][:10]})" if times else "")
    told["since_time"] = times[0] if times else None
    if test.name == "calibration":
        assert plan.calibration is not None
        before = plan.calibration.temperature
        try:
            best, low, high = inverse_temperature_limits(
                since.margin, since.outcome, since.prompt, alpha=0.025
            )
        except DataError:
            best, low, high = np.nan, np.nan, np.nan
        values = [1 / one if one > 0 else np.inf for one in (best, high, low)]
        told |= {"side": test.side, "before": before, "now": values[0], "interval": values[1:]}
        told["what"] = (
            f"calibration: the probabilities are {test.side} since about {when}: the margins now "
            f"ask for a temperature of {values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}], and "
            f"{before:.2f} was fitted"
        )
        told["advice"] = _RETRAIN
        return told
    level = plan.accuracy
    if test.name != "accuracy":
        name = test.name.removeprefix("slice ")
        level = plan.slices[name]
        since = since.part(np.array([one == name for one in since.slice], dtype=bool))
    assert level is not None
    share, interval = _share(since)
    told |= {"before": level.mean, "now": share, "interval": list(interval)}
    told["change"] = share - level.mean
    told["what"] = (
        f"{test.name}: {100 * share:.1f}% [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}] of "
        f"the pairs are ordered rightly since about {when}, and {100 * level.mean:.1f}% were on "
        "the reference"
    )
    told["advice"] = (
        _RETRAIN
        if test.name == "accuracy"
        else f"label more pairs of {test.name}, then retrain from the base (companion retrain)"
    )
    return told


def _share(labels: Labels) -> tuple[float, tuple[float, float]]:
    """Accuracy and interval, each prompt once."""
    from companion.functional.betting import by_group

    means = by_group(rightness(labels.margin, labels.outcome), labels.prompt)
    low, high = bootstrap_interval(means)
    return float(means.mean()), (low, high)


def figures(
    plan: Plan, labels: Labels, judgements: Sequence[tuple[str, str, float]] = ()
) -> dict[str, Any]:
    """What is shown beside the tests; none of it is a verdict.

    Parameters
    ----------
    plan : Plan
    labels : Labels
        Those that are described.
    judgements : sequence of (pair, annotator, outcome)
        For the annotators' agreement, and the ceiling that it sets.

    Returns
    -------
    dict
        ``n``, ``prompts``, ``accuracy`` with ``accuracy_interval``; with a temperature ``ece``
        (debiased, ten bins of equal mass, of the confidence) with ``ece_band`` of a calibrated
        model of that size, ``brier`` and ``log_loss`` with their parts; ``slices``; ``agreement``.
    """
    found: dict[str, Any] = {"n": len(labels), "prompts": len(set(labels.prompt))}
    if judgements:
        found["agreement"] = agreement(judgements)
    if not len(labels):
        return found
    found["accuracy"], interval = _share(labels)
    found["accuracy_interval"] = list(interval)
    if plan.calibration is not None:
        confidence, _ = confidence_and_correctness(labels.margin / plan.calibration.temperature)
        right: Array = rightness(labels.margin, labels.outcome)
        asked: Any = {"n_bins": _BINS, "strategy": "mass", "debias": True}
        found["ece"] = expected_calibration_error(confidence, right, **asked)
        found["ece_band"] = list(calibrated_band(confidence, **asked))
        found["brier"] = vars(score_parts(confidence, right, "brier"))
        found["log_loss"] = vars(score_parts(confidence, right, "log"))
    found["slices"] = {}
    for name in sorted({one for one in labels.slice if one is not None}):
        own = labels.part(np.array([one == name for one in labels.slice], dtype=bool))
        share, ends = _share(own)
        level = plan.slices.get(name)
        found["slices"][name] = {
            "n": len(own),
            "accuracy": share,
            "interval": list(ends),
            "reference": None if level is None else level.mean,
        }
    return found


def agreement(judgements: Sequence[tuple[str, str, float]]) -> dict[str, Any] | None:
    """How far annotators agree on pairs that several judged; None if there are none."""
    pairs: dict[str, int] = {}
    names: dict[str, int] = {}
    for pair, name, _ in judgements:
        pairs.setdefault(pair, len(pairs))
        names.setdefault(name, len(names))
    codes = np.full((len(pairs), len(names)), -1)
    for pair, name, outcome in judgements:
        codes[pairs[pair], names[name]] = {1.0: 0, 0.0: 1}.get(outcome, 2)
    if not ((codes >= 0).sum(axis=1) > 1).any():
        return None
    return annotator_agreement(codes)
