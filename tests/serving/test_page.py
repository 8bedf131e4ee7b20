"""The page at ``/`` and the routes told at ``/docs``: offline, escaped, and in a browser."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import bs4
import jsonschema
import numpy as np
import pytest
from chromium import axe, opened
from scipy.special import expit
from served import ASSETS, client

from companion.scoring import load_scorer
from companion.serving import BODIES, Running, running

pytestmark = pytest.mark.serving

#: what a stranger may have written
NASTY = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
GIVEN = {
    "prompt": "Ana has 3 boxes with 4 pens each and buys 2. How many pens now?",
    "a": "First 3 x 4 = 12 pens.\nThen 12 + 2 = 14 pens.\nAnswer: 14",
    "b": NASTY,
}
PAGES = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}


@functools.cache
def scorer_of(kind: str) -> Any:
    return load_scorer(ASSETS / kind, overlong="error")


@contextmanager
def served(kind: str, **settings: Any) -> Iterator[Running]:
    with running(scorer_of(kind), allow_unchecked=True, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A scalar model under a name that a page must not run."""
    with served("pairwise", name=NASTY) as found:
        yield found


# Without a browser


@pytest.mark.parametrize("path", [*PAGES, "/docs"])
def test_pages_have_the_headers_that_keep_strangers_out(path: str, server: Running) -> None:
    with client(server.url) as http:
        answer = http.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(PAGES.get(path, "text/html"))
    told = answer.headers["content-security-policy"]
    policy = dict(part.split(" ", 1) for part in told.split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in told
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_pages_are_small_and_name_no_other_host(server: Running) -> None:
    with client(server.url) as http:
        files = {path: http.get(path).text for path in [*PAGES, "/docs"]}
    assert sum(len(files[path].encode()) for path in PAGES) < 24_000
    here = files["/docs"].replace(server.url, "")
    for text in (files["/"], files["/page.css"], here):
        assert "//" not in re.sub(r"/\*.*?\*/", "", text)
    addresses = re.findall(r"https?://[^\"'\s]+", files["/page.js"])
    assert addresses == ["http://www.w3.org/2000/svg"]  # a name, which nobody asks
    unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\("
    assert not re.search(unsafe, files["/page.js"])
    for path in ("/", "/docs"):
        soup = bs4.BeautifulSoup(files[path], "html.parser")
        assert all(tag.get("src") for tag in soup.find_all("script"))
        assert not soup.find_all("style")
        names = {name for tag in soup.find_all(True) for name in tag.attrs}
        assert not [name for name in names if name == "style" or name.startswith("on")]


def test_answers_with_strangers_text_are_no_pages(server: Running) -> None:
    with client(server.url) as http:
        answer = http.post("/v1/rewards", json={"items": [{"text": "x"}], "model": "<script>"})
        models = http.get("/v1/models")
    assert answer.status_code == 400
    for one in (answer, models):
        assert one.headers["content-type"] == "application/json"
        assert one.headers["x-content-type-options"] == "nosniff"
    assert models.json()["data"][0]["id"] == NASTY


def test_docs_escape_what_reaches_them(server: Running) -> None:
    with client(server.url) as http:
        page = http.get("/docs", headers={"Host": "a'\"><script>alert(1)</script>"})
        lines = bs4.BeautifulSoup(page.text, "html.parser").select("pre.copy")
    assert "<script" not in page.text
    assert all(len(shlex.split(line.text)) in (2, 6) for line in lines)


def test_lines_of_the_docs_do_what_they_say(server: Running) -> None:
    """Each line to copy is answered, or refused for what this model is, never for its form."""
    with client(server.url) as http:
        soup = bs4.BeautifulSoup(http.get("/docs").text, "html.parser")
        lines = [line.text for line in soup.select("pre.copy")]
        seen = {}
        for line in lines:
            curl, url, *more = shlex.split(line)
            assert curl == "curl"
            if not more:
                answer = http.get(url)
            else:
                flag, header, data, body = more
                assert (flag, data, header) == ("-H", "-d", "Content-Type: application/json")
                answer = http.post(url, content=body, headers=dict([header.split(": ")]))
            seen.setdefault(urlsplit(url).path, []).append(answer)
        told = set(http.get("/openapi.json").json()["paths"])
    assert set(seen) == told
    assert set(BODIES) < told
    for path, answers in seen.items():
        for answer in answers:
            if answer.status_code != 200:
                assert answer.status_code == 400, (path, answer.text)
                assert "not_supported" in answer.text, (path, answer.text)


# OpenAPI


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


@pytest.fixture(scope="module")
def told(server: Running) -> dict[str, Any]:
    """The OpenAPI document."""
    with client(server.url) as http:
        return http.get("/openapi.json").json()


def test_every_reference_resolves(told: dict[str, Any]) -> None:
    found = set(_references(told))
    assert {"#/components/schemas/Item", "#/components/schemas/Rewards"} <= found
    for reference in found:
        node = told
        for key in reference.removeprefix("#/").split("/"):
            node = node[key]
        assert node["type"] == "object"
    assert "$defs" not in json.dumps(told)


def test_schemas_are_schemas_and_take_what_the_routes_take(told: dict[str, Any]) -> None:
    """A body that the route's own model takes is valid, one with a field of a wrong type is not."""
    root = {"components": told["components"]}
    for schema in told["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    examples = 0
    for path, operations in told["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {})
        for body in content.values():
            validator = jsonschema.Draft202012Validator({**root, **body["schema"]})
            for example in body["examples"].values():
                validator.validate(example["value"])
                BODIES[path].model_validate_json(json.dumps(example["value"]))
                examples += 1
            for name in example["value"]:
                assert not validator.is_valid({**example["value"], name: {"no": [1]}}), (path, name)
    assert examples >= len(BODIES)


def test_refusals_are_described_with_bodies_in_their_protocols_form(told: dict[str, Any]) -> None:
    wanted = {
        "/v1/rewards": {400, 401, 409, 413, 429, 503, 504},
        "/v1/steps": {400, 401, 409, 413, 429, 503, 504},
        "/v1/compare": {400, 401, 409, 413, 429, 503, 504},
        "/classify": {400, 401, 409, 413, 422, 503, 504},
        "/pooling": {400, 401, 409, 413, 422, 503, 504},
        "/get_reward": {400, 401, 409, 413, 422, 503, 504},
    }
    assert set(wanted) == set(BODIES)
    for path, statuses in wanted.items():
        responses = told["paths"][path]["post"]["responses"]
        assert set(map(int, responses.keys() - {"200"})) == statuses, path
        assert all(len(response["description"]) > 10 for response in responses.values())
        for status in statuses - {401}:
            examples = responses[str(status)]["content"]["application/json"]["examples"]
            for name, example in examples.items():
                body = example["value"]
                if path == "/get_reward":
                    assert body["type"] == name
                else:
                    assert (body["error"]["code"], body["error"]["type"]) == (status, name)
    assert told["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


def test_a_described_refusal_looks_as_a_real_one(told: dict[str, Any], server: Running) -> None:
    with client(server.url) as http:
        real = http.post("/v1/rewards", json={"items": [{"prompt": "x", "completion": ""}]}).json()
    response = told["paths"]["/v1/rewards"]["post"]["responses"]["400"]
    example = response["content"]["application/json"]["examples"]["bad_item"]["value"]
    assert real["error"].keys() == example["error"].keys()
    assert real["error"]["type"] == "bad_item"


def test_tokens_read_as_the_completion() -> None:
    """The words at the places of /v1/steps, put together, are the text that was judged."""
    completion = "First 3 x 4 = 12 pens.\nThen 12 + 2 = 14 pens.\nAnswer: 14"
    item = {"prompt": GIVEN["prompt"], "completion": completion}
    with served("outcome") as server, client(server.url) as http:
        bare = http.post("/v1/steps", json={"items": [item]}).json()["results"][0]
        full = http.post("/v1/steps", json={"items": [item, item], "tokens": True}).json()
    assert "tokens" not in bare
    for found in full["results"]:
        assert found["values"] == pytest.approx(bare["values"], abs=1e-5)
        assert len(found["tokens"]) == len(found["values"])
        end = scorer_of("outcome").tokenizer.eos_token
        assert "".join(found["tokens"]) == completion + end


# In a browser


def fill(page: Any, **given: str) -> None:
    for name, text in given.items():
        page.locator(f"#{name}").fill(text)


def compare(page: Any) -> None:
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Scored by version").wait_for()


def cells(page: Any, name: str) -> list[float]:
    return [
        float(page.locator(f"[data-cell='{name} {side}'] data").get_attribute("value"))
        for side in "ab"
    ]


def expected(kind: str, **ended: bool) -> Any:
    rows = [
        {"prompt": GIVEN["prompt"], "completion": GIVEN[side], "terminated": ended.get(side, True)}
        for side in "ab"
    ]
    return scorer_of(kind).score(rows)


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_the_page_shows_what_the_scorer_says(
    width: int, scheme: str, browser: Any, server: Running
) -> None:
    with opened(browser, server.url, width=width, scheme=scheme) as (page, console):
        page.get_by_text(server.service.identity.version).first.wait_for()
        fill(page, **GIVEN)
        compare(page)
        scores = expected("pairwise")
        assert cells(page, "raw score") == pytest.approx(scores.raw, abs=1e-5)
        assert cells(page, "percentile") == pytest.approx(scores.percentile, abs=1e-3)
        assert cells(page, "z") == pytest.approx(scores.z, abs=1e-4)
        temperature = scorer_of("pairwise").manifest.temperature
        p = 100 * expit((scores.raw[0] - scores.raw[1]) / temperature)
        summary = page.locator("#summary").inner_text()
        assert float(re.search(r"P\(A beats B\) = ([\d.]+) %", summary)[1]) == pytest.approx(
            p, abs=0.06
        )

        marks = page.evaluate(
            "[...document.querySelectorAll('#drawn g')].map(g => ({...g.dataset}))"
        )
        assert [mark["side"] for mark in marks] == ["a", "b"]
        assert [float(mark["score"]) for mark in marks] == pytest.approx(scores.raw, abs=1e-5)
        order = np.argsort([float(mark["x"]) for mark in marks])
        assert order.tolist() == np.argsort(scores.raw).tolist()
        drawing = page.locator("#drawn svg")
        assert f"percentile {scores.percentile[0]:.1f}" in drawing.get_attribute("aria-label")
        inside = page.evaluate(
            """() => { const box = document.querySelector("#drawn svg").getBoundingClientRect();
            return [...document.querySelectorAll("#drawn text, #drawn g > *")].every((e) => {
              const own = e.getBoundingClientRect();
              return own.left > box.left - 4 && own.right < box.right + 4; }); }"""
        )
        assert inside

        # what strangers wrote is text: the name of the model, and a completion
        assert page.locator("h1").inner_text() == NASTY
        assert page.locator("main img, main script").count() == 0
        assert page.title() == f"{NASTY}: companion serve"

        fitting = page.evaluate("document.documentElement.scrollWidth")
        assert fitting <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 384) == (scheme == "light")
        assert axe(page, True) == []
        assert console == []

        page.goto(server.url + "/docs")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert axe(page, True) == []
        assert console == []


def test_unfinished_texts_and_old_scores_are_told(browser: Any, server: Running) -> None:
    with opened(browser, server.url) as (page, console):
        fill(page, **GIVEN)
        compare(page)
        before = cells(page, "raw score")
        page.get_by_label("unfinished").first.check()
        page.get_by_text("The text has changed").wait_for()
        assert page.get_by_role("heading", name="Scores of an earlier text").is_visible()
        assert axe(page, True) == []
        page.locator("#prompt").press("Control+Enter")
        page.get_by_text("Scored by version").wait_for()
        after = cells(page, "raw score")
        assert after == pytest.approx(expected("pairwise", a=False).raw, abs=1e-5)
        assert after[0] != before[0]
        assert after[1] == pytest.approx(before[1], abs=1e-5)
        assert "unfinished" in page.locator("[data-cell='warnings a']").inner_text()
        assert page.locator("[data-cell='warnings b']").inner_text() == "none"
        assert console == []


def test_a_refusal_is_shown_with_its_cure_and_hides_old_scores(
    browser: Any, server: Running
) -> None:
    with opened(browser, server.url) as (page, _):
        fill(page, **GIVEN)
        compare(page)
        fill(page, b="x " * 4000 + NASTY)
        page.get_by_role("button", name="Compare").click()
        alert = page.get_by_role("alert")
        alert.get_by_text("pairs[0].b").wait_for()
        assert "What helps: " in alert.inner_text()
        assert not page.locator("#result").is_visible()
        fill(page, b="5")
        compare(page)
        assert alert.inner_text() == ""


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_values_of_steps_are_shown(kind: str, browser: Any) -> None:
    with served(kind) as server, opened(browser, server.url) as (page, console):
        fill(page, **GIVEN)
        compare(page)
        scores = expected(kind)
        assert cells(page, "raw score") == pytest.approx(scores.raw, abs=1e-5)
        summary = page.locator("#summary").inner_text()
        assert "No probability that A beats B: the model's scores are no" in summary
        assert page.locator("#drawn svg").count() == (scorer_of(kind).reference is not None)
        if kind == "outcome":
            page.get_by_text("As a table").first.click()
            page.get_by_text("As a table").last.click()
        for i, side in enumerate("ab"):
            box = page.locator(f"[data-steps={side}]")
            shown = [
                float(text)
                for text in box.locator("td data").evaluate_all("all => all.map(e => e.value)")
            ]
            assert shown == pytest.approx(scores.values[i], abs=1e-5)
            words = box.locator("td.step").all_text_contents()
            if kind == "process":
                assert words == GIVEN[side].split("\n")
            else:
                whole = box.locator(".tokens").text_content()
                assert whole == "".join(words)
                assert whole.startswith(GIVEN[side])
            first = scores.first_errors(scorer_of(kind).readout.threshold)[i]
            assert box.get_by_text("first error").count() == (first is not None)
        colours = page.evaluate(
            "[...document.querySelectorAll('[data-steps] .value')]"
            ".map(e => getComputedStyle(e).backgroundColor)"
        )
        assert len(set(colours)) > 1
        assert page.locator("main img, main script").count() == 0
        assert axe(page, True) == []
        assert console == []


def test_the_page_asks_for_the_token_and_stores_it_nowhere(browser: Any) -> None:
    with served("pairwise", token="sesam") as server, opened(browser, server.url) as (page, _):
        field = page.get_by_label("The server asks for its token")
        field.wait_for()
        assert page.get_by_role("alert").inner_text() == ""
        field.fill("sesame")
        field.press("Enter")
        page.get_by_role("alert").get_by_text("bearer token").wait_for()
        assert axe(page, True) == []
        field.fill("sesam")
        field.press("Enter")
        page.get_by_text(server.service.identity.version).first.wait_for()
        assert not field.is_visible()
        compare(page)
        stores = "[{...localStorage}, {...sessionStorage}, document.cookie, location.href]"
        assert "sesam" not in page.evaluate(f"JSON.stringify({stores})")


def test_another_model_behind_the_same_address_is_noticed(browser: Any) -> None:
    """The page takes name, version and reference anew when an answer is another model's."""
    with served("pairwise", name="old") as old, opened(browser, old.url) as (page, _):
        page.get_by_text(old.service.identity.version).first.wait_for()
        other = "f" * 16
        page.route(
            "**/v1/compare",
            lambda route: route.fulfill(
                json={**(answer := route.fetch()).json(), "model_version": other},
                response=answer,
            ),
        )
        with page.expect_request("**/v1/models"), page.expect_request("**/v1/reference"):
            page.get_by_role("button", name="Compare").click()
        page.get_by_text(f"Scored by version {other}").wait_for()
