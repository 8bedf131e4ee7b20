"""What nobody would send: each body has a clear answer, none is a 500, and the server goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings, strategies as st
from schemathesis.checks import not_a_server_error
from served import ASSETS, client

from companion.scoring import load_scorer
from companion.serving import Running, running

pytestmark = pytest.mark.serving

ROUTES = ("/v1/rewards", "/v1/steps", "/v1/compare", "/classify", "/pooling", "/get_reward")
KINDS = ("pairwise", "process")
PAIR = {"prompt": "Ana has 3 pens.", "completion": "5"}
LOOSE: Any = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    scorer = load_scorer(ASSETS / request.param, overlong="error")
    with running(scorer, allow_unchecked=True, overlong="error", max_body=4 << 20) as found:
        yield found


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx2.Client]:
    with client(server.url) as found:
        yield found


def goes_on(http: httpx2.Client) -> None:
    assert http.post("/v1/rewards", json={"items": [PAIR]}).status_code == 200
    assert http.get("/livez").status_code == 200


def check(answer: Any) -> None:
    """Scores, or a refusal in words; a number that is none stands nowhere."""
    assert answer.status_code < 500, answer.text
    said = json.loads(answer.text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    if answer.status_code != 200:
        assert answer.status_code in (400, 409, 413, 422), answer.text
        told = said.get("error", said)
        assert len(told.get("message") or told["detail"]) > 5
        assert len(answer.content) < 10_000, "a refusal repeats what was sent"


def horrors() -> dict[str, bytes]:
    deep = 100_000
    items = b'{"items":[%s]}'
    found = {
        "nothing": b"",
        "null": b"null",
        "a number": b"7",
        "an empty list": b"[]",
        "an empty mapping": b"{}",
        "no JSON": b"items=5",
        "half": b'{"items":[{"text":"a"',
        "two documents": b'{"items":[]}{"items":[]}',
        "not UTF-8": b'{"items":[{"text":"\xff\xfe"}]}',
        "UTF-16": '{"items":[{"text":"a"}]}'.encode("utf-16"),
        "a BOM": b"\xef\xbb\xbf" + json.dumps({"items": [PAIR]}).encode(),
        "NUL": b'{"items":[{"text":"\\u0000"}]}',
        "a lone surrogate": b'{"items":[{"text":"\\ud800"}]}',
        "surrogates the wrong way": b'{"items":[{"text":"\\udc00\\ud800"}]}',
        "nested lists": b"[" * deep,
        "nested mappings": b'{"items":' * deep,
        "nested messages": items % (b'{"messages":' + b"[" * 150 + b"]" * 150 + b"}"),
        "nested tools": items
        % (b'{"text":"a","tools":[' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"]}"),
        "nested content": items
        % (b'{"messages":[{"role":"user","content":' + b"[" * 150 + b"]" * 150 + b"}]}"),
        "NaN": b'{"items":[{"input_ids":[NaN,Infinity,-Infinity]}]}',
        "NaN in tools": b'{"items":[{"text":"a","tools":[NaN, 1e999]}]}',
        "a huge number": items % (b'{"input_ids":[' + b"9" * 5000 + b"]}"),
        "ids without end": items
        % b'{"input_ids":[1180591620717411303424,-1180591620717411303424]}',
        "an id of 2**63": items % b'{"input_ids":[9223372036854775808]}',
        "a negative id": items % b'{"input_ids":[5,-7]}',
        "an id 5.0": items % b'{"input_ids":[5.0]}',
        "no ids": items % b'{"input_ids":[]}',
        "places without end": items % b'{"input_ids":[5],"places":[1180591620717411303424]}',
        "keys twice": b'{"items":[{"text":"a","text":"b"}],"items":[]}',
        "too many": json.dumps({"items": [{"text": ""}] * 70_000}).encode(),
        "a huge text": json.dumps({"items": [{"text": "Ana " * 500_000}]}).encode(),
        "one huge word": json.dumps({"items": [{"text": "a" * 500_000}]}).encode(),
        "larger than allowed": b'"' + b"a" * (5 << 20) + b'"',
        "a field of 100,000 letters": json.dumps({"items": [PAIR], "x" * 100_000: 1}).encode(),
        "a model of 100,000 letters": json.dumps({"items": [PAIR], "model": "x" * 10**5}).encode(),
        "a role of 100,000 letters": json.dumps(
            {"items": [{"messages": [{"role": "x" * 100_000, "content": "a"}]}]}
        ).encode(),
        "messages of anything": items
        % b'{"messages":[{},{"role":1},{"content":[]},{"role":null}]}',
        "template settings": items
        % b'{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"messages":1,'
        b'"tokenize":true,"bos_token":[],"add_generation_prompt":"x","return_tensors":"pt"}}',
        "empty texts": items % b'{"text":""},{"prompt":"","completion":""},{"messages":[]}',
        "empty steps": items % b'{"prompt":"a","completions":[]},{"prompt":"a","completions":[""]}',
    }
    for name, value in (("ids", [[]]), ("texts", [""]), ("mixed", ["a", 5, None]), ("none", [])):
        found[f"input of {name}"] = json.dumps({"input": value}).encode()
        found[f"query of {name}"] = json.dumps({"query": value}).encode()
    for value in ([2**70], [[-1]], [[2**70, 5]], 5, {"a": 1}, "", "\ud800", [True]):
        found[f"input {value!r}"] = json.dumps({"input": value}).encode()
    return found


@pytest.mark.parametrize("path", ROUTES)
def test_bodies_of_horror(path: str, http: httpx2.Client) -> None:
    for name, body in horrors().items():
        print(name)  # what a failure is about
        check(http.post(path, content=body))
    goes_on(http)


def test_the_content_type_makes_no_difference(http: httpx2.Client) -> None:
    body = json.dumps({"items": [PAIR]}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "?", ""):
        assert http.post("/v1/rewards", content=body, headers={"Content-Type": kind}).is_success
    for coding in ("gzip", "br"):
        check(http.post("/v1/rewards", content=b"\x1f\x8b", headers={"Content-Encoding": coding}))
    for path in ROUTES:
        assert http.get(path).status_code == 405
        assert http.request("PUT", path, content=body).status_code == 405
    goes_on(http)


# ---------------------------------------------------------------------- generated bodies

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 700),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=30),
    st.sampled_from(["user", "assistant", "Ana has 3 pens.", "<|end|>", "<|eos|>", "\n", "raw"]),
)
NAMES = st.sampled_from(
    [
        *("items", "return", "model", "model_version", "pairs", "a", "b", "a_terminated"),
        *("messages", "prompt", "completion", "completions", "text", "input_ids", "places"),
        *("terminated", "tools", "chat_template_kwargs", "role", "content"),
        *("input", "use_activation", "task", "add_special_tokens", "user"),
        *("query", "prompts", "labels"),
    ]
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=20,
)
ITEM = st.dictionaries(NAMES, ANYTHING, min_size=1, max_size=3)
BODY = st.one_of(
    st.fixed_dictionaries({"items": st.lists(ITEM, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"input": ANYTHING}, optional={"use_activation": ANYTHING}),
    st.fixed_dictionaries({"query": st.lists(st.text(max_size=20), max_size=3)}),
    st.fixed_dictionaries({"pairs": st.lists(ITEM, min_size=1, max_size=3)}),
    ANYTHING,
)


def fuzz(http: httpx2.Client, examples: int) -> None:
    @settings(max_examples=examples, **LOOSE)
    @given(path=st.sampled_from(ROUTES), body=BODY)
    @example(path="/v1/rewards", body={"items": [PAIR]})
    def asked(path: str, body: Any) -> None:
        check(http.post(path, content=json.dumps(body).encode()))

    asked()
    goes_on(http)


def test_generated_bodies(http: httpx2.Client) -> None:
    fuzz(http, 60)


@pytest.mark.slow
def test_many_generated_bodies(http: httpx2.Client) -> None:
    fuzz(http, 4000)


def by_schema(server: Running, examples: int) -> None:
    """Bodies that the published schema allows, and some that it does not."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        # a route that takes nothing can be asked for nothing that is wrong
        for mode in list(schemathesis.GenerationMode)[: 2 if operation.body else 1]:

            @settings(max_examples=examples, **LOOSE)
            @given(case=operation.as_strategy(generation_mode=mode))
            def asked(case: Any) -> None:
                answer = case.call()
                case.validate_response(answer, checks=[not_a_server_error])

            asked()


def test_what_the_schema_says(server: Running, http: httpx2.Client) -> None:
    by_schema(server, 3)
    goes_on(http)


@pytest.mark.slow
def test_what_the_schema_says_at_length(server: Running, http: httpx2.Client) -> None:
    by_schema(server, 300)
    goes_on(http)
