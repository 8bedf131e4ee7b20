"""Figures in one style, for the report and the book.

Each ``draw_*`` function draws on the axes that it is given and returns nothing, so that a page can
put them where it likes. Colours are Okabe and Ito's, and never the only sign: lines differ in
pattern, points in shape. Chapter 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binom

from companion.functional.calibration import confidence_and_correctness, reliability_bins
from companion.functional.resampling import Array, Values, vector

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE_FILE = Path(__file__).parents[1] / "assets" / "companion.mplstyle"
BLUE, ORANGE, GREEN, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9"
GREY = "#808080"
MOST_POINTS = 700


def use_style() -> None:
    """Take on the companion's style for all figures that follow."""
    import matplotlib.pyplot as plt

    plt.style.use(STYLE_FILE)


def style() -> AbstractContextManager[None]:
    """Return a context in which figures have the companion's style."""
    import matplotlib.pyplot as plt

    return plt.style.context(STYLE_FILE)


def _series(log: Sequence[Mapping[str, Any]], name: str) -> tuple[Array, Array]:
    """Steps and values of `name`, where the log has it."""
    points = [
        (row.get("step", number), row[name])
        for number, row in enumerate(log)
        if isinstance(row.get(name), (int, float))
    ]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def smooth(values: Values, width: int) -> Array:
    """Centred running mean over `width` values, narrower at the ends."""
    array = np.asarray(values, dtype=np.float64)
    if width <= 1 or array.size <= 2:
        return array
    kernel = np.ones(min(width, array.size))
    return np.convolve(array, kernel, "same") / np.convolve(np.ones_like(array), kernel, "same")


def draw_training_curve(
    ax: Axes,
    log: Sequence[Mapping[str, Any]],
    what: str = "loss",
    *,
    limit: float | None = None,
    percent: bool = False,
) -> None:
    """Draw a metric over the steps of training, as ``Trainer.state.log_history`` has it.

    Parameters
    ----------
    ax : Axes
    log : sequence of mappings
        With ``step``, and `what` or ``eval_`` + `what`.
    what : str, default "loss"
        Name of the metric.
    limit : float, optional
        The best that any model can reach.
    percent : bool, default False
        Show shares as percent.
    """
    unit = 100.0 if percent else 1.0
    steps, values = _series(log, what)
    if steps.size:
        ax.plot(steps, unit * values, color=BLUE, alpha=0.3, linewidth=1)
        mean = unit * smooth(values, max(1, steps.size // 12))
        ax.plot(steps, mean, color=BLUE, label="training (running mean)")
    steps, values = _series(log, f"eval_{what}")
    if steps.size:
        ax.plot(steps, unit * values, "o--", color=ORANGE, label="held out")
    if limit is not None:
        ax.axhline(unit * limit, color=GREEN, linestyle=":", label="best possible")
    ax.set_xlabel("step")
    ax.set_ylabel(f"{what} (%)" if percent else f"{what} (nats)" if what == "loss" else what)
    ax.legend()


def draw_reliability(ax: Axes, margins: Values, *, n_bins: int = 10, level: float = 0.95) -> None:
    """Draw how often the model is right against how sure it is, in bins of equal count.

    The bars show where a calibrated model's points lie by chance, bin by bin: `level` of the
    binomial distribution with the bin's confidence.

    Parameters
    ----------
    ax : Axes
    margins : array ``[n]``
        ``(chosen - rejected) / T``.
    n_bins : int, default 10
    level : float, default 0.95
    """
    confidence, correct = confidence_and_correctness(margins)
    bins = reliability_bins(confidence, correct, n_bins, "mass")
    low, high = binom.interval(level, bins.count, bins.confidence)
    ax.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":", label="calibrated")
    chance: Any = {"color": SKY, "alpha": 0.6, "linewidth": 6, "label": f"{level:.0%} by chance"}
    ax.vlines(bins.confidence, low / bins.count, high / bins.count, **chance)
    ax.plot(bins.confidence, bins.outcome, "o-", color=BLUE, label="model")
    ax.set_xlabel("confidence of the model")
    ax.set_ylabel("share that is right")
    ax.set_xlim(0.48, 1.02)
    ax.set_ylim(min(0.4, float(bins.outcome.min()) - 0.03), 1.03)
    ax.legend(loc="lower right")


def draw_margins(ax: Axes, margins: Values, *, n_bins: int = 40) -> None:
    """Draw the histogram of ``chosen - rejected``; wrong pairs stand left of 0, hatched.

    Parameters
    ----------
    ax : Axes
    margins : array ``[n]``
    n_bins : int, default 40
    """
    array = vector("margins", margins)
    low, high = min(float(array.min()), 0.0), max(float(array.max()), 0.0)
    width = max(high - low, 1e-9) / n_bins
    # 0 is an edge, so that no bar mixes right and wrong
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)
    if edges.size < 2:
        edges = np.array([-width, 0.0, width])
    # rounding may put the extremes just outside, and a tie belongs to the left of 0
    shown = np.clip(array, edges[0], edges[-1])
    wrong, right = np.minimum(shown[array <= 0], -1e-6 * width), shown[array > 0]
    share = wrong.size / array.size
    ax.hist(
        wrong, bins=list(edges), color=ORANGE, hatch="///", label=f"wrong or tied ({share:.0%})"
    )
    ax.hist(right, bins=list(edges), color=BLUE, label=f"right ({1 - share:.0%})")
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set_xlabel("margin (chosen − rejected)")
    ax.set_ylabel("pairs")
    ax.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_score_by_length(
    ax: Axes,
    chosen: Values,
    rejected: Values,
    chosen_lengths: Values,
    rejected_lengths: Values,
    *,
    seed: int = 0,
) -> int:
    """Draw scores against lengths, and the running median of all; return the points drawn.

    More than 700 pairs are thinned at random, with `seed`; the median is of all.

    Parameters
    ----------
    ax : Axes
    chosen, rejected : array ``[n]``
        Scores.
    chosen_lengths, rejected_lengths : array ``[n]``
        Tokens.
    seed : int, default 0
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    y = [vector("chosen", chosen), vector("rejected", rejected)]
    x = [vector("chosen_lengths", chosen_lengths), vector("rejected_lengths", rejected_lengths)]
    size = y[0].size
    shown = np.random.default_rng(seed).permutation(size)[: MOST_POINTS // 2]
    for side, color, marker, label in ((0, BLUE, "o", "chosen"), (1, ORANGE, "x", "rejected")):
        ax.scatter(
            x[side][shown], y[side][shown], s=14, c=color, marker=marker, alpha=0.45, label=label
        )
    length, score = np.concatenate(x), np.concatenate(y)
    parts = np.array_split(np.argsort(length, kind="stable"), min(12, max(1, length.size // 10)))
    medians = [[np.median(values[part]) for part in parts] for values in (length, score)]
    ax.plot(*medians, "s-", color=GREEN, markersize=4, label="median")
    if length.min() > 0 and length.max() > 20 * length.min():  # one long text must not squeeze all
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("length (tokens)")
    ax.set_ylabel("score")
    ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return 2 * shown.size


def draw_accuracy(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw accuracy with its interval beside the limit and the floor, one line for each row.

    Parameters
    ----------
    ax : Axes
    rows : sequence of mappings
        With ``name``, ``accuracy``, ``interval`` (low, high), and ``limit`` and ``floor``, which
        may be None. The first stands on top.
    """
    place = np.arange(len(rows))[::-1]
    ours = np.array([row["accuracy"] for row in rows])
    ends = np.array([row["interval"] for row in rows])
    reach = np.abs(ends.T - ours)
    ax.axvline(50, color=GREY, linestyle=":", linewidth=1.2, label="coin")
    for name, marker, color, label, size in (
        ("floor", "s", YELLOW, "longer wins", 6),
        ("limit", "|", GREEN, "best possible", 18),
    ):
        points = [
            (100 * r[name], y) for r, y in zip(rows, place, strict=True) if r[name] is not None
        ]
        if points:
            ax.plot(
                *zip(*points, strict=True),
                marker,
                color=color,
                label=label,
                markersize=size,
                markeredgewidth=3 if marker == "|" else 1,
            )
    ax.errorbar(
        100 * ours, place, xerr=100 * reach, fmt="o", color=BLUE, capsize=3, label="model [95%]"
    )
    # (a name with two $ is no formula)
    ax.set_yticks(place, [str(row["name"]) for row in rows], parse_math=False)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlabel("accuracy (%)")
    ax.grid(axis="y", visible=False)
    ax.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.0))
