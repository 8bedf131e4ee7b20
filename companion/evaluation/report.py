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

import numpy as np

from companion.evaluation import figures
from companion.evaluation.pairs import PairEvaluation, subset_rows, summary_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE_FILE = Path(__file__).parents[1] / "assets" / "report.css"
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


def _figure(name: str, caption: str, draw: Callable[[Axes], object], *, height: float = 3.3) -> str:
    """Draw one figure and return it as inline SVG whose colours follow the page's."""
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
    return f'<figure id="{name}">{svg}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        # an interval may move to a line of its own on a phone, but not break inside
        texts = (html.escape(str(cell)).replace(", ", ",&nbsp;") for cell in row)
        return "".join(f"<{tag}>{text}</{tag}>" for text in texts)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _text(value: Any) -> str:
    """Return a text or a list of messages as escaped HTML; long ones are cut, and say so."""
    if value is None:
        return ""
    if isinstance(value, str):
        turns = [("", value)]
    else:
        turns = [(str(m.get("role", "")), str(m.get("content") or "")) for m in value]
    parts = []
    for role, content in turns:
        note = ""
        if len(content) > _LONGEST_TEXT:
            left_out = len(content) - _LONGEST_TEXT
            content = content[:_LONGEST_TEXT]
            note = f'<span class="soft"> … {left_out:,} more characters</span>'
        name = f'<span class="role">{html.escape(role)}</span> ' if role else ""
        parts.append(f"<p>{name}{html.escape(content)}{note}</p>")
    return "".join(parts)


def _pair(row: Mapping[str, Any], number: int, result: PairEvaluation) -> str:
    facts = [f"margin {result.margins[number]:+.2f}"]
    if result.probability is not None:
        facts.append(f"true P(chosen) {result.probability[number]:.2f}")
    if row.get("subset") is not None:
        facts.append(str(row["subset"]))
    facts.append(f"row {row.get('id', number)}")
    prompt = f'<div class="text">{_text(row["prompt"])}</div>' if row.get("prompt") else ""
    sides = "".join(
        f'<div class="side {side}"><h4>{side} <span class="soft">{score:+.2f}</span></h4>'
        f'<div class="text">{_text(row.get(side))}</div></div>'
        for side, score in (
            ("chosen", result.chosen[number]),
            ("rejected", result.rejected[number]),
        )
    )
    return (
        f'<article class="pair"><p class="soft">{html.escape(" · ".join(facts))}</p>{prompt}'
        f'<div class="sides">{sides}</div></article>'
    )


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
) -> list[str]:
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
    pairs: Sequence[Mapping[str, Any]] | None = None,
    limit: Mapping[str, Any] | None = None,
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
    pairs : sequence of mappings, optional
        Rows to show as best and worst, in the order of the evaluation; by default its own.
    limit : mapping, optional
        In place of ``evaluation.metrics["limit"]``, of the same form.
    run_info : mapping, optional
        Facts of the run (name -> value), shown at the end.
    n_examples : int, default 5
        Best and worst pairs to show, of each.
    """
    metrics = evaluation.metrics
    limit = limit or metrics.get("limit") or {}
    best: Mapping[str, Any] = limit.get("rows", {})
    rows = evaluation.rows if pairs is None else pairs
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts.append(_table(("figure", "ours", "limit"), summary_rows(metrics, limit)))
    note = "The limit is what the true preference probabilities reach on the same labels. "
    parts.append(
        f'<p class="soft">{note if best else ""}A calibration error inside the interval '
        "beside it is no evidence of miscalibration: a calibrated model shows such values by "
        "chance. It compares the model's confidence with being right; a tie counts as wrong in "
        "the accuracy.</p>"
    )
    dropped = metrics["dropped"]
    if dropped["total"]:
        parts.append("<h2>Rows without a score</h2>")
        parts.append(
            _table(("reason", "rows"), [(k, f"{v:,}") for k, v in dropped["reasons"].items()])
        )
    parts.append('<h2>Figures</h2><div class="figures">')
    parts += [*_figures(evaluation, train_log, best), "</div>"]
    if metrics["subsets"]:
        head, *body = subset_rows(metrics)
        parts += ["<h2>Subsets</h2>", _table(head, body)]
    good, bad = _extremes(evaluation, rows, n_examples)
    for heading, places, empty in (
        ("Most sure, and right", good, "No pair is ordered as its label says."),
        ("Most sure, and wrong", bad, "No pair is ordered against its label."),
    ):
        if rows:
            parts.append(f"<h2>{heading}</h2>")
            parts += [_pair(rows[i], i, evaluation) for i in places] or [f"<p>{empty}</p>"]
    facts = {**evaluation.info, **dict(run_info or {})}
    if facts:
        shown = [(k, "–" if v is None else str(v)) for k, v in facts.items()]
        parts += ["<h2>Run</h2>", _table(("", "value"), shown, "facts")]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title>"
        f"<style>{_STYLE_FILE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target
