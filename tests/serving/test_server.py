"""The server over HTTP: its scores are the scorer's, and every refusal says what is wrong."""

from __future__ import annotations

import functools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from scipy.special import expit, softmax
from served import ASSETS, client, rows_of, seeded

from companion.formatting import Encoded, EncodedSteps
from companion.scoring import load_scorer
from companion.serving import PATIENCE, Running, engine as engine_module, listen, running

pytestmark = pytest.mark.serving

KINDS = ("pairwise", "outcome", "process")
CHAT = [
    {"role": "user", "content": "Ana has 3 pens and buys 2. How many pens now?"},
    {"role": "assistant", "content": "3 + 2 = 5\nAnswer: 5"},
]
PAIR = {"prompt": "Ana has 3 pens and buys 2.", "completion": "3 + 2 = 5\nAnswer: 5"}
#: forms of a text that a scalar model takes
FORMS: list[dict[str, Any]] = [
    {"messages": CHAT},
    PAIR,
    {**PAIR, "terminated": False},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"prompt": CHAT[:1], "completion": "5", "terminated": True},
    {"text": "Ana has 3 pens and buys 2. 3 + 2 = 5"},
    {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "add"}}]},
    {"messages": CHAT, "chat_template_kwargs": {"thinking": False}},
]


def loaded(kind: str, **settings: Any) -> Any:
    return load_scorer(ASSETS / kind, **{"overlong": "error", **settings})


_loaded = functools.cache(loaded)


def scorer_of(kind: str, **settings: Any) -> Any:
    """A new scorer; its model is loaded once."""
    old = _loaded(kind)
    return type(old)(old.reward_model, **settings)


@pytest.fixture(scope="module")
def scorers() -> Callable[[str], Any]:
    """Scorers with models of their own: what the server's answers are compared with."""
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            made[kind] = loaded(kind)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[str], Running]]:
    made: dict[str, Running] = {}
    with ExitStack() as stack:

        def get(kind: str) -> Running:
            if kind not in made:
                served = running(scorer_of(kind), name=kind, allow_unchecked=True)
                made[kind] = stack.enter_context(served)
            return made[kind]

        yield get


def served(scorer: Any, **settings: Any) -> Any:
    return running(scorer, **{"allow_unchecked": True, **settings})


def post(url: str, path: str, body: Any, **more: Any) -> Any:
    with client(url) as http:
        return http.post(path, json=body, **more)


class Slow:
    """Makes a scorer take its time, batch by batch, and notes what it has run."""

    def __init__(self, scorer: Any, seconds: float) -> None:
        self.seen: list[list[int]] = []
        self.began = threading.Event()
        own = scorer.values

        def values(texts: Sequence[Any], **more: Any) -> Any:
            self.began.set()
            self.seen += [list(text.input_ids) for text in texts]
            time.sleep(seconds)
            return own(texts, **more)

        scorer.values = values


# ---------------------------------------------------------------------- scores


def check_rewards(url: str, scorer: Any, rows: Sequence[Any]) -> None:
    """Posts of one to nine rows from eight threads: each answer holds its own rows' scores."""
    rng = seeded()
    parts = [rng.choices(rows, k=rng.randint(1, 9)) for _ in range(24)]
    with client(url) as http, ThreadPoolExecutor(8) as threads:
        found = list(
            threads.map(lambda part: http.post("/v1/rewards", json={"items": part}), parts)
        )
    for part, answer in zip(parts, found, strict=True):
        assert answer.status_code == 200, answer.text
        items = answer.json()["rewards"]
        want = scorer.score(part)
        assert [item["index"] for item in items] == list(range(len(part)))
        np.testing.assert_allclose([item["raw"] for item in items], want.raw, atol=1e-5, rtol=0)
        assert [item["n_tokens"] for item in items] == want.n_tokens.tolist()
        assert answer.json()["usage"] == {"tokens": int(want.n_tokens.sum())}


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_are_those_of_the_scorer(kind: str, servers: Any, scorers: Any) -> None:
    rows = rows_of(kind) + (FORMS if kind == "pairwise" else [PAIR, {"messages": CHAT}])
    check_rewards(servers(kind).url, scorers(kind), rows)


def test_a_server_that_mixes_up_its_texts_is_found_out(
    scorers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = engine_module._deliver
    monkeypatch.setattr(
        engine_module, "_deliver", lambda places, values: right(places, [*values[1:], values[0]])
    )
    with served(scorer_of("pairwise")) as server, pytest.raises(AssertionError):
        check_rewards(server.url, scorers("pairwise"), rows_of("pairwise"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_rewards_of_other_architectures(kind: str, tiny_rewards: Any) -> None:
    with served(load_scorer(tiny_rewards(kind), device="cpu")) as server:
        scorer = load_scorer(tiny_rewards(kind), device="cpu", packing="off")
        rows = [{"prompt": "Ana has 3 boxes", "completion": " pens" * (i + 1)} for i in range(8)]
        check_rewards(server.url, scorer, rows)


def test_token_ids_have_the_scores_of_their_words(servers: Any, scorers: Any) -> None:
    scorer = scorers("pairwise")
    encoded = scorer.formatter.encode_many(rows_of("pairwise"))
    items = [{"input_ids": item.input_ids} for item in encoded]
    found = post(servers("pairwise").url, "/v1/rewards", {"items": items}).json()["rewards"]
    want = scorer.score_encoded(encoded)
    np.testing.assert_allclose([item["raw"] for item in found], want, atol=1e-5, rtol=0)


def test_each_form_of_a_score_is_the_scorers(servers: Any, scorers: Any) -> None:
    want = scorers("pairwise").score(rows_of("pairwise"))
    forms = ["raw", "centered", "z", "percentile"]
    url = servers("pairwise").url
    for asked in (forms, ["z"], ["percentile", "raw"]):
        answer = post(url, "/v1/rewards", {"items": rows_of("pairwise"), "return": asked}).json()
        for form in forms:
            got = [item.get(form) for item in answer["rewards"]]
            if form in asked:
                np.testing.assert_allclose(got, getattr(want, form), atol=1e-4, rtol=0)
            else:
                assert set(got) == {None}
    assert post(url, "/v1/rewards", {"items": [PAIR], "return": ["sigmoid"]}).status_code == 400
    assert post(url, "/v1/rewards", {"items": [PAIR], "return": []}).status_code == 400


def test_without_a_reference_only_raw_scores_are_given(tiny_reward: Path) -> None:
    with served(load_scorer(tiny_reward, device="cpu")) as server:
        answer = post(server.url, "/v1/rewards", {"items": [{"text": "Ana"}], "return": ["z"]})
        assert answer.status_code == 400
        assert "reference" in answer.json()["error"]["message"]
        assert post(server.url, "/v1/rewards", {"items": [{"text": "Ana"}]}).status_code == 200


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_steps_are_those_of_the_scorer(kind: str, servers: Any, scorers: Any) -> None:
    rows = [*rows_of(kind), PAIR, {**PAIR, "terminated": False}]
    if kind == "process":
        rows.append({"prompt": "Ana has 3 pens.", "completions": ["3 + 2 = 5", "Answer: 5"]})
    want = scorers(kind).score(rows)
    answer = post(servers(kind).url, "/v1/steps", {"items": rows})
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    first = want.first_errors(scorers(kind).readout.threshold)
    for i, item in enumerate(results):
        np.testing.assert_allclose(item["score"], want.raw[i], atol=1e-5)
        for name in ("values", "wrong", "logits"):
            np.testing.assert_allclose(item[name], getattr(want, name)[i], atol=1e-4)
        assert item["places"] == want.places[i]
        assert item["first_error"] == first[i]
    items = [
        {"input_ids": list(text.encoded.input_ids), "places": list(text.ends)}
        for text in scorers(kind).prepare(rows).texts
    ]
    again = post(servers(kind).url, "/v1/steps", {"items": items}).json()["results"]
    np.testing.assert_allclose(
        [item["score"] for item in again], [item["score"] for item in results], atol=1e-5
    )


def test_steps_of_a_model_without_any_are_refused(servers: Any) -> None:
    answer = post(servers("pairwise").url, "/v1/steps", {"items": [PAIR]})
    assert answer.status_code == 400
    assert "/v1/rewards" in answer.json()["error"]["cure"]


def test_a_comparison_is_the_margin_and_the_calibrated_probability(
    servers: Any, scorers: Any
) -> None:
    pairs = [
        {"prompt": "Ana has 3 pens and buys 2.", "a": "3 + 2 = 5\nAnswer: 5", "b": "Answer: 6"},
        {"prompt": CHAT[:1], "a": CHAT[1:], "b": "Hello!", "b_terminated": False},
    ]
    scorer = scorers("pairwise")
    found = post(servers("pairwise").url, "/v1/compare", {"pairs": pairs}).json()
    for pair, item in zip(pairs, found["comparisons"], strict=True):
        a = scorer.score([{"prompt": pair["prompt"], "completion": pair["a"]}]).raw[0]
        ended = pair.get("b_terminated", True)
        row = {"prompt": pair["prompt"], "completion": pair["b"], "terminated": ended}
        margin = a - scorer.score([row]).raw[0]
        assert item["margin"] == pytest.approx(margin, abs=2e-5)
        assert item["probability"] == pytest.approx(
            float(expit(margin / scorer.manifest.temperature)), abs=1e-4
        )
        assert item["why"] is None
        assert item["a"]["raw"] == pytest.approx(a, abs=1e-5)
    for kind in ("outcome", "process"):
        item = post(servers(kind).url, "/v1/compare", {"pairs": pairs[:1]}).json()["comparisons"][0]
        assert item["probability"] is None
        assert "Bradley-Terry" in item["why"]


def test_without_a_fitted_temperature_there_is_no_probability(tiny_reward: Path) -> None:
    with served(load_scorer(tiny_reward, device="cpu")) as server:
        pairs = [{"prompt": "Ana", "a": " yes", "b": " no"}]
        item = post(server.url, "/v1/compare", {"pairs": pairs}).json()["comparisons"][0]
        assert item["probability"] is None
        assert "temperature" in item["why"]
        assert item["margin"] != 0


def test_a_text_with_something_to_say_of_it_has_warnings(servers: Any, scorers: Any) -> None:
    items = [
        PAIR,
        {**PAIR, "terminated": False},
        {"prompt": "Ana", "completion": "3 <|end|> 4"},
    ]
    found = post(servers("pairwise").url, "/v1/rewards", {"items": items}).json()["rewards"]
    said = [" ".join(item["warnings"]) for item in found]
    assert said[0] == ""
    assert "unfinished" in said[1]
    assert "special tokens" in said[2]


def test_what_was_cut_is_counted_in_the_answer() -> None:
    scorer = loaded("pairwise", overlong="truncate_prompt", max_length=32)
    row = {"prompt": "Ana has 3 pens and buys 2. " * 9, "completion": "5"}
    cut = scorer.formatter.encode_row(row).cut_tokens
    assert cut > 0
    with served(scorer) as server:
        item = post(server.url, "/v1/rewards", {"items": [row]}).json()["rewards"][0]
    assert item["cut_tokens"] == cut
    assert item["n_tokens"] == 32
    assert any(f"{cut} tokens" in said for said in item["warnings"])


# ---------------------------------------------------------------------- around the scores


def test_each_answer_says_which_model_and_which_request(servers: Any) -> None:
    server = servers("pairwise")
    version = server.service.identity.version
    body = {"items": [PAIR]}
    with client(server.url) as http:
        own = http.post("/v1/rewards", json=body, headers={"X-Request-Id": "step-7/a"})
        assert own.headers["x-request-id"] == own.json()["id"] == "step-7/a"
        made = [http.post("/v1/rewards", json=body).json()["id"] for _ in range(3)]
        assert len(set(made)) == 3
        for bad in ("with a space", "x" * 129):
            answer = http.post("/v1/rewards", json=body, headers={"X-Request-Id": bad})
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
        for path in ("/livez", "/readyz", "/version", "/v1/models", "/v1/reference", "/nowhere"):
            answer = http.get(path)
            assert answer.headers["x-model-version"] == version
            assert answer.headers["x-request-id"]
        answer = own.json()
        assert answer["model"] == "pairwise"
        assert answer["model_version"] == version
        assert answer["hashes"] == server.service.identity.to_dict()
        assert sorted(answer["hashes"]) == sorted(
            ["weights", "config", "tokenizer", "template", "readout", "dtype"]
        )
        model = http.get("/v1/models").json()["data"][0]
        assert model["id"] == "pairwise"
        assert model["kind"] == "scalar"
        assert model["max_length"] == server.service.scorer.formatter.max_length
        assert model["deviation"] < 1e-4
        reference = http.get("/v1/reference").json()["reference"]
        assert reference["n"] == server.service.scorer.reference.n
        assert http.get("/readyz").json()["model_version"] == version


def test_a_pinned_version_that_is_not_served_is_refused(servers: Any) -> None:
    server = servers("pairwise")
    version = server.service.identity.version
    for body, headers in (
        ({"items": [PAIR], "model_version": "0" * 16}, {}),
        ({"items": [PAIR]}, {"X-Model-Version": "0" * 16}),
    ):
        answer = post(server.url, "/v1/rewards", body, headers=headers)
        assert answer.status_code == 409
        assert version in answer.json()["error"]["message"]
    body = {"items": [PAIR], "model_version": version}
    assert post(server.url, "/v1/rewards", body).status_code == 200
    named = {"items": [PAIR], "model": "another"}
    assert post(server.url, "/v1/rewards", named).status_code == 400


#: a route of each protocol, and a body that it takes
ROUTES = {
    "/v1/rewards": {"items": [PAIR]},
    "/v1/compare": {"pairs": [{"prompt": "Ana", "a": "1", "b": "2"}]},
    "/classify": {"input": ["Ana has 3 pens"]},
    "/pooling": {"input": ["Ana has 3 pens"]},
    "/get_reward": {"query": ["Ana has 3 pens"]},
}


@pytest.mark.parametrize("path", ["/v1/rewards", "/classify", "/get_reward"])
def test_the_pin_in_the_header_holds_on_every_route(path: str) -> None:
    with served(scorer_of("pairwise"), overlong="error") as server:
        answer = post(server.url, path, ROUTES[path], headers={"X-Model-Version": "0" * 16})
        assert answer.status_code == 409
        assert server.service.identity.version in answer.text


def test_without_its_token_nothing_is_answered_but_the_probes() -> None:
    settings = {"token": "sesam", "overlong": "error"}
    with served(scorer_of("pairwise"), **settings) as server, client(server.url) as http:
        for path, body in ROUTES.items():
            for headers in ({}, {"Authorization": "Bearer sesame"}, {"Authorization": "sesam"}):
                assert http.post(path, json=body, headers=headers).status_code == 401
            right = {"Authorization": "Bearer sesam"}
            assert http.post(path, json=body, headers=right).status_code == 200
        for path in ("/metrics", "/version", "/v1/models", "/v1/reference", "/nowhere"):
            assert http.get(path).status_code == 401
        for path in ("/livez", "/readyz"):
            assert http.get(path).status_code == 200
        odd = http.get("/version", headers={b"Authorization": b"Bearer \xff\xfe"})
        assert odd.status_code == 401


def test_a_body_that_is_too_large_is_refused_however_it_is_sent() -> None:
    with served(scorer_of("pairwise"), max_body=1000) as server, client(server.url) as http:
        large = json.dumps({"items": [{"text": "Ana " * 1000}]}).encode()
        chunks = (large[i : i + 100] for i in range(0, len(large), 100))
        for content in (large, chunks):
            answer = http.post("/v1/rewards", content=content)
            assert answer.status_code == 413
            assert "1,000 bytes" in answer.json()["error"]["message"]
        assert http.post("/v1/rewards", json={"items": [PAIR]}).status_code == 200


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({}, "holds no text"),
        ({"prompt": "Ana"}, "items[2]"),
        ({"completion": 5}, "completion"),
        ({"text": "a", "words": "b"}, "words"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [1, 2**70]}, str(2**70)),
        ({"input_ids": [5, 600_000]}, "600000"),
        ({"input_ids": [5, -1]}, "-1"),
        ({"input_ids": [5, 1.5]}, "input_ids"),
        ({"input_ids": [5, True]}, "input_ids"),
        ({"input_ids": [5], "text": "a"}, "beside text"),
        ({"input_ids": [1, 1, 5]}, "BOS"),
        ({"input_ids": [1, 5, 0]}, "pad"),
        ({"text": "a", "places": [0]}, "places"),
        ({"messages": []}, "items[2]"),
        ({"messages": [{"role": "clown", "content": "a"}]}, "items[2]"),
        ({"prompt": "Ana", "completion": "a", "terminated": "no"}, "terminated"),
        ({"text": "Ana " * 3000}, "items[2]"),
        ({"text": "\ud800"}, ""),
    ],
)
def test_a_bad_item_is_refused_by_its_name(item: Any, said: str, servers: Any) -> None:
    body = json.dumps({"items": [PAIR, PAIR, item]}).encode()
    with client(servers("pairwise").url) as http:
        answer = http.post("/v1/rewards", content=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"]
    assert "items[2]" in error["message"] or not said
    assert error["cure"]


@pytest.mark.parametrize("places", [[-1], [4], [2**40], []])
def test_places_that_a_text_does_not_have_are_refused(places: Any, servers: Any) -> None:
    item = {"input_ids": [5, 6, 7, 8], "places": places}
    answer = post(servers("process").url, "/v1/steps", {"items": [item]})
    assert answer.status_code == 400, answer.text
    assert "items[0]" in answer.json()["error"]["message"]


def broken_for(scorer: Any, word: str) -> Any:
    """The scorer, whose model says NaN of each text with this word."""
    token = scorer.tokenizer(word, add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        scorer.reward_model.model.get_input_embeddings().weight[token] = torch.nan
    return scorer


def test_a_score_that_is_no_number_is_none_and_harms_no_other(scorers: Any) -> None:
    rows = [{"prompt": "Ana has 3 pens.", "completion": text} for text in ("5", "$", "6")]
    want = scorers("pairwise").score(rows).raw
    with served(broken_for(loaded("pairwise"), "$"), overlong="error") as server:
        answer = post(server.url, "/v1/rewards", {"items": rows, "return": ["raw", "z"]})
        found = answer.json()["rewards"]
        assert answer.status_code == 200
        assert [found[0]["raw"], found[2]["raw"]] == pytest.approx(want[[0, 2]].tolist(), abs=1e-5)
        assert found[1]["raw"] is found[1]["z"] is None
        assert "not finite" in found[1]["reason"]
        for path, body in (
            ("/classify", {"input": ["Ana", "$"]}),
            ("/pooling", {"input": ["Ana", "$"]}),
            ("/get_reward", {"query": ["Ana", "$"]}),
        ):
            answer = post(server.url, path, body)
            assert answer.status_code == 422
            assert "[1]" in answer.text
        pair = {"prompt": "Ana", "a": "5", "b": "$"}
        item = post(server.url, "/v1/compare", {"pairs": [pair]}).json()["comparisons"][0]
        assert item["margin"] is item["probability"] is None
        assert "not finite" in item["why"]
        with client(server.url) as http:
            assert "companion_scores_not_finite_total" in http.get("/metrics").text


# ---------------------------------------------------------------------- the routes of others


def rendered(scorer: Any, row: Any) -> str:
    """A text as an engine gets it: with its special tokens, as the policy saw and wrote it."""
    return scorer.tokenizer.decode(scorer.formatter.encode_row(row).input_ids)


def test_classify_gives_raw_scores_unless_an_activation_is_asked_for(
    servers: Any, scorers: Any
) -> None:
    scorer, url = scorers("pairwise"), servers("pairwise").url
    rows = rows_of("pairwise")
    texts = [rendered(scorer, row) for row in rows]
    ids = [encoded.input_ids for encoded in scorer.formatter.encode_many(rows)]
    want = scorer.score(rows).raw
    for given in (texts, ids):
        for asked, wanted in (({}, want), ({"use_activation": False}, want), (True, expit(want))):
            body = {"input": given, **({"use_activation": True} if asked is True else asked)}
            answer = post(url, "/classify", body)
            assert answer.status_code == 200, answer.text
            got = [item["probs"] for item in answer.json()["data"]]
            np.testing.assert_allclose(got, wanted[:, None], atol=1e-5)
    one = post(url, "/classify", {"input": texts[0]}).json()
    assert one["data"][0]["probs"] == pytest.approx([want[0]], abs=1e-5)
    assert post(url, "/classify", {"input": ids[0]}).json()["data"] == one["data"]
    assert one["usage"]["prompt_tokens"] == len(ids[0])
    talk = {"messages": [*rows[0]["prompt"], *rows[0]["completion"]]}
    assert post(url, "/classify", talk).json()["data"] == one["data"]


def test_a_field_that_would_change_the_score_is_refused(servers: Any) -> None:
    url = servers("pairwise").url
    body = {"input": ["Ana has 3 pens"], "model": "pairwise"}
    want = post(url, "/classify", body).json()["data"]
    harmless = {"user": "x", "request_id": "y", "priority": 3, "encoding_format": "float"}
    same = {"truncate_prompt_tokens": None, "chat_template": None, "add_generation_prompt": False}
    assert post(url, "/classify", {**body, **harmless, **same}).json()["data"] == want
    for more in (
        {"softmax": False},
        {"activation": False},
        {"normalize": True},
        {"truncate_prompt_tokens": 5},
        {"chat_template": "x"},
        {"nonsense": 1},
        {"model": "another"},
        {"use_activation": "no"},
        {"messages": CHAT},
        {"input": []},
        {"input": None},
        {"input": [[]]},
        {"input": ["a", 5]},
        {"input": [[5, 600_000]]},
        {"input": ["Ana " * 3000]},
    ):
        answer = post(url, "/classify", {**body, **more})
        assert answer.status_code == 400, (more, answer.text)
        assert answer.json()["error"]["code"] == 400
        if more.keys().isdisjoint({"input", "messages", "model"}):
            assert next(iter(more)) in answer.json()["error"]["message"]
    assert "use_activation" in post(url, "/classify", {**body, "softmax": True}).text
    assert post(servers("process").url, "/classify", {"input": "Ana"}).status_code == 400


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_pooling_gives_the_logits_of_every_token(kind: str, servers: Any, scorers: Any) -> None:
    scorer, url = scorers(kind), servers(kind).url
    ids = [list(text.encoded.input_ids) for text in scorer.prepare(rows_of(kind)[:6]).texts]
    want = scorer.logits([EncodedSteps(Encoded(x, 0, True), list(range(len(x)))) for x in ids])
    found = post(url, "/pooling", {"input": ids, "task": "token_classify"}).json()["data"]
    active = post(url, "/pooling", {"input": ids, "use_activation": True}).json()["data"]
    for logits, raw, other in zip(want, found, active, strict=True):
        np.testing.assert_allclose(raw["data"], logits.numpy(), atol=1e-5)
        shape = expit if logits.shape[1] == 1 else lambda x: softmax(x, axis=-1)
        np.testing.assert_allclose(other["data"], shape(logits.numpy()), atol=1e-5)
    assert post(url, "/pooling", {"input": ids, "task": "classify"}).status_code == 400


def test_pooling_of_a_model_with_one_score(servers: Any, scorers: Any) -> None:
    ids = scorers("pairwise").formatter.encode_row(PAIR).input_ids
    found = post(servers("pairwise").url, "/pooling", {"input": ids}).json()["data"]
    want = scorers("pairwise").score([PAIR]).raw
    assert found[0]["data"] == pytest.approx(want.tolist(), abs=1e-5)


def test_get_reward_reads_what_the_policy_saw_and_wrote(scorers: Any, tmp_path: Path) -> None:
    scorer = scorers("pairwise")
    rows = [{**row, "terminated": ended} for row in rows_of("pairwise")[:4] for ended in (1, 0)]
    rows = [{**row, "terminated": bool(row["terminated"])} for row in rows]
    encoded = scorer.formatter.encode_many(rows)
    queries = [scorer.tokenizer.decode(item.input_ids) for item in encoded]
    prompts = [scorer.tokenizer.decode(item.input_ids[: item.prompt_length]) for item in encoded]
    want = scorer.score(rows).raw
    assert min(abs(want[::2] - want[1::2])) > 1e-3, "the end makes no difference here"
    with served(scorer_of("pairwise"), overlong="error", log_dir=tmp_path) as server:
        for more in ({}, {"prompts": prompts, "labels": [""] * len(rows)}):
            answer = post(server.url, "/get_reward", {"query": queries, **more})
            assert answer.status_code == 200, answer.text
            np.testing.assert_allclose(answer.json()["rewards"], want, atol=1e-5)
            assert answer.json()["scores"] == answer.json()["rewards"]
            assert answer.json()["extra_logs"] == {"tokens_cut": [0.0] * len(rows)}
        short = post(server.url, "/get_reward", {"query": queries, "prompts": prompts[1:]})
        assert short.status_code == 400
        assert post(server.url, "/get_reward", {"query": ["a " * 3000]}).status_code == 400
    (log,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [line["input_ids"] for line in lines] == 2 * [item.input_ids for item in encoded]


def test_get_reward_is_off_until_somebody_says_what_is_cut(servers: Any) -> None:
    answer = post(servers("pairwise").url, "/get_reward", {"query": ["Ana"]})
    assert answer.status_code == 400
    assert "--overlong" in answer.text
    scorer = loaded("pairwise", overlong="truncate_prompt", max_length=32)
    query = rendered(scorer_of("pairwise"), {"prompt": "Ana has 3 pens. " * 20, "completion": "5"})
    prompt = query[: query.rindex("5")]
    with served(scorer, overlong="truncate_prompt") as server:
        body = {"query": [query, "Ana has 3"], "prompts": [prompt, "Ana"]}
        found = post(server.url, "/get_reward", body)
        assert found.status_code == 200, found.text
        n = len(scorer.tokenizer(query, add_special_tokens=False)["input_ids"])
        assert found.json()["extra_logs"]["tokens_cut"] == [n - 32, 0.0]
        with client(server.url) as http:
            assert f"companion_tokens_cut_total {n - 32}.0" in http.get("/metrics").text


# ---------------------------------------------------------------------- metrics and log


def samples(url: str) -> dict[tuple[str, ...], float]:
    with client(url) as http:
        text = http.get("/metrics").text
    return {
        (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_move_and_no_client_can_make_them_grow(scorers: Any) -> None:
    want = scorers("pairwise").score(rows_of("pairwise"))
    with served(scorer_of("pairwise"), name="m") as server:
        post(server.url, "/v1/rewards", {"items": [PAIR]})
        post(server.url, "/nowhere", {})
        post(server.url, "/v1/rewards", {"items": []})
        post(server.url, "/classify", {"nonsense": 1})
        before = samples(server.url)
        post(server.url, "/v1/rewards", {"items": rows_of("pairwise")})
        with client(server.url) as http:
            for i in range(20):
                http.post(f"/nowhere/{i}", json={})
                http.delete(f"/v1/{i}")
                http.post("/v1/rewards", json={"items": [{f"field{i}": 1}], f"x{i}": 2})
                http.post("/classify", json={f"field{i}": 1, "model": f"model{i}"})
        after = samples(server.url)
    moved = {name: after[name] - before.get(name, 0) for name in after}
    assert moved["companion_texts_total",] == len(want)
    assert moved["companion_tokens_total",] == want.n_tokens.sum()
    assert 0 < moved["companion_tokens_computed_total",] <= want.n_tokens.sum()
    assert moved["companion_score_count",] == len(want)
    assert moved["companion_score_bucket", "le=0.0"] == np.sum(want.z <= 0)
    assert moved["companion_requests_total", "route=/v1/rewards", "status=200"] == 1
    assert moved["companion_requests_total", "route=/v1/rewards", "status=400"] == 20
    assert moved["companion_requests_total", "route=other", "status=404"] == 40
    assert moved["companion_refusals_total", "reason=bad_request"] == 40
    for phase in ("format", "room", "queue", "model"):
        assert moved["companion_phase_seconds_count", f"phase={phase}"] == 1
    assert after["companion_queue_tokens",] == after["companion_waiting_requests",] == 0
    new = {name for name in after if name not in before} - {
        name for name in after if "route=/metrics" in name
    }
    assert new == set(), "a client made a new series"
    version = server.service.identity.version
    assert after["companion_model_info", "kind=scalar", "name=m", f"version={version}"] == 1


def test_the_log_holds_ids_and_scores_and_words_only_if_asked(scorers: Any, tmp_path: Path) -> None:
    rows = rows_of("pairwise")[:3]
    want = scorers("pairwise").score(rows).raw
    encoded = scorers("pairwise").formatter.encode_many(rows)
    for text in (False, True):
        folder = tmp_path / str(text)
        with served(scorer_of("pairwise"), log_dir=folder, log_text=text) as server:
            answer = post(server.url, "/v1/rewards", {"items": rows}).json()
            post(server.url, "/v1/rewards", {"items": [{}]})
        (path,) = folder.iterdir()
        assert path.stat().st_mode & 0o077 == 0
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [line["input_ids"] for line in lines] == [item.input_ids for item in encoded]
        assert [line["raw"] for line in lines] == pytest.approx(want.tolist(), abs=1e-5)
        assert {line["request"] for line in lines} == {answer["id"]}
        assert {line["model_version"] for line in lines} == {answer["model_version"]}
        assert {line["protocol"] for line in lines} == {"native"}
        for name in ("prompt_length", "terminated", "cut_tokens"):
            assert [line[name] for line in lines] == [getattr(item, name) for item in encoded]
        assert [line["warnings"] for line in lines] == [[] for _ in lines]
        assert ("books" in path.read_text(encoding="utf-8")) is text


def test_nothing_is_written_unless_a_folder_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with served(scorer_of("pairwise")) as server:
        post(server.url, "/v1/rewards", {"items": [PAIR]})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- a queue that is full


def hurry(monkeypatch: pytest.MonkeyPatch, **changes: float) -> None:
    for protocol, patience in PATIENCE.items():
        monkeypatch.setitem(PATIENCE, protocol, replace(patience, **changes))


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/rewards", 429), ("/classify", 503), ("/get_reward", 503)]
)
def test_without_room_a_request_waits_then_is_refused_as_its_client_wants_it(
    path: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, room=0.2)
    scorer = scorer_of("pairwise", max_tokens_per_batch=8)
    with served(scorer, queue_tokens=20, overlong="error") as server:
        slow = Slow(scorer, 0.7)
        with ThreadPoolExecutor(4) as threads:
            first = threads.submit(post, server.url, path, ROUTES[path])
            assert slow.began.wait(30)
            second = threads.submit(post, server.url, path, ROUTES[path])
            while not len(server.service.queue):
                time.sleep(0.01)
            began = time.monotonic()
            many = {"items": [PAIR] * 8, "query": ["Ana has 3 pens"] * 8, "input": ["Ana"] * 8}
            refused = post(
                server.url, path, {name: many[name] for name in ROUTES[path] if name in many}
            )
            waited = time.monotonic() - began
            assert refused.status_code == status, refused.text
            assert waited >= 0.2
            assert refused.headers["retry-after"]
            assert "room" in refused.text
            assert first.result().status_code == second.result().status_code == 200
        assert samples(server.url)["companion_refusals_total", "reason=queue_full"] == 1


@pytest.mark.parametrize("path", ["/v1/rewards", "/classify", "/get_reward"])
def test_an_answer_that_comes_too_late_is_a_504(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_of("pairwise", max_tokens_per_batch=8)
    with served(scorer, overlong="error") as server:
        Slow(scorer, 0.5)
        hurry(monkeypatch, answer=0.2)
        answer = post(server.url, path, ROUTES[path])
        assert answer.status_code == 504, answer.text
        assert "0.2 s" in answer.text
        hurry(monkeypatch, answer=60)
        assert post(server.url, path, ROUTES[path]).status_code == 200
        assert server.service.queue.tokens == 0


def test_the_texts_of_a_client_that_hung_up_are_not_run() -> None:
    scorer = scorer_of("pairwise", max_tokens_per_batch=1)
    with served(scorer) as server:
        slow = Slow(scorer, 0.15)
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(post, server.url, "/v1/rewards", {"items": [PAIR]})
            assert slow.began.wait(30)
            body = json.dumps({"items": [{"input_ids": [70 + i] * 9} for i in range(20)]}).encode()
            host, port = server.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as sock:
                head = (
                    f"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                sock.sendall(head.encode() + body)
                deadline = time.monotonic() + 30
                while server.service.queue.tokens < 20 and time.monotonic() < deadline:
                    time.sleep(0.005)
            assert first.result().status_code == 200
        last = post(server.url, "/v1/rewards", {"items": [{"input_ids": [60, 61]}]})
        assert last.status_code == 200
        assert server.service.queue.tokens == len(server.service.queue) == 0
        ran = [ids for ids in slow.seen if ids[0] >= 70]
        assert len(ran) <= 4, "texts were run that nobody waited for"
        assert slow.seen[-1] == [60, 61]
        assert samples(server.url)["companion_refusals_total", "reason=client_gone"] == 1


def test_a_server_whose_model_thread_died_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(scorer_of("pairwise")) as server, client(server.url) as http:
        assert http.get("/livez").status_code == 200
        monkeypatch.setattr(type(server.service.engine), "alive", property(lambda _: False))
        assert http.get("/livez").status_code == 503
        monkeypatch.undo()


def test_a_scorer_and_another_way_with_long_texts_do_not_go_together() -> None:
    from companion.errors import DataError

    with (
        pytest.raises(DataError, match="truncate_prompt"),
        served(scorer_of("pairwise"), overlong="truncate_prompt"),
    ):
        pass


def test_documentation_loads_nothing_from_elsewhere_and_lists_every_route(servers: Any) -> None:
    with client(servers("pairwise").url) as http:
        schema = http.get("/openapi.json").json()
    assert {
        *ROUTES,
        "/v1/steps",
        "/v1/models",
        "/v1/reference",
        "/livez",
        "/readyz",
        "/metrics",
    } <= (schema["paths"].keys())
    for path in ROUTES:
        content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["examples"]


def test_the_examples_of_the_documentation_are_answered(servers: Any) -> None:
    with client(servers("pairwise").url) as http:
        schema = http.get("/openapi.json").json()
        for path in ("/v1/rewards", "/v1/compare", "/classify", "/pooling"):
            content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            for example in content["examples"].values():
                answer = http.post(path, json=example["value"])
                assert answer.status_code == 200, (path, answer.text)


def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_head() -> None:
    # asyncio switches Nagle's algorithm off only where a socket names its protocol; with it each
    # answer on a kept connection comes 40 ms late
    sock = listen("127.0.0.1", 0)
    try:
        with socket.create_connection(sock.getsockname()):
            taken, _ = sock.accept()
            assert taken.proto == socket.IPPROTO_TCP
            taken.close()
    finally:
        sock.close()


def test_what_cannot_fit_is_refused_before_it_is_tokenised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(scorer_of("pairwise"), allow_unchecked=True) as server, client(server.url) as http:
        fits = {"items": [{"prompt": "Ana has 3 pens.", "completion": "word " * 100}]}
        assert http.post("/v1/rewards", json=fits).status_code == 200
        monkeypatch.setattr(server.service.scorer, "prepare", lambda *_, **__: pytest.fail("asked"))
        for item in (
            {"prompt": "Ana has 3 pens.", "completion": "word " * 400_000},
            {"messages": [{**CHAT[0], "content": "word " * 400_000}, CHAT[1]]},
        ):
            answer = http.post("/v1/rewards", json={"items": [PAIR, item]})
            assert answer.status_code == 400
            assert answer.json()["error"]["index"] == 1
            assert "letters" in answer.json()["error"]["message"]
