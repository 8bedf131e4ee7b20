"""The built pages in headless Chromium, from the file system and without a network."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import bs4
import pytest
import torch
from book_pages import BOOK, load_module
from chromium import axe, watch

from companion.functional import (
    best_global_shift,
    bradley_terry_loss,
    bradley_terry_probability,
    centering_penalty,
)

sliders = load_module(BOOK / "_ext" / "companion_sliders.py")
#: name -> width in pixels, colour scheme
VIEWS = {"desktop": (1200, "light"), "phone": (390, "dark")}

_LOOK = """async () => {
  await (window.MathJax?.startup?.promise ?? Promise.resolve());
  const shown = (e) => e.getClientRects().length > 0;
  const pictures = [...document.querySelectorAll("article img")].filter(shown);
  pictures.forEach((e) => { e.loading = "eager"; });
  await Promise.all(pictures.map((e) => e.decode().catch(() => {})));
  const formulas = [...document.querySelectorAll("article .math")];
  return {
    theme: document.documentElement.dataset.theme,
    width: document.documentElement.scrollWidth,
    pictures: pictures.length,
    broken: pictures.filter((e) => !(e.naturalWidth > 0)).map((e) => e.src.slice(0, 80)),
    formulas: formulas.length,
    raw: formulas.filter((e) => !e.querySelector("mjx-container")).map((e) => e.textContent),
    wrong: [...document.querySelectorAll("mjx-merror")].map((e) => e.textContent),
    wide: [...document.querySelectorAll("article *")]
      .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && shown(e)
        && !e.closest("pre, table, .math, mjx-container, .highlight, svg, .sr-only"))
      .map((e) => `${e.tagName}.${e.className}`).slice(0, 5),
  };
}"""


class Visit(NamedTuple):
    """What a browser saw of one page."""

    page: str
    view: str
    console: list[str]
    requests: list[str]
    failed: list[str]
    seen: dict
    axe: list[str]


#: one page of each sort, at which axe looks in every view and with the contrast, which takes the
#: browser longer than all else; at the others in the first view (in all by the slow test)
EACH_SORT = ("index", "ch01_bradley_terry", "maths", "speed")


@pytest.fixture(scope="module")
def visits(site, browser):
    """Each page once in each view."""
    found = []
    for view, (width, scheme) in VIEWS.items():
        with browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        ) as context:
            page = context.new_page()  # one tab: another process for each page takes longer
            records = watch(page)
            for path in sorted((site / "book").rglob("*.html")):
                page.goto("about:blank")  # the last page is closed, and says nothing any more
                for record in records:
                    record.clear()
                page.goto(path.as_uri(), wait_until="load")
                seen = page.evaluate(_LOOK)
                found.append(Visit(path.stem, view, *map(list, records), seen, []))
                if view == "desktop" or path.stem in EACH_SORT:
                    found[-1].axe.extend(axe(page, path.stem in EACH_SORT))
    assert len({visit.page for visit in found}) >= 10
    return found


def _problems(visits, of):
    return {f"{v.page} ({v.view})": problem for v in visits if (problem := of(v))}


def test_no_error_in_the_console(visits):
    assert _problems(visits, lambda v: v.console) == {}


def test_axe_finds_nothing_serious(visits):
    assert _problems(visits, lambda v: v.axe) == {}
    assert set(EACH_SORT) <= {v.page for v in visits}


@pytest.mark.slow
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious_on_any_page_in_any_view(site, browser, view):
    width, scheme = VIEWS[view]
    with browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    ) as context:
        page, found = context.new_page(), {}
        for path in sorted((site / "book").rglob("*.html")):
            page.goto(path.as_uri(), wait_until="load")
            if problem := axe(page, True):
                found[path.stem] = problem
    assert found == {}


def test_nothing_is_asked_of_the_network(visits):
    local = ("file:", "data:", "blob:")
    foreign = _problems(visits, lambda v: [url for url in v.requests if not url.startswith(local)])
    assert foreign == {}
    assert _problems(visits, lambda v: v.failed) == {}


def test_formulas_are_drawn(visits):
    assert _problems(visits, lambda v: v.seen["raw"]) == {}
    assert _problems(visits, lambda v: v.seen["wrong"]) == {}
    # as many as stand in the file: a page whose formulas the browser did not see has none to draw
    there = {
        v.page: Path(unquote(urlsplit(v.requests[0]).path)).read_text("utf-8").count('class="math ')
        for v in visits
        if v.page.startswith("ch")
    }
    assert sum(map(bool, there.values())) >= 3
    assert {v.page: v.seen["formulas"] for v in visits if v.page in there} == there


def test_figures_are_drawn(visits):
    assert _problems(visits, lambda v: v.seen["broken"]) == {}
    drawn = {v.page: v.seen["pictures"] for v in visits if v.page.startswith("ch")}
    assert {page: count for page, count in drawn.items() if count < 1} == {}


def test_pages_follow_the_scheme_and_fit_the_screen(visits):
    wrong = {(v.page, v.view) for v in visits if v.seen["theme"] != VIEWS[v.view][1]}
    assert wrong == set()
    too_wide = _problems(
        visits, lambda v: v.seen["wide"] if v.seen["width"] > VIEWS[v.view][0] else []
    )
    assert too_wide == {}


# Sliders


@pytest.fixture(scope="session")
def slider_pages(site):
    """Kind of figure -> address of the page that has it."""
    found = {}
    for path in sorted((site / "book").glob("*.html")):
        text = path.read_text(encoding="utf-8")
        for kind in sliders.DRAWINGS:
            if f'data-slider-figure="{kind}"' in text:
                found[kind] = path.as_uri()
        if "data-slider-figure" not in text:
            assert sliders.SCRIPT not in text, path.name
    return found


@pytest.fixture
def open_figure(browser, slider_pages):
    """Open the page of a figure; return the page and the figure."""
    with browser.new_context(viewport={"width": 390, "height": 900}, offline=True) as context:

        def open_it(kind):
            page = context.new_page()
            console, *_ = watch(page)
            page.goto(slider_pages[kind], wait_until="load")
            assert console == []
            return page, page.locator(f'[data-slider-figure="{kind}"]')

        yield open_it


def _attributes(figure):
    """Name of each moving part -> its attributes."""
    return figure.evaluate(
        "box => Object.fromEntries([...box.querySelectorAll('[data-part]')].map(e => "
        "[e.dataset.part, Object.fromEntries([...e.attributes].map(a => [a.name, a.value]))]))"
    )


def _numbers(text):
    """Numbers of an attribute; its words, if it has no number, by their hash."""
    found = re.findall(r"-?\d+\.?\d*", str(text))
    return [float(number) for number in found] if found else [hash(str(text))]


def _outputs(figure):
    return figure.evaluate(
        "box => Object.fromEntries([...box.querySelectorAll('[data-output]')]"
        ".map(e => [e.dataset.output, e.textContent]))"
    )


def test_the_chapters_have_their_sliders(slider_pages):
    pages = {kind: address.rsplit("/", 1)[1] for kind, address in slider_pages.items()}
    assert pages == {"loss": "ch01_bradley_terry.html", "centering": "ch04_training.html"}


@pytest.mark.parametrize("kind", sliders.DRAWINGS)
def test_the_script_draws_what_the_page_had(kind, browser, slider_pages, open_figure):
    """At the first position Python and JavaScript agree; without JavaScript the figure stands."""
    _, figure = open_figure(kind)
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(slider_pages[kind])
        plain = page.locator(f'[data-slider-figure="{kind}"]')
        assert plain.locator("svg").is_visible()
        assert plain.locator("dl").is_visible()
        assert not plain.locator("input").first.is_visible()
        assert "JavaScript" in plain.locator("noscript").inner_text()
    drawing = sliders.DRAWINGS[kind]()
    assert _outputs(figure) == {name: value for name, (_, value, _) in drawing.outputs.items()}
    soup = bs4.BeautifulSoup(drawing.html("x"), "html.parser")
    moved = _attributes(figure)
    assert {tag["data-part"] for tag in soup.select("[data-part]")} == set(moved)
    for tag in soup.select("[data-part]"):
        for key, value in moved[tag["data-part"]].items():
            if key not in ("clip-path", "visibility"):  # the one has an id, the other is new
                first = value if key != "class" else value.split()
                assert _numbers(first) == pytest.approx(_numbers(tag[key]), abs=0.011), (tag, key)


def test_the_keyboard_moves_the_loss(open_figure):
    page, figure = open_figure("loss")
    slider = figure.get_by_label("margin Δ")
    before = _attributes(figure)
    for key, margin in [("End", 6.0), ("Home", -6.0), ("ArrowRight", -5.9)]:
        slider.press(key)
        assert float(slider.input_value()) == margin
        value = torch.tensor(margin, dtype=torch.float64)
        p = float(bradley_terry_probability(value, torch.zeros_like(value)))
        loss = float(bradley_terry_loss(value, torch.zeros_like(value)))
        assert _outputs(figure) == {
            "probability": sliders.number(p, 3),
            "loss": sliders.number(loss, 3),
            "gradient": sliders.number(-(1 - p), 3),
        }
        assert sliders.number(loss, 2) in slider.get_attribute("aria-valuetext")
    after = _attributes(figure)
    assert {name for name in after if after[name] != before[name]} == set(after)
    # the two scores are pulled apart by forces of one length
    lengths = [
        float(after[f"force-{side}"]["x2"]) - float(after[f"force-{side}"]["x1"])
        for side in ("chosen", "rejected")
    ]
    assert lengths[0] > 30
    assert lengths[0] + lengths[1] == pytest.approx(0, abs=0.02)
    assert page.evaluate("document.activeElement.type") == "range"


def test_a_finger_moves_the_shift(open_figure):
    page, figure = open_figure("centering")
    chosen, rejected = (
        torch.tensor(x, dtype=torch.float64) for x in (sliders.CHOSEN, sliders.REJECTED)
    )
    slider = figure.get_by_label("shift s")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    assert box["height"] >= 32
    before, curve = _outputs(figure), _attributes(figure)["curve"]["d"]
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + box["height"] / 2)
    shift = float(slider.input_value())
    assert -3 < shift < -1
    after = _outputs(figure)
    coefficient = float(figure.get_by_label("coefficient").input_value())
    loss = float(bradley_terry_loss(chosen + shift, rejected + shift).mean())
    penalty = coefficient * float(centering_penalty(chosen + shift, rejected + shift).mean())
    assert after == {
        "loss": before["loss"],  # which does not see the shift
        "penalty": sliders.number(penalty, 4),
        "total": sliders.number(loss + penalty, 4),
        "mean": sliders.number(float(torch.cat([chosen, rejected]).mean()) + shift),
        "best": sliders.number(float(best_global_shift(chosen, rejected))),
    }
    assert _attributes(figure)["curve"]["d"] == curve  # the shift moves along it
    figure.get_by_label("coefficient").press("Home")  # without the penalty
    assert _outputs(figure)["best"] == "any"
    assert _outputs(figure)["total"] == before["loss"]
    assert _attributes(figure)["curve"]["d"] != curve
    assert _attributes(figure)["best"]["visibility"] == "hidden"


def test_formulas_of_the_script_are_those_of_the_companion(open_figure):
    page, _ = open_figure("loss")
    margins = [*torch.linspace(-40, 40, 161, dtype=torch.float64).tolist(), -1000.0, 1000.0]
    theirs = page.evaluate(
        "xs => xs.map(x => ['loss', 'probability', 'gradient']"
        ".map(f => companionSliders.formulas[f](x)))",
        margins,
    )
    value = torch.tensor(margins, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(value)
    loss = bradley_terry_loss(value, zero)
    loss.sum().backward()
    ours = zip(
        loss.tolist(), bradley_terry_probability(value, zero).tolist(), value.grad.tolist(),
        strict=True,
    )  # fmt: skip
    for row, expected in zip(theirs, ours, strict=True):
        assert row == pytest.approx(expected, rel=1e-12, abs=1e-300)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 7):
        chosen, rejected = 3 * torch.randn(2, size, generator=generator, dtype=torch.float64)
        got = page.evaluate(
            "([c, r]) => ['meanLoss', 'meanPenalty', 'bestShift']"
            ".map(f => companionSliders.formulas[f](c, r))",
            [chosen.tolist(), rejected.tolist()],
        )
        assert got == pytest.approx(
            [
                float(bradley_terry_loss(chosen, rejected).mean()),
                float(centering_penalty(chosen, rejected).mean()),
                float(best_global_shift(chosen, rejected)),
            ],
            rel=1e-12,
        )


def test_both_write_numbers_alike(open_figure):
    page, _ = open_figure("loss")
    values = [0.0, -0.0, -0.004, 0.004, -1.005, 2.675, 1e-9, -6.0, 123.456, 1 / 3, math.pi]
    cases = [list(case) for case in itertools.product(values, (0, 1, 2, 3))]
    theirs = page.evaluate("cases => cases.map(([x, d]) => companionSliders.format(x, d))", cases)
    assert theirs == [sliders.number(value, digits) for value, digits in cases]
