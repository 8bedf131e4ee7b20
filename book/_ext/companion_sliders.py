"""Sphinx extension of the book: small figures in which a slider teaches.

``{slider-figure} loss`` and ``{slider-figure} centering`` put a drawing into the page as inline
SVG, with its sliders and the numbers that they change. Everything is in the page: it works from
the file system, without a network. What is drawn here, from the companion's losses, is the figure
at the sliders' first position, and it is what a reader without JavaScript sees. ``sliders.js``
computes the same formulas in the browser; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from companion.functional import (
    best_global_shift,
    bradley_terry_loss,
    bradley_terry_probability,
    centering_penalty,
)

SCRIPT = "sliders.js"
LEFT, RIGHT, WIDTH = 64, 350, 360
#: the five pairs of chapter 4; the last is a tie
CHOSEN = (1.0, 0.5, -0.2, 2.0, 0.0)
REJECTED = (0.0, 0.7, 0.3, 1.0, 0.0)
CURVE_POINTS = 97


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """As the page writes numbers: a real minus sign, and no minus before zero."""
    text = f"{value:.{digits}f}"
    if float(text) == 0.0:
        text = text.removeprefix("-")
    elif sign and value > 0:
        text = f"+{text}"
    return text.replace("-", "−")


@dataclass(frozen=True)
class Panel:
    """A rectangle with two axes; ``y`` grows upwards in the data and downwards on the screen."""

    x: tuple[float, float]
    y: tuple[float, float]
    top: float
    bottom: float

    def px(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (RIGHT - LEFT)

    def py(self, value: float) -> float:
        low, high = self.y
        return self.bottom + (value - low) / (high - low) * (self.top - self.bottom)

    def describe(self) -> dict[str, list[float]]:
        """What the script needs to map a value to a place: low, high, and where they lie."""
        return {"x": [*self.x, LEFT, RIGHT], "y": [*self.y, self.bottom, self.top]}

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        points = " L".join(
            f"{self.px(x):.2f} {self.py(y):.2f}" for x, y in zip(xs, ys, strict=True)
        )
        return f"M{points}"

    def axes(self, x_ticks: Sequence[float], y_ticks: Sequence[float], title: str) -> str:
        """Grid, tick labels (those below the panel only if there are `x_ticks`) and title."""
        parts = [
            f'<text class="title" x="{LEFT}" y="{self.top - 9:g}">{escape(title)}</text>',
        ]
        for value in y_ticks:
            y = self.py(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.2f} H{RIGHT}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 7}" y="{y + 4.5:.2f}" text-anchor="end">'
                f"{f'{value:g}'.replace('-', '−')}</text>"
            )
        for value in x_ticks:
            x = self.px(value)
            parts.append(f'<path class="grid" d="M{x:.2f} {self.top:g} V{self.bottom:g}"/>')
            parts.append(
                f'<text class="tick" x="{x:.2f}" y="{self.bottom + 19:g}" text-anchor="middle">'
                f"{f'{value:g}'.replace('-', '−')}</text>"
            )
        return "".join(parts)


@dataclass(frozen=True)
class Slider:
    """One control."""

    name: str
    label: str
    low: float
    high: float
    step: float
    start: float
    digits: int


@dataclass
class Drawing:
    """A figure at the first position of its sliders."""

    kind: str
    height: int
    title: str
    description: str
    sliders: tuple[Slider, ...]
    #: name -> its label, its value, its class (a colour, or nothing)
    outputs: dict[str, tuple[str, str, str]]
    panels: dict[str, Panel]
    data: dict[str, list[float]] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)

    def add(self, markup: str) -> None:
        self.parts.append(markup)

    def part(self, name: str, tag: str, css: str, **attributes: Any) -> None:
        """Something that the script moves."""
        text = "".join(
            f' {key.replace("_", "-")}="{value:.2f}"'
            if isinstance(value, float)
            else f' {key.replace("_", "-")}="{value}"'
            for key, value in attributes.items()
        )
        self.add(f'<{tag} data-part="{name}" class="{css}"{text}/>')

    def html(self, identity: str) -> str:
        """The figure as HTML; ids begin with `identity`."""
        settings = {
            "panels": {name: panel.describe() for name, panel in self.panels.items()},
            "points": CURVE_POINTS,
            **self.data,
        }
        clips = "".join(
            f'<clipPath id="{identity}-{name}"><rect x="{LEFT}" y="{panel.top:g}" '
            f'width="{RIGHT - LEFT}" height="{panel.bottom - panel.top:g}"/></clipPath>'
            for name, panel in self.panels.items()
        )
        body = "".join(self.parts).replace("@clip-", f"#{identity}-")
        controls = "".join(
            f'<label for="{identity}-in-{s.name}"><span>{escape(s.label)} '
            f'<output for="{identity}-in-{s.name}" data-shows="{s.name}">'
            f"{number(s.start, s.digits)}</output></span>"
            f'<input type="range" id="{identity}-in-{s.name}" data-slider="{s.name}" '
            f'data-digits="{s.digits}" min="{s.low:g}" max="{s.high:g}" step="{s.step:g}" '
            f'value="{s.start:g}" autocomplete="off"></label>'
            for s in self.sliders
        )
        shown = "".join(
            f'<div class="{css}"><dt>{escape(label)}</dt>'
            f'<dd data-output="{name}">{value}</dd></div>'
            for name, (label, value, css) in self.outputs.items()
        )
        return (
            f'<div class="slider-box" data-slider-figure="{self.kind}" '
            f'data-settings="{escape(json.dumps(settings), quote=True)}">'
            f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" '
            f'aria-labelledby="{identity}-title {identity}-text">'
            f'<title id="{identity}-title">{escape(self.title)}</title>'
            f'<desc id="{identity}-text">{escape(self.description)}</desc>'
            f"<defs>{clips}</defs>{body}</svg>"
            f'<div class="slider-controls" hidden>{controls}</div>'
            f'<dl class="slider-numbers">{shown}</dl>'
            "<noscript><p>The sliders of this figure need JavaScript; what you see is their first "
            "position.</p></noscript></div>"
        )


def _grid(panel: Panel) -> torch.Tensor:
    return torch.linspace(*panel.x, CURVE_POINTS, dtype=torch.float64)


def _score_row(drawing: Drawing, panel: Panel, y: float, name: str, label: str) -> None:
    drawing.add(f'<path class="grid" d="M{LEFT} {y:g} H{RIGHT}"/>')
    drawing.add(
        f'<text class="tick {name}" x="{LEFT - 7}" y="{y + 4.5:g}" text-anchor="end">'
        f"{escape(label)}</text>"
    )


def draw_loss() -> Drawing:
    """Loss and gradient of a pair against its margin, and the forces on its two scores."""
    slider = Slider("margin", "margin Δ = r_c − r_r", -6, 6, 0.1, -1.0, 1)
    loss_panel = Panel((-6, 6), (0, 6), 30, 170)
    gradient_panel = Panel((-6, 6), (-1, 0), 206, 282)
    scores_panel = Panel((-4, 4), (0, 1), 352, 412)
    margin = torch.tensor(slider.start, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros((), dtype=torch.float64)
    loss = bradley_terry_loss(margin, zero)
    loss.backward()
    assert margin.grad is not None
    slope, at, height = float(margin.grad), slider.start, float(loss.detach())
    probability = float(bradley_terry_probability(margin.detach(), zero))

    grid = _grid(loss_panel).requires_grad_()
    losses = bradley_terry_loss(grid, torch.zeros_like(grid))
    losses.sum().backward()
    assert grid.grad is not None
    xs = grid.detach().tolist()

    drawing = Drawing(
        "loss",
        440,
        "Loss and gradient against the margin",
        "The loss falls along a curve from 6 to nearly 0 while the margin goes from minus 6 to 6; "
        "the gradient rises from minus 1 to 0. Below, two scores and the forces that pull them "
        "apart.",
        (slider,),
        {
            "probability": ("P(chosen wins) = σ(Δ)", number(probability, 3), ""),
            "loss": ("loss = −log σ(Δ)", number(height, 3), "line"),
            "gradient": ("gradient = −(1 − p)", number(slope, 3), "second"),
        },
        {"loss": loss_panel, "gradient": gradient_panel, "scores": scores_panel},
    )
    ticks = (-6, -4, -2, 0, 2, 4, 6)
    drawing.add(loss_panel.axes((), (0, 2, 4, 6), "loss (nats), and its tangent"))
    drawing.add(gradient_panel.axes(ticks, (-1, -0.5, 0), "gradient for r_c"))
    x = loss_panel.px(at)
    drawing.part("guide", "line", "guide", x1=x, x2=x, y1=loss_panel.top, y2=gradient_panel.bottom)
    drawing.add(f'<path class="line" d="{loss_panel.path(xs, losses.detach().tolist())}"/>')
    drawing.add(f'<path class="second" d="{gradient_panel.path(xs, grid.grad.tolist())}"/>')
    ends = (loss_panel.x[0], loss_panel.x[1])
    first, last = (loss_panel.py(height + slope * (end - at)) for end in ends)
    drawing.part(
        "tangent", "line", "tangent", clip_path="url(@clip-loss)",
        x1=float(LEFT), x2=float(RIGHT), y1=first, y2=last,
    )  # fmt: skip
    drawing.part("point-loss", "circle", "dot line", r=5.5, cx=x, cy=loss_panel.py(height))
    drawing.part("point-gradient", "circle", "dot second", r=5.5, cx=x, cy=gradient_panel.py(slope))
    drawing.add(f'<text class="title" x="{LEFT}" y="330">the two scores, and how they pull</text>')
    for name, side, y in (("chosen", 1, 356.0), ("rejected", -1, 392.0)):
        _score_row(drawing, scores_panel, y, name, name)
        place = scores_panel.px(side * at / 2)
        tip = place - side * slope * FORCE
        drawing.part(f"force-{name}", "line", f"force {name}", x1=place, x2=tip, y1=y, y2=y)
        drawing.part(f"head-{name}", "path", f"head {name}", d=_head(tip, y, side))
        if side > 0:
            drawing.part(name, "circle", f"dot {name}", r=6.5, cx=place, cy=y)
        else:
            drawing.part(name, "rect", f"dot {name}", width=12.0, height=12.0, x=place - 6, y=y - 6)
    for value in (-3, 0, 3):
        drawing.add(
            f'<text class="tick" x="{scores_panel.px(value):.2f}" y="424" text-anchor="middle">'
            f"{number(value, 0, sign=True)}</text>"
        )
    return drawing


#: length of the arrow of a pull of 1
FORCE = 40.0


def _head(tip: float, y: float, side: int) -> str:
    return f"M{tip:.2f} {y - 4.5:.2f} L{tip + side * 7:.2f} {y:.2f} L{tip:.2f} {y + 4.5:.2f} Z"


def draw_centering() -> Drawing:
    """Penalised total of five pairs against a shift of all their scores."""
    shift = Slider("shift", "shift s, added to all scores", -4, 4, 0.01, 2.0, 2)
    coefficient = Slider("coefficient", "coefficient c", 0, 0.1, 0.005, 0.02, 3)
    total_panel = Panel((-4, 4), (0, 2), 58, 206)
    pairs_panel = Panel((-5, 6.5), (0, 1), 276, 416)
    chosen, rejected = (torch.tensor(x, dtype=torch.float64) for x in (CHOSEN, REJECTED))

    def parts_of(s: float) -> tuple[float, float]:
        moved = chosen + s, rejected + s
        return (
            float(bradley_terry_loss(*moved).mean()),
            coefficient.start * float(centering_penalty(*moved).mean()),
        )

    s, best = shift.start, float(best_global_shift(chosen, rejected))
    loss, penalty = parts_of(s)
    mean = float(torch.cat([chosen, rejected]).mean()) + s
    xs = _grid(total_panel).tolist()

    drawing = Drawing(
        "centering",
        446,
        "The penalised total against a shift of all scores",
        "The Bradley-Terry loss is a flat line: it does not see the shift. With the penalty the "
        "total is a parabola with one lowest point. Below, the scores of five pairs on a line.",
        (shift, coefficient),
        {
            "loss": ("Bradley–Terry loss", number(loss, 4), "second"),
            "penalty": ("c · mean (r_c + r_r)²", number(penalty, 4), ""),
            "total": ("total", number(loss + penalty, 4), "line"),
            "mean": ("mean of all scores", number(mean, 2), ""),
            "best": ("best shift", number(best, 2), "best"),
        },
        {"total": total_panel, "pairs": pairs_panel},
        {"chosen": list(CHOSEN), "rejected": list(REJECTED)},
    )
    drawing.add(
        '<path class="line" d="M64 17 h20"/><text class="tick" x="88" y="21.5">total</text>'
        '<path class="second dotted" d="M132 17 h20"/>'
        '<text class="tick" x="157" y="21.5">without penalty</text>'
        '<path class="best" d="M275 17 h20"/><text class="tick" x="300" y="21.5">best</text>'
    )
    drawing.add(total_panel.axes((-4, -2, 0, 2, 4), (0, 0.5, 1, 1.5, 2), "loss (nats) against s"))
    at = total_panel.px(best)
    drawing.part("best", "line", "best", x1=at, x2=at, y1=total_panel.top, y2=total_panel.bottom)
    flat = total_panel.path(xs, [parts_of(x)[0] for x in xs])
    drawing.add(f'<path class="second dotted" d="{flat}"/>')
    curve = total_panel.path(xs, [sum(parts_of(x)) for x in xs])
    drawing.part("curve", "path", "line", clip_path="url(@clip-total)", d=curve)
    drawing.part(
        "point", "circle", "dot line", r=5.5,
        cx=total_panel.px(s), cy=total_panel.py(min(loss + penalty, total_panel.y[1])),
    )  # fmt: skip
    drawing.add(
        f'<text class="title" x="{LEFT}" y="258">five pairs, shifted: '
        '<tspan class="chosen">● chosen</tspan> <tspan class="rejected">□ rejected</tspan></text>'
    )
    zero = pairs_panel.px(0)
    drawing.add(f'<path class="zero" d="M{zero:.2f} 270 V422"/>')
    mean_at = pairs_panel.px(mean)
    drawing.part("mean", "line", "guide", x1=mean_at, x2=mean_at, y1=270.0, y2=422.0)
    for index, (c, r) in enumerate(zip(CHOSEN, REJECTED, strict=True)):
        y = 284.0 + 30 * index
        drawing.add(f'<path class="grid" d="M{LEFT} {y:g} H{RIGHT}"/>')
        drawing.add(
            f'<text class="tick" x="{LEFT - 7}" y="{y + 4.5:g}" text-anchor="end">{index + 1}'
            "</text>"
        )
        place = pairs_panel.px(r + s)
        drawing.part(
            f"rejected-{index}", "rect", "dot rejected",
            width=11.0, height=11.0, x=place - 5.5, y=y - 5.5,
        )  # fmt: skip
        drawing.part(
            f"chosen-{index}", "circle", "dot chosen", r=4.5, cx=pairs_panel.px(c + s), cy=y
        )
    for value in (-4, -2, 0, 2, 4, 6):
        drawing.add(
            f'<text class="tick" x="{pairs_panel.px(value):.2f}" y="439" text-anchor="middle">'
            f"{number(value, 0)}</text>"
        )
    return drawing


DRAWINGS: dict[str, Callable[[], Drawing]] = {"loss": draw_loss, "centering": draw_centering}


class SliderFigure(SphinxDirective):
    """A figure with sliders; the content is its caption."""

    required_arguments = 1
    has_content = True
    option_spec = {"name": directives.unchanged}  # noqa: RUF012 (docutils' own form)

    def run(self) -> list[nodes.Node]:
        kind = self.arguments[0]
        if kind not in DRAWINGS:
            raise self.error(f"no slider figure {kind!r}; there are: {', '.join(DRAWINGS)}")
        identity = f"slider-{kind}-{self.env.new_serialno('slider-figure')}"
        figure = nodes.figure(classes=["slider-figure"])
        figure += nodes.raw("", DRAWINGS[kind]().html(identity), format="html")
        caption = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, caption)
        if len(caption) != 1 or not isinstance(caption[0], nodes.paragraph):
            raise self.error("a slider figure takes one paragraph, its caption")
        figure += nodes.caption(caption[0].rawsource, "", *caption[0].children)
        self.set_source_info(figure)
        self.add_name(figure)
        return [figure]


def add_script(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Load the script on the pages that have such a figure, and on no other."""
    if doctree is not None and any(
        "slider-figure" in figure["classes"] for figure in doctree.findall(nodes.figure)
    ):
        app.add_js_file(SCRIPT, loading_method="defer")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("slider-figure", SliderFigure)
    app.connect("html-page-context", add_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
