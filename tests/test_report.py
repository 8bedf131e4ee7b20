"""The report: complete, self-contained, escaped; and the figures it draws."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from companion import write_report
from companion.evaluation import PairEvaluation, evaluate_pairs, figures
from companion.evaluation.report import inline_figure

EVIL = "<script>alert('x')</script> & <b>\"bold\"</b>"


class Scorer:
    def __init__(self, temperature: float | None = 1.5) -> None:
        self.manifest = SimpleNamespace(temperature=temperature)

    def score_pairs(self, rows: Any, **_: Any) -> Any:
        random = np.random.default_rng(0)
        chosen, rejected = random.normal(0.7, 1, len(rows)), random.normal(0, 1, len(rows))
        chosen[0] = rejected[0] = np.nan
        return SimpleNamespace(
            chosen=chosen,
            rejected=rejected,
            chosen_tokens=random.integers(5, 50, len(rows)),
            rejected_tokens=random.integers(5, 50, len(rows)),
            reasons=["more than 512 tokens", *[None] * (len(rows) - 1)],
        )


def rows(n: int = 60, gold: bool = True) -> list[dict[str, Any]]:
    result = []
    for i in range(n):
        row: dict[str, Any] = {
            "prompt": [{"role": "user", "content": f"{EVIL} question {i}"}],
            "chosen": [{"role": "assistant", "content": f"{EVIL} chosen {i} " + "x" * 3000}],
            "rejected": f"{EVIL} rejected {i}",
            "subset": EVIL if i % 2 else "plain",
            "id": EVIL,
        }
        if gold:
            row["probability"] = 0.8
        result.append(row)
    return result


@pytest.fixture(scope="module")
def result() -> PairEvaluation:
    return evaluate_pairs(Scorer(), rows(), info={"model": EVIL})


LOG = [
    {"loss": 0.6, "accuracy": 0.6, "step": 10},
    {"loss": 0.5, "accuracy": 0.7, "step": 20},
    {"eval_loss": 0.55, "eval_accuracy": 0.65, "step": 20},
    {"train_runtime": 3.0, "step": 20},
]


class Page(HTMLParser):
    """Collects tags and ids, and checks that what opens closes."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name in ("src", "href", "xlink:href") and value:
                self.links.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_report_is_complete_escaped_and_self_contained(
    result: PairEvaluation, tmp_path: Path
) -> None:
    path = write_report(
        tmp_path / "new" / "report.html",
        title=EVIL,
        evaluation=result,
        train_log=LOG,
        run_info={"note": EVIL},
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "b" not in page.tags
    shown = " ".join(page.texts)
    assert "<script>alert('x')</script>" in shown  # as text, that is
    # nothing is fetched: every link is to a part of the page itself
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    wanted = {"training-loss", "training-accuracy", "accuracy", "reliability", "reliability-t"}
    assert wanted | {"margins", "length"} <= set(page.ids)
    assert page.tags.count("svg") == 7
    for part in ("Most sure, and right", "Most sure, and wrong", "more than 512 tokens", "Run"):
        assert part in shown
    assert "more characters" in shown
    # colours follow the scheme: no fixed one of the palette is left in the figures
    assert "prefers-color-scheme: dark" in text
    svg = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)).lower()
    for colour in (figures.BLUE, figures.ORANGE, figures.GREEN, "#222222", "#000000"):
        assert colour.lower() not in svg
    assert "var(--blue)" in svg


def test_a_dollar_in_a_name_is_no_formula(result: PairEvaluation, tmp_path: Path) -> None:
    """And a figure that cannot be drawn does not take the page with it."""
    figures_ = result.metrics["subsets"]
    some = next(iter(figures_.values()))
    figures_["$\\frac{x$ and $5"] = some
    page = write_report(tmp_path / "r.html", title="t", evaluation=result).read_text()
    assert "could not be drawn" not in page
    Page(page)

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("<no figure>")

    name, caption, drawn = inline_figure("margins", "Margins", broken)
    assert (name, caption) == ("margins", "Margins")
    assert "could not be drawn: &lt;no figure&gt;" in drawn


def test_best_and_worst_pairs_are_those(result: PairEvaluation, tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", title="t", evaluation=result, n_examples=2)
    text = path.read_text(encoding="utf-8")
    order = np.argsort(result.margins[1:]) + 1
    shown = [int(n) for n in re.findall(r"question (\d+)", text)]
    assert shown == [order[-1], order[-2], order[0], order[1]]


def test_report_without_truth_log_lengths_or_rows(tmp_path: Path) -> None:
    small = evaluate_pairs(Scorer(temperature=None), rows(8, gold=False))
    small.metrics["score_length"] = None
    small.rows = []
    page = Page(
        write_report(tmp_path / "r.html", title="t", evaluation=small).read_text(encoding="utf-8")
    )
    assert {"accuracy", "reliability", "margins"} <= set(page.ids)
    assert not {"training-loss", "reliability-t", "length"} & set(page.ids)
    assert "article" not in page.tags


def test_the_report_is_the_same_each_time(result: PairEvaluation, tmp_path: Path) -> None:
    texts = [
        write_report(tmp_path / name, title="t", evaluation=result).read_bytes() for name in "ab"
    ]
    assert texts[0] == texts[1]


def test_the_style_stays_in_the_report(result: PairEvaluation, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    write_report(tmp_path / "r.html", title="t", evaluation=result)
    assert dict(matplotlib.rcParams) == before


# --- figures ----------------------------------------------------------------------------------


def test_use_style() -> None:
    with matplotlib.rc_context():
        figures.use_style()
        colours = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
        assert colours[:2] == [figures.BLUE, figures.ORANGE]


def test_margin_bars_hold_every_pair_and_split_at_zero() -> None:
    for margins in (
        np.array([-1.0, 0.0, 0.0, 2.0, 3.0]),
        np.zeros(3),
        np.random.default_rng(0).normal(0.3, 2, 500),
        np.array([1e6, 1e6 + 1]),
    ):
        axes = Figure().add_subplot()
        figures.draw_margins(axes, margins)
        bars = list(axes.patches)
        assert sum(bar.get_height() for bar in bars) == margins.size  # type: ignore[attr-defined]
        left = [b.get_height() for b in bars if b.get_x() + b.get_width() / 2 < 0]  # type: ignore[attr-defined]
        assert sum(left) == (margins <= 0).sum()


def test_reliability_points_are_the_bins() -> None:
    margins = np.random.default_rng(0).normal(1, 2, 1000)
    axes = Figure().add_subplot()
    figures.draw_reliability(axes, margins)
    line = axes.get_lines()[-1]
    assert len(line.get_xdata()) == 10  # type: ignore[arg-type]
    assert np.mean(line.get_ydata()) == pytest.approx((margins > 0).mean(), abs=0.01)


def test_scatter_is_thinned_and_says_how_many() -> None:
    random = np.random.default_rng(0)
    axes = Figure().add_subplot()
    many = [random.normal(size=5000) for _ in range(4)]
    assert figures.draw_score_by_length(axes, *many) == figures.MOST_POINTS
    assert sum(len(c.get_offsets()) for c in axes.collections) == figures.MOST_POINTS  # type: ignore[arg-type]
    few = [random.normal(size=3) for _ in range(4)]
    assert figures.draw_score_by_length(Figure().add_subplot(), *few) == 6


def test_training_curve_takes_what_there_is() -> None:
    axes = Figure().add_subplot()
    figures.draw_training_curve(axes, LOG, "loss", limit=0.4)
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [2, 2, 1, 2]  # type: ignore[arg-type]
    assert figures.smooth([1.0, 1.0, 4.0], 3).tolist() == pytest.approx([1.0, 2.0, 2.5])
