"""One HTML file that shows how good a reward model is.

Self-contained: style and figures are in the file, nothing is fetched, nothing runs. It follows the
reader's light or dark scheme, and is readable on a phone. All text that comes from data is escaped.
Chapter 4.
"""

from __future__ import annotations

import html
import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from companion.data.writing import write_text
from companion.errors import first_line
from companion.evaluation import figures
from companion.evaluation.pairs import PairEvaluation, subset_rows, summary_rows

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets"
TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), autoescape=True)
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


def inline_figure(
    name: str,
    caption: str,
    draw: Callable[..., Any],
    *given: Any,
    height: float = 3.3,
    **options: Any,
) -> tuple[str, str, str]:
    """Name, caption, and the figure as inline SVG whose colours follow the page's.

    It is what ``draw(axes, *given, **options)`` draws.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with figures.style(), matplotlib.rc_context({"svg.hashsalt": name}):
        # A Figure of its own, without pyplot: no window system, no global state.
        figure = Figure(figsize=(4.8, height), layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)
        buffer = io.BytesIO()
        try:
            draw(axes, *given, **options)
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
        except Exception as error:  # the figures of hours are not lost by a name that does not draw
            logger.warning(f"the figure {name!r} cannot be drawn: {error!r}")
            return name, caption, f"<p>It could not be drawn: {html.escape(first_line(error))}</p>"
    svg = buffer.getvalue().decode("utf-8")
    svg = svg[svg.index("<svg") :]
    # Several figures share one page: their ids must not meet.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = re.sub(colour, f"var(--{variable})", svg, flags=re.IGNORECASE)
    # Without a colour of its own, text is black.
    svg = svg.replace("<text ", '<text fill="currentColor" ')
    label = html.escape(caption, quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    # The page gives it its width.
    svg = re.sub(r' (?:width|height)="[^"]*"', "", svg, count=2)
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


def _accuracy_rows(metrics: Mapping[str, Any], best: Mapping[str, Any]) -> list[dict[str, Any]]:
    def row(name: str, figures_: Mapping[str, Any], limit: float | None) -> dict[str, Any]:
        longer = figures_.get("longer_wins") or {}
        return {
            "name": name if len(name) <= 24 else name[:23] + "…",
            "accuracy": figures_["accuracy"],
            "interval": figures_["accuracy_interval"],
            "limit": limit,
            "floor": longer.get("accuracy"),
        }

    largest = sorted(metrics["subsets"].items(), key=lambda item: -item[1]["n"])[:_MOST_SUBSETS]
    rows = [row("all pairs", metrics, best.get("accuracy"))]
    return rows + [row(name, some, some["limit_accuracy"]) for name, some in sorted(largest)]


def _figures(
    result: PairEvaluation, train_log: Sequence[Mapping[str, Any]], best: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    metrics, keep = result.metrics, np.isfinite(result.margins)
    margins = result.margins[keep]
    for what, percent in (("loss", False), ("accuracy", True)):
        if any(name in row for row in train_log for name in (what, f"eval_{what}")):
            yield inline_figure(
                f"training-{what}",
                f"Training: {what} over the steps"
                + (", and the best possible on the held-out labels." if best else "."),
                figures.draw_training_curve,
                train_log,
                what,
                limit=best.get(what),
                percent=percent,
            )
    rows = _accuracy_rows(metrics, best)
    caption = "Accuracy with its 95% interval"
    caption += " against the best possible on the same labels" if best else ""
    caption += " and the floor 'the longer one wins'." if metrics.get("longer_wins") else "."
    if len(metrics["subsets"]) > _MOST_SUBSETS:
        caption += f" The {_MOST_SUBSETS} largest of {len(metrics['subsets'])} subsets."
    height = max(2.6, 1.7 + 0.36 * len(rows))
    yield inline_figure("accuracy", caption, figures.draw_accuracy, rows, height=height)
    caption = (
        "Reliability at T = 1: how often the model is right, by how sure it is. Points inside the "
        "bars are what a calibrated model shows by chance."
    )
    yield inline_figure("reliability", caption, figures.draw_reliability, margins)
    warm = metrics.get("at_temperature")
    if warm and warm["temperature"] != 1.0:
        caption = f"Reliability at the model's temperature, T = {warm['temperature']:.2f}."
        scaled = margins / warm["temperature"]
        yield inline_figure("reliability-t", caption, figures.draw_reliability, scaled)
    caption = "Margins of all pairs. Left of 0 the model prefers the rejected completion."
    yield inline_figure("margins", caption, figures.draw_margins, margins)
    if metrics.get("score_length"):
        link = metrics["score_length"]["spearman"]
        shown = min(2 * margins.size, figures.MOST_POINTS)
        caption = "Score against length in tokens (prompt included)"
        caption += "" if link is None else f"; rank correlation {link:.2f}"
        caption += f". {shown:,} of {2 * margins.size:,} texts are drawn, the median is of all."
        sides = (
            *(result.chosen, result.rejected),
            *(result.chosen_lengths, result.rejected_lengths),
        )
        columns = [values[keep] for values in sides]
        yield inline_figure("length", caption, figures.draw_score_by_length, *columns)


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
    rows, margins = evaluation.rows, evaluation.margins
    # the greatest positive margins, and the least that are not positive; no NaN is either
    order = [int(i) for i in np.argsort(margins, kind="stable")] if rows else []
    good = [i for i in reversed(order) if margins[i] > 0][:n_examples]
    bad = [i for i in order if margins[i] <= 0][:n_examples]
    examples = (
        ("Most sure, and right", good, "No pair is ordered as its label says."),
        ("Most sure, and wrong", bad, "No pair is ordered against its label."),
    )
    facts = {**evaluation.info, **dict(run_info or {})}
    page = TEMPLATES.get_template("report.html").render(
        title=title,
        style=(ASSETS / "report.css").read_text(encoding="utf-8"),
        longest=_LONGEST_TEXT,
        summary=summary_rows(metrics),
        limited=bool(best),
        dropped=[(why, f"{count:,}") for why, count in metrics["dropped"]["reasons"].items()],
        figures=_figures(evaluation, train_log or (), best),
        subsets=subset_rows(metrics),
        examples=[
            (heading, [_pair(evaluation, rows, i) for i in places], empty)
            for heading, places, empty in examples
            if rows
        ],
        facts=[(name, "–" if value is None else str(value)) for name, value in facts.items()],
    )
    return write_text(path, page)
