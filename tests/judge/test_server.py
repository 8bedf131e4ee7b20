"""A judge behind a server: one that misbehaves in every way, and `transformers serve` for real."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from companion import Judge
from companion.errors import JudgeError
from companion.tutor import TUTOR_BASE, make_rows

pytestmark = pytest.mark.serving
ROWS = [{"prompt": "p", "a": "one", "b": "two"}]


def reply(text, finish="stop", logprobs=None):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if logprobs is not None:
        choice["logprobs"] = {"content": logprobs}
    return 200, {}, json.dumps({"id": "x", "choices": [{"index": 0, **choice}]})


@pytest.fixture
def serve():
    """``serve(script)``: a server whose replies (status, headers, text) ``script`` makes."""
    servers = []

    def start(script):
        bodies, keys = [], []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                keys.append(self.headers["Authorization"])
                bodies.append(body)
                status, headers, text = script(len(bodies) - 1, body)
                data = text.encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", bodies, keys

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


SOON = {"retry-after-ms": "5"}


def judge_at(url, **options):
    return Judge.from_server("m", url, "{prompt} {a} {b}", concurrency=1, **options)


def test_the_request_is_greedy_and_carries_the_key_of_the_environment(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    url, bodies, keys = serve(lambda number, body: reply("[[A]]"))
    judge = judge_at(
        url,
        api_key_env="MY_KEY",
        request={"logprobs": None, "top_logprobs": None, "seed": 1},
        chat_template_kwargs={"enable_thinking": False},
    )
    verdict = judge.compare(ROWS)[0]
    assert (verdict.preference, verdict.reason) == ("tie", "disagreement")
    assert keys == ["Bearer secret"] * 2
    assert bodies[0]["temperature"] == 0
    assert bodies[0]["seed"] == 1
    assert "logprobs" not in bodies[0]
    assert bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert {body["messages"][0]["content"] for body in bodies} == {"p one two", "p two one"}


def test_it_is_asked_again_after_429_500_and_garbage(serve):
    def script(number, body):
        text = "two one" in body["messages"][0]["content"]
        steps = [(429, SOON, "{}"), (500, SOON, "oops"), (200, {}, "<html>"), (200, {}, "{}")]
        return steps[number] if number < len(steps) else reply("[[B]]" if text else "[[A]]")

    url, bodies, _ = serve(script)
    judge = judge_at(url)
    assert judge.compare(ROWS)[0].preference == "a"
    assert judge.backend.retries == 4
    assert len(bodies) == 6


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((503, SOON, "{}"), "503"),
        ((401, {}, '{"error": {"message": "bad key"}}'), "401: bad key(.|\n)*OPENAI_API_KEY"),
        ((404, {}, '{"detail": "no model m"}'), "404: no model m(.|\n)*ends in /v1"),
        ((200, {}, "hello"), "no chat completion: 'hello'"),
    ],
)
def test_a_server_that_cannot_be_used_stops_the_run(serve, answer, message):
    url, _, _ = serve(lambda number, body: answer)
    with pytest.raises(JudgeError, match=message):
        judge_at(url, max_retries=1).compare(ROWS)


def test_no_server_at_all():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(JudgeError, match="no answer after 1 tries"):
        judge_at(f"http://127.0.0.1:{port}/v1", max_retries=0).compare(ROWS)


def test_an_answer_that_takes_too_long_is_given_up(serve):
    def script(number, body):
        time.sleep(1)
        return reply("[[A]]")

    url, _, _ = serve(script)
    with pytest.raises(JudgeError, match="Timeout"):
        judge_at(url, max_retries=0, timeout=0.1).compare(ROWS)


def test_a_rejected_question_is_refused_and_not_asked_again(serve):
    url, bodies, _ = serve(lambda n, body: (400, {}, '{"error": {"message": "too long"}}'))
    verdict = judge_at(url).compare(ROWS)[0]
    assert verdict.preference is None
    assert "too long" in verdict.reason
    assert len(bodies) == 2


#: how servers say that an answer is none, or is not whole
NO_END = ("abort", "content_filter", "max_tokens", "model_length", "error", "tool_calls", None, 7)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply(""), "no verdict"),
        (reply(None), "no verdict"),
        (reply("[[A]] or [[B]]"), "conflicting verdicts"),
        (reply("[[A]]", finish="length"), "cut off"),
        *((reply("[[A]]", finish=why), "cut off") for why in NO_END),
    ],
)
def test_what_cannot_be_read_is_counted_by_its_reason(serve, answer, reason):
    url, _, _ = serve(lambda number, body: answer)
    judge = judge_at(url)
    assert judge.compare(ROWS)[0].reason == reason
    assert judge.counts[reason] == 2


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (reply("[[A]]"), True),
        (reply("[[A]]", finish="length"), True),  # it would be cut off again
        (reply("[[A]]", finish="max_tokens"), True),
        (reply(None), False),
        (reply(" "), False),
        (reply("", finish="length"), False),  # all of it was reasoning
        *(
            (reply("[[A]]", finish=why), False)
            for why in ("abort", "content_filter", "error", None)
        ),
    ],
)
def test_what_is_no_answer_is_asked_again(serve, answer, kept, tmp_path):
    for number in range(2):
        url, bodies, _ = serve(lambda number, body: answer)
        with judge_at(url, cache=tmp_path / "cache") as judge:
            judge.compare(ROWS)
        assert len(bodies) == (0 if number and kept else 2)


def test_a_list_of_content_parts_is_joined(serve):
    parts = [{"type": "text", "text": "I say [[A"}, {"type": "text", "text": "]]"}]
    url, _, _ = serve(lambda number, body: reply(parts))
    verdict = judge_at(url).compare(ROWS)[0]
    assert verdict.answers[0] == "I say [[A]]"
    assert verdict.first == "a"


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (
            {
                "message": "Unsupported parameter: 'max_tokens' is not supported with this model. "
                "Use 'max_completion_tokens' instead.",
                "code": "unsupported_parameter",
                "param": "max_tokens",
            },
            "max_completion_tokens",
        ),
        (
            {
                "message": "Unsupported value: 'temperature' does not support 0 with this model.",
                "code": "unsupported_value",
                "param": "temperature",
            },
            '"temperature": null',
        ),
        ({"message": "Unknown field top_logprobs"}, '"top_logprobs": null'),
        ({"message": "logprobs is not supported for this model"}, '"logprobs": null'),
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_a_setting_that_the_server_does_not_take_ends_the_run(serve, error, name, status):
    url, bodies, _ = serve(lambda n, body: (status, {}, json.dumps({"error": error})))
    with pytest.raises(JudgeError, match="does not take the setting") as stop:
        judge_at(url).compare(ROWS)
    assert name in stop.value.cure
    assert "--request" in stop.value.cure
    assert len(bodies) <= 2  # (the next one may be on its way)


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 128 tokens; max_tokens is too large",
        "'max_tokens' must be at least 1, got -40: too many input tokens",
        "the prompt was flagged by a filter",
    ],
)
def test_a_question_that_does_not_fit_is_a_bad_row(serve, message):
    url, _, _ = serve(lambda n, body: (400, {}, json.dumps({"error": {"message": message}})))
    assert message in judge_at(url).compare(ROWS)[0].reason


def test_probabilities_come_from_the_servers_likeliest_tokens(serve):
    def token(text, *top):
        others = [{"token": t, "logprob": lp} for t, lp in top]
        return {"token": text, "logprob": 0.0, "top_logprobs": others}

    decides = token("A", ("A", -0.5), ("B", -1.5))
    parts = [token("[[", ("[[", 0.0)), decides, token("]]", ("]]", 0.0)), token("<eos>")]
    url, _, _ = serve(lambda number, body: reply("[[A]]", logprobs=parts))
    verdict = judge_at(url).compare(ROWS)[0]
    assert verdict.logit_first == pytest.approx(1.0)
    assert verdict.logit_swapped == pytest.approx(-1.0)
    assert verdict.probability == pytest.approx(0.5)
    assert verdict.position_logit == pytest.approx(1.0)


def test_requests_keep_the_pace(serve):
    times = []

    def script(number, body):
        times.append(time.monotonic())
        return reply("[[A]]")

    url, _, _ = serve(script)
    rows = [{"prompt": str(i), "a": "x", "b": "y"} for i in range(2)]
    judge = Judge.from_server("m", url, "{prompt}{a}{b}", requests_per_minute=600)
    before = time.monotonic()  # a busy machine may hand over the first request late
    judge.compare(rows)
    assert times[-1] - before >= 0.3  # three gaps of a tenth of a second


def test_without_the_client_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(JudgeError, match=r"companion\[judge\]"):
        judge_at("http://127.0.0.1:1/v1")


# ---------------------------------------------------------------------- for real


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory):
    """`transformers serve` with the tutor base: address and folder.

    For a model of Qwen's architecture the server takes answers apart by Qwen's marks, and without
    them sends the whole conversation back as the answer. The tokenizer says which marks are ours.
    """
    folder = tmp_path_factory.mktemp("model") / "tutor-base"
    shutil.copytree(TUTOR_BASE, folder)
    config = folder / "tokenizer_config.json"
    marks = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|assistant|>",
        "fields": {"content": {"close": "<|eos|>", "content": "text"}},
    }
    config.write_text(json.dumps({**json.loads(config.read_text()), "response_template": marks}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    program = Path(sys.executable).parent / "transformers"
    words = [str(program), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--device", "cpu", "--dtype", "float32"]
    with open(log, "wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.2)
        else:
            pytest.fail(log.read_text()[-2000:])
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_a_real_server_says_what_the_model_says_here(transformers_serve):
    rows = make_rows("pairs", 8, seed=12)
    url, model = transformers_serve
    there = Judge.from_server(model, url, "tutor", concurrency=2)
    here = Judge.from_pretrained(TUTOR_BASE, "tutor", device="cpu")
    served, local = there.compare(rows), here.compare(rows)
    assert [v.answers for v in served] == [v.answers for v in local]
    assert [v.preference for v in served] == [v.preference for v in local]
    assert not there.counts["no verdict"]
    assert all(v.logit_first is None for v in served)  # this server sends no log-probabilities
