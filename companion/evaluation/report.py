"""One HTML file that shows how good a reward model is.

Self-contained: style and figures are in the file, nothing is fetched, nothing runs. It follows the
reader's light or dark scheme, and is readable on a phone. All text that comes from data is escaped.
Chapter 4.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from companion.evaluation import figures
from companion.evaluation.pairs import PairEvaluation, subset_rows, summary_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ASSETS = Path(__file__).parents[1] / "assets"
_TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True)
_LONGEST_TEXT = 2000
_MOST_SUBSETS = 12
#: colours of the figures -> variables of the page, which differ between light and dark
_VARIABLES = {
    figures.BLUE: "blue",
    figures.ORANGE: "orange",
    figures.GREEN: "green",
    figures.YELLOW: "yellow",
    figures.SKY: "sky",
    figures.GREY: "grey",
    "#222222": "text",
    "#555555": "soft",
    "#dddddd": "grid",
}


def _figure(
    name: str, caption: str, draw: Callable[[Axes], object], *, height: float = 3.3
) -> tuple[str, str, str]:
    """Name, caption, and the figure as inline SVG whose colours follow the page's."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with figures.style(), matplotlib.rc_context({"svg.hashsalt": name}):
        # A Figure of its own, without pyplot: no window system, no global state.
        figure = Figure(figsize=(4.8, height), layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)
        draw(axes)
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue().decode("utf-8")
    svg = svg[svg.index("<svg") :]
    # Several figures share one page: their ids must not meet.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    for colour, variable in _VARIABLES.items():
        svg = re.sub(colour, f"var(--{variable})", svg, flags=re.IGNORECASE)
    # Without a colour of its own, text is black.
    svg = svg.replace("<text ", '<text fill="currentColor" ')
    label = html.escape(caption, quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return name, caption, svg


def _pair(result: PairEvaluation, rows: Sequence[Mapping[str, Any]], number: int) -> dict[str, Any]:
    """What the page shows of a pair."""
    row = rows[number]
    facts = [f"margin {result.margins[number]:+.2f}"]
    if result.probability is not None:
        facts.append(f"true P(chosen) {result.probability[number]:.2f}")
    if row.get("subset") is not None:
        facts.append(str(row["subset"]))
    facts.append(f"row {row.get('id', number)}")
    sides = (("chosen", result.chosen[number]), ("rejected", result.rejected[number]))
    return {"facts": " · ".join(facts), "row": row, "sides": sides}


def _extremes(
    result: PairEvaluation, rows: Sequence[Mapping[str, Any]], count: int
) -> tuple[list[int], list[int]]:
    """Rows with the greatest positive margins, and rows with the least that are not positive."""
    order = [int(i) for i in np.argsort(result.margins, kind="stable") if i < len(rows)]
    order = [i for i in order if np.isfinite(result.margins[i])]
    best = [i for i in reversed(order) if result.margins[i] > 0][:count]
    return best, [i for i in order if result.margins[i] <= 0][:count]


def _accuracy_rows(metrics: Mapping[str, Any], best: Mapping[str, Any]) -> list[dict[str, Any]]:
    def row(name: str, figures_: Mapping[str, Any], limit: float | None) -> dict[str, Any]:
        longer = figures_.get("longer_wins")
        return {
            "name": name if len(name) <= 24 else name[:23] + "…",
            "accuracy": figures_["accuracy"],
            "interval": figures_["accuracy_interval"],
            "limit": limit,
            "floor": longer["accuracy"] if longer else None,
        }

    largest = sorted(metrics["subsets"].items(), key=lambda item: -item[1]["n"])[:_MOST_SUBSETS]
    rows = [row("all pairs", metrics, best.get("accuracy"))]
    return rows + [row(name, some, some["limit_accuracy"]) for name, some in sorted(largest)]


def _figures(
    result: PairEvaluation,
    train_log: Sequence[Mapping[str, Any]] | None,
    best: Mapping[str, Any],
) -> list[tuple[str, str, str]]:
    metrics, keep = result.metrics, np.isfinite(result.margins)
    margins = result.margins[keep]
    parts = []
    for what, percent in (("loss", False), ("accuracy", True)):
        log = list(train_log or ())
        if any(name in row for row in log for name in (what, f"eval_{what}")):
            parts.append(
                _figure(
                    f"training-{what}",
                    f"Training: {what} over the steps"
                    + (", and the best possible on the held-out labels." if best else "."),
                    lambda ax, w=what, p=percent, log=log: figures.draw_training_curve(  # type: ignore[misc]
                        ax, log, w, limit=best.get(w), percent=p
                    ),
                )
            )
    rows = _accuracy_rows(metrics, best)
    caption = "Accuracy with its 95% interval"
    caption += " against the best possible on the same labels" if best else ""
    caption += " and the floor 'the longer one wins'." if metrics.get("longer_wins") else "."
    if len(metrics["subsets"]) > _MOST_SUBSETS:
        caption += f" The {_MOST_SUBSETS} largest of {len(metrics['subsets'])} subsets."
    parts.append(
        _figure(
            "accuracy",
            caption,
            lambda ax: figures.draw_accuracy(ax, rows),
            height=max(2.6, 1.7 + 0.36 * len(rows)),
        )
    )
    parts.append(
        _figure(
            "reliability",
            "Reliability at T = 1: how often the model is right, by how sure it is. Points inside "
            "the bars are what a calibrated model shows by chance.",
            lambda ax: figures.draw_reliability(ax, margins),
        )
    )
    warm = metrics.get("at_temperature")
    if warm and warm["temperature"] != 1.0:
        parts.append(
            _figure(
                "reliability-t",
                f"Reliability at the model's temperature, T = {warm['temperature']:.2f}.",
                lambda ax: figures.draw_reliability(ax, margins / warm["temperature"]),
            )
        )
    parts.append(
        _figure(
            "margins",
            "Margins of all pairs. Left of 0 the model prefers the rejected completion.",
            lambda ax: figures.draw_margins(ax, margins),
        )
    )
    if metrics.get("score_length"):
        link = metrics["score_length"]["spearman"]
        shown = min(2 * margins.size, figures.MOST_POINTS)
        parts.append(
            _figure(
                "length",
                "Score against length in tokens (prompt included)"
                + ("" if link is None else f"; rank correlation {link:.2f}")
                + f". {shown:,} of {2 * margins.size:,} texts are drawn, the median is of all.",
                lambda ax: figures.draw_score_by_length(
                    ax,
                    result.chosen[keep],
                    result.rejected[keep],
                    result.chosen_lengths[keep],
                    result.rejected_lengths[keep],
                ),
            )
        )
    return parts


def write_report(
    path: str | Path,
    *,
    title: str,
    evaluation: PairEvaluation,
    train_log: Sequence[Mapping[str, Any]] | None = None,
    run_info: Mapping[str, Any] | None = None,
    n_examples: int = 5,
) -> Path:
    """Write the report and return its path; folders are made.

    Parameters
    ----------
    path : str or Path
        The HTML file.
    title : str
        Heading of the page.
    evaluation : PairEvaluation
        Of :func:`companion.evaluation.evaluate_pairs`.
    train_log : sequence of mappings, optional
        ``Trainer.state.log_history``: gives the training curves.
    run_info : mapping, optional
        Facts of the run (name -> value), shown at the end.
    n_examples : int, default 5
        Best and worst pairs to show, of each.
    """
    metrics = evaluation.metrics
    best: Mapping[str, Any] = (metrics.get("limit") or {}).get("rows", {})
    rows = evaluation.rows
    good, bad = _extremes(evaluation, rows, n_examples)
    examples = (
        ("Most sure, and right", good, "No pair is ordered as its label says."),
        ("Most sure, and wrong", bad, "No pair is ordered against its label."),
    )
    facts = {**evaluation.info, **dict(run_info or {})}
    page = _TEMPLATES.get_template("report.html").render(
        title=title,
        style=(_ASSETS / "report.css").read_text(encoding="utf-8"),
        longest=_LONGEST_TEXT,
        summary=summary_rows(metrics),
        limited=bool(best),
        dropped=[(why, f"{count:,}") for why, count in metrics["dropped"]["reasons"].items()],
        figures=_figures(evaluation, train_log, best),
        subsets=subset_rows(metrics),
        examples=[
            (heading, [_pair(evaluation, rows, i) for i in places], empty)
            for heading, places, empty in examples
            if rows
        ],
        facts=[(name, "–" if value is None else str(value)) for name, value in facts.items()],
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target
