"""The history of a monitor as one HTML file that needs no network. Chapter 7."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from companion.data.writing import write_text
from companion.functional.betting import by_group
from companion.functional.resampling import bootstrap_interval
from companion.monitoring.evidence import Evidence, Labels, measure
from companion.monitoring.plan import Plan, rightness
from companion.monitoring.store import Store
from companion.monitoring.verdict import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_monitor_report(store: Store, path: str | os.PathLike[str]) -> Path:
    """Write the report and return its path; folders are made.

    Text that comes from data is escaped, nothing is fetched, nothing runs.
    """
    from companion.evaluation.report import ASSETS, TEMPLATES

    plan = store.plan()
    labels = store.labels(sampling=plan.sampling)
    evidence = measure(plan, labels)
    looks = [one for one in store.looks() if one.verdict is not None]
    last: dict[str, Any] = looks[-1].verdict or {} if looks else {}
    own = figures(plan, labels, store.judgements())
    page = TEMPLATES.get_template("monitor.html").render(
        title=f"{plan.model}: a reward model watched",
        style=(ASSETS / "report.css").read_text(encoding="utf-8"),
        verdict=last.get("verdict", "not looked at yet"),
        when=f"look {last['look']}, {last['time'][:16].replace('T', ' ')} UTC" if last else "",
        said=[
            ("Why", last.get("reasons", [])),
            ("What to do", last.get("advice", [])),
            ("Warnings", last.get("warnings", [])),
        ],
        tests=[
            (
                test.name,
                f"{test.log_e[-1]:.2f}",
                f"{test.threshold:.2f}",
                "quiet" if test.alarm is None else f"alarm at look {test.alarm}",
            )
            for test in evidence.tests
        ],
        alpha=f"{100 * plan.alpha:g}%",
        figures=list(_figures(plan, labels, evidence)),
        measured=_measured(plan, own),
        slices=[
            (
                name,
                f"{one['n']:,}",
                _percent(one["accuracy"], one["interval"]),
                "–" if one["reference"] is None else _percent(one["reference"]),
            )
            for name, one in own.get("slices", {}).items()
        ],
        looks=[
            (
                one.number,
                one.began[:16].replace("T", " "),
                (one.verdict or {})["verdict"],
                f"{sum((one.verdict or {})['labels']['by_sampling'].values()):,}",
                "; ".join([*(one.verdict or {})["reasons"], *(one.verdict or {})["warnings"]]),
            )
            for one in reversed(looks)
        ],
        facts=_facts(store, plan),
    )
    return write_text(path, page)


def _percent(share: float, interval: Any = None) -> str:
    ends = "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return f"{100 * share:.1f}%{ends}"


def _measured(plan: Plan, own: dict[str, Any]) -> list[tuple[str, str, str]]:
    if "accuracy" not in own or plan.accuracy is None:
        return []
    rows = [
        ("pairs", f"{own['n']:,}", f"{own['prompts']:,} prompts"),
        (
            "accuracy",
            _percent(own["accuracy"], own["accuracy_interval"]),
            f"reference {_percent(plan.accuracy.mean)}",
        ),
    ]
    if (said := own.get("agreement")) and said.get("ceiling") is not None:
        rows.append(
            (
                "agreement of annotators",
                _percent(said["agreement"]),
                f"lets no model beyond {_percent(said['ceiling'])}",
            )
        )
    if "ece" in own:
        low, high = own["ece_band"]
        rows.append(
            ("calibration error", f"{own['ece']:.3f}", f"calibrated: {low:.3f} to {high:.3f}")
        )
        for name, title in (("brier", "Brier score"), ("log_loss", "log loss (nats)")):
            one = own[name]
            parts = f"miscalibration {one['miscalibration']:.3f} − discrimination "
            parts += f"{one['discrimination']:.3f} + uncertainty {one['uncertainty']:.3f}"
            rows.append((title, f"{one['score']:.3f}", parts))
    return rows


def _facts(store: Store, plan: Plan) -> list[tuple[str, str]]:
    rows = [
        ("model", plan.model),
        ("version", plan.model_version or "unknown"),
        ("reference", plan.source or "–"),
        ("labels that may raise an alarm", f"chosen by the rule '{plan.sampling}'"),
    ]
    rows += [
        (f"phase {one['phase']}", f"{one['began'][:10]}: {one['reason']}") for one in store.phases()
    ]
    for one in plan.promise:
        what = f"{one['change']} {one['size']:g}"
        found = one["labels_a_week"]
        rows.append(
            (
                f"to catch: {what}",
                f"{found:,} labels a week, within {one['within']} weeks"
                if found
                else f"not to be promised within {one['within']} weeks",
            )
        )
    return rows + [("note", note) for note in plan.notes]


def _figures(plan: Plan, labels: Labels, evidence: Evidence) -> Iterator[tuple[str, str, str]]:
    from companion.evaluation import figures as drawn
    from companion.evaluation.report import inline_figure

    if not evidence.tests or plan.accuracy is None:
        return
    caption = "Evidence against 'nothing has fallen', look by look; above its dotted line a test "
    yield inline_figure("evidence", caption + "raises its alarm.", _draw_evidence, evidence)
    caption = (
        "Accuracy of each look with its 95% interval; dashed: the reference; dotted: the lower "
        "limit that labels are held against."
    )
    yield inline_figure("accuracy", caption, _draw_looks, plan, labels)
    signed = labels.margin * np.sign(labels.outcome - 0.5)
    signed = signed[labels.outcome != 0.5]
    if plan.calibration is not None and signed.size:
        caption = (
            f"Reliability at T = {plan.calibration.temperature:.2f}: how often the model is right, "
            "by how sure it is. Points inside the bars are what a calibrated model shows by chance."
        )
        scaled = signed / plan.calibration.temperature
        yield inline_figure("reliability", caption, drawn.draw_reliability, scaled)


def _draw_evidence(ax: Axes, evidence: Evidence) -> None:
    from matplotlib.ticker import MaxNLocator

    from companion.evaluation.figures import BLUE, GREEN, GREY, ORANGE, SKY, YELLOW

    colours = (BLUE, ORANGE, GREEN, YELLOW, SKY, GREY)
    marks = "os^Dv*"
    # the slices with the most evidence: more lines than colours say nothing
    tests = sorted(evidence.tests, key=lambda test: -test.log_e[-1])[: len(colours)]
    for test, colour, mark in zip(tests, colours, marks, strict=False):
        ax.plot(evidence.looks, test.log_e, mark + "-", color=colour, label=test.name, markersize=4)
        ax.axhline(test.threshold, color=colour, linestyle=":", linewidth=1)
    ax.set_xlabel("look")
    ax.set_ylabel("log of the e-value (nats)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best")


def _draw_looks(ax: Axes, plan: Plan, labels: Labels) -> None:
    from matplotlib.ticker import MaxNLocator

    from companion.evaluation.figures import BLUE, GREY

    assert plan.accuracy is not None
    right = rightness(labels.margin, labels.outcome)
    looks = sorted(set(labels.look.tolist()))
    means, low, high = [], [], []
    for look in looks:
        own = np.flatnonzero(labels.look == look)
        prompts = by_group(right[own], [labels.prompt[i] for i in own])
        ends = bootstrap_interval(prompts, n_resamples=500)
        means.append(100 * float(prompts.mean()))
        low.append(100 * ends.low)
        high.append(100 * ends.high)
    ax.vlines(looks, low, high, color=BLUE, alpha=0.6, linewidth=3)
    ax.plot(looks, means, "o", color=BLUE, label="labels of the look")
    ax.axhline(100 * plan.accuracy.mean, color=GREY, linestyle="--", label="reference")
    ax.axhline(100 * plan.accuracy.null, color=GREY, linestyle=":", label="held against")
    ax.set_xlabel("look")
    ax.set_ylabel("accuracy (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best")
