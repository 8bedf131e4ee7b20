"""Endpoints are audited: sound ones are called sound, sick ones by their sickness's name."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from served import ASSETS

from companion.audit import EndpointSubject, audit, open_subject
from companion.audit.checks import endpoint
from companion.audit.endpoint import ROUTES, Protocol
from companion.audit.museum.collection import audit_specimen
from companion.audit.museum.healthy import save_with_manifest, tutor_reward
from companion.audit.museum.servers import SPECIMENS, Sickness, sick_server
from companion.audit.museum.specimen import Specimen
from companion.audit.subject import Batch, BudgetSpent
from companion.cli.main import main
from companion.errors import DataError, ServiceError
from companion.scoring.servers import Refused, Unreachable
from companion.serving import running

pytestmark = pytest.mark.serving

IDS = [[5, 17, 4, 2], [9, 9, 2]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_manifest(tutor_reward(), tmp_path_factory.mktemp("audited") / "model")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Any]:
    """The companion's own server, with all three of its protocols."""
    with running(model, overlong="error") as own:
        yield own


class Scripted(ThreadingHTTPServer):
    """A server that answers what a test says, and keeps what it was asked."""

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.asked = answers, [("", "")][:0]
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path))
        status, body = self.server.answers.get(self.path, (404, {}))
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_POST = _answer

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def scripted(**answers: Any) -> Iterator[Scripted]:
    server = Scripted({"/" + name.replace("__", "/"): value for name, value in answers.items()})
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# ---------------------------------------------------------------------- finding out


def document(*paths: str) -> tuple[int, Any]:
    return 200, {"openapi": "3.1.0", "paths": {path: {} for path in paths}}


NOTHING = (200, {"data": []})
VLLM = (200, {"data": [{"id": "reward", "owned_by": "vllm", "max_model_len": 512}]})
OURS = (200, {"data": [{"id": "m", "model_version": "1", "kind": "scalar", "max_length": 99}]})


@pytest.mark.parametrize(
    ("answers", "protocol"),
    [
        ({"openapi.json": document("/classify", "/v1/models"), "v1__models": VLLM}, "vllm"),
        ({"openapi.json": document("/get_reward")}, "openrlhf"),
        ({"openapi.json": document("/classify", "/get_reward", "/v1/rewards")}, "companion"),
        ({"v1__models": VLLM}, "vllm"),
        ({"v1__models": OURS}, "companion"),
    ],
)
def test_what_it_speaks_is_found_before_anything_is_posted(
    answers: dict[str, Any], protocol: str
) -> None:
    with scripted(**answers) as server:
        subject = open_subject(server.url)
        assert isinstance(subject, EndpointSubject)
        assert subject.protocol == protocol
        assert {method for method, _ in server.asked} == {"GET"}
        said = " ".join(subject.posts("pairs.jsonl"))
        assert ROUTES[subject.protocol] in said
        assert "at most 1,000" in said
        assert "pairs.jsonl" in said
        assert subject.max_length == {"vllm": 512}.get(protocol, subject.max_length)


def test_what_cannot_be_found_out_is_asked_for() -> None:
    for answers in ({}, {"v1__models": NOTHING}, {"openapi.json": (200, [])}):
        with scripted(**answers) as server:
            with pytest.raises(DataError, match="--protocol"):
                open_subject(server.url)
            assert {method for method, _ in server.asked} == {"GET"}
            named = open_subject(server.url, protocol="openrlhf")
            assert isinstance(named, EndpointSubject)
            routed = open_subject(server.url + "/get_reward")
            assert isinstance(routed, EndpointSubject)
            assert routed.protocol == "openrlhf"
            assert routed.route == named.route == server.url + "/get_reward"


def test_a_key_that_is_wanted_and_a_model_without_such_scores() -> None:
    with scripted(v1__models=(401, {"error": {"message": "no token"}})) as server:
        with pytest.raises(Refused, match="no token"):
            open_subject(server.url)
        assert main(["audit", server.url]) == 3
    process = (200, {"data": [{"model_version": "1", "kind": "process"}]})
    with scripted(v1__models=process) as server:
        with pytest.raises(DataError, match="process model"):
            open_subject(server.url, protocol="vllm")
        assert open_subject(server.url).abilities == {"rows", "threads"}


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted() as server:
        url = server.url
    with pytest.raises(Unreachable, match="no answer"):
        open_subject(url)
    assert main(["audit", url]) == 3
    assert "no answer" in capsys.readouterr().err
    assert main(["audit", "http://"]) in (2, 3)
    with pytest.raises(DataError, match="of an endpoint"):
        open_subject("some/folder", protocol="vllm")
    with pytest.raises(DataError, match="loaded here"):
        open_subject(url, device="cpu")


def test_a_server_that_goes_ends_the_audit() -> None:
    """And one whose route is closed: nothing more can be asked."""
    with sick_server(tutor_reward(), "companion") as server:
        subject = open_subject(server.url)
    with pytest.raises(Unreachable):
        audit(subject)
    with scripted(v1__models=OURS) as server2, pytest.raises(ServiceError, match="404"):
        audit(server2.url)
    assert main(["audit", server2.url, "--protocol", "companion"]) == 3


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"rewards": "none"}),
        (200, {"rewards": []}),
        (200, {"rewards": [{"index": 0}]}),
        (200, {"rewards": [{"index": 1, "raw": 1.0}]}),
        (200, {"rewards": [{"index": 0, "raw": "high"}]}),
        (200, [1.0]),
        (200, None),
        (400, {"error": {"message": "no such model"}}),
        (500, "<html>"),
    ],
)
def test_an_answer_without_a_score_is_no_sound_one(answer: tuple[int, Any]) -> None:
    """Nothing was asked then, so nothing may be called sound."""
    with scripted(v1__models=OURS, v1__rewards=answer) as server:
        with pytest.raises(ServiceError, match="an ordinary text has no score"):
            audit(server.url)
        assert main(["audit", server.url]) == 3
        assert server.asked.count(("POST", "/v1/rewards")) == 2


# ---------------------------------------------------------------------- asking


@pytest.mark.parametrize("protocol", list(ROUTES))
def test_scores_are_the_models_own(server: Any, model: Path, protocol: str) -> None:
    """As ids and as rows, alone and together, by each protocol of the real server."""
    from companion import RewardScorer

    scorer = RewardScorer.from_pretrained(model, device="cpu")
    subject = open_subject(server.url, protocol=protocol, model=model)
    assert isinstance(subject, EndpointSubject)
    assert subject.dtype == "float32"
    row = {"prompt": "What is 2 + 3?", "completion": "2 + 3 = 5\nThe answer is 5."}
    ids = [subject.encode(row), subject.encode({**row, "completion": "6."})]
    want = scorer.score_encoded(ids)
    for found in (subject.alone(ids), subject.call(Batch(ids))):
        np.testing.assert_allclose(found, want, atol=1e-4)
    asked = subject.requests
    subject.alone(ids)
    assert subject.requests == asked  # a text is asked once
    assert (subject.rounding(want) < 0.01).all()
    assert (subject.rounding(want) > 1e-7).all()
    if protocol == "openrlhf":
        return
    rows: list[Any] = [row, {**row, "completion": "6."}]
    np.testing.assert_allclose(subject.call_rows(rows), want, atol=1e-4)
    np.testing.assert_allclose(subject.rows_alone(rows), want, atol=1e-4)
    messages = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    for form in (messages, {"messages": messages}):
        assert subject.call_rows([form])[0] == pytest.approx(want[0], abs=1e-4)


def test_no_more_requests_or_tokens_than_allowed(server: Any) -> None:
    subject = open_subject(server.url, max_requests=3)
    report = audit(subject, checks=endpoint.CHECKS)
    assert subject.requests == report.requests == 3
    assert report.sound
    assert any("all 3 requests are spent" in r.outcome.seen for r in report.results)
    assert isinstance(subject, EndpointSubject)
    subject.max_requests, subject.max_tokens = None, 10
    with pytest.raises(BudgetSpent, match="beyond the 10"):
        subject.call(Batch([[1] * 11]))
    assert subject.requests == 3


def test_the_rounding_follows_dtype_depth_and_size(server: Any) -> None:
    subject = open_subject(server.url)
    assert isinstance(subject, EndpointSubject)
    scores = np.array([0.5, -3.0, 2.0])
    coarse = subject.rounding(scores)
    assert subject.dtype == "bfloat16"  # the coarsest, where nobody knows
    assert coarse[1] > coarse[2] > coarse[0]
    np.testing.assert_allclose(subject.rounding(10 * scores), 10 * coarse)
    subject.dtype = "float32"
    assert (subject.rounding(scores) < coarse / 100).all()


# ---------------------------------------------------------------------- sound and sick


@pytest.mark.parametrize(
    ("protocol", "named"),
    [("companion", True), ("companion", False), ("vllm", True), ("openrlhf", False)],
)
def test_the_companions_own_server_is_sound(
    server: Any, model: Path, protocol: str, named: bool
) -> None:
    report = audit(
        server.url, protocol=protocol, model=model if named else None, checks=endpoint.CHECKS
    )
    told = report.table()
    assert report.sound, told
    assert report.what == "endpoint"
    assert {"batch-changes-score", "silent-cut", "errors-hidden"} <= {
        r.check.name for r in report.results if r.verdict == "sound"
    }, told
    if named:
        assert report["golden-texts-moved"].verdict == "sound"
        assert report["activation-applied"].verdict == "sound"


def test_a_model_with_values_of_steps_is_asked_by_rows() -> None:
    folder = ASSETS / "process"
    with running(folder, overlong="error", allow_unchecked=True) as own:
        report = audit(own.url, model=folder, checks=endpoint.CHECKS)
    assert report.sound
    assert report["batch-changes-score"].verdict == "sound", report.table()
    assert report["golden-texts-moved"].verdict == "not asked"


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda one: one.name)
def test_each_sick_server_is_caught_under_its_name(specimen: Specimen, tmp_path: Path) -> None:
    report = audit_specimen(specimen, tmp_path)
    caught = report[specimen.caught_by].outcome
    assert caught.status == "found", report.table()
    assert caught.script is not None
    assert "import companion" not in caught.script


@pytest.mark.slow
@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda one: one.name)
def test_a_sick_server_has_no_other_fault(specimen: Specimen, tmp_path: Path) -> None:
    report = audit_specimen(specimen, tmp_path, whole=True)
    print(report.table())
    assert report[specimen.caught_by].outcome.status == "found"
    assert set(report.faults) <= {specimen.caught_by, *specimen.also}


@pytest.mark.parametrize(
    ("protocol", "name", "sickness"),
    [
        ("companion", "answers-out-of-order", Sickness(sorts=True)),
        ("openrlhf", "batch-changes-score", Sickness(pads=True)),
        ("vllm", "fields-ignored", Sickness(by_default=True)),
        ("openrlhf", "silent-cut", Sickness(cut=256)),
        ("vllm", "errors-hidden", Sickness(hides=True)),
        ("companion", "empty-input", Sickness(scores_nothing=True)),
        ("companion", "activation-applied", Sickness(softmax=True)),
    ],
)
def test_a_script_ends_with_1_until_it_is_mended(
    protocol: Protocol, name: str, sickness: Sickness, tmp_path: Path
) -> None:
    """It needs nothing of ours, and does not cry wolf when the server is sound."""
    with sick_server(tutor_reward(), protocol, sickness) as server:
        checks = [check for check in endpoint.CHECKS if check.name == name]
        script = audit(server.url, checks=checks)[name].outcome.script
        assert script is not None
        (file := tmp_path / "script.py").write_text(script, encoding="utf-8")
        for now, code in ((sickness, 1), (Sickness(), 0)):
            server.sickness = now
            run = subprocess.run(
                [sys.executable, "-I", str(file)], capture_output=True, text=True, timeout=60
            )
            assert run.returncode == code, (run.stdout, run.stderr)


def test_the_command(server: Any, model: Path, tmp_path: Path, capfd: Any) -> None:
    """All of the audit, by the real server: what it says it posts, what it writes, how it ends."""
    files = {name: tmp_path / f"audit.{name}" for name in ("json", "html", "junit")}
    flags = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    words = ["audit", server.url, "--model", str(model), *flags, "--max_requests", "60"]
    assert main([*words, "--waive", "pad-is-eos=not so", "--at_most", "verbosity=100"]) == 0
    out, err = capfd.readouterr()
    assert "found by /openapi.json" in err
    assert "at most 60 requests will be posted" in err
    assert out.splitlines()[1].startswith("sound: ")
    assert "note: the waiver of pad-is-eos was not needed (not so)" in out
    data = json.loads(files["json"].read_text())
    assert data["requests"] <= 60
    assert data["protocol"] == "companion"
    assert ElementTree.parse(files["junit"]).getroot()[0].get("failures") == "0"
    assert "<script" not in files["html"].read_text()
    for bad in (
        ["--waive", "no-such=why"],
        ["--waive", "dropout"],
        ["--at_most", "pad-is-eos=1"],
        ["--at_least", "verbosity=much"],
        ["--max_requests", "-1"],
        ["--against", "rows.jsonl"],
        ["--api_key_env", "NO_SUCH_VARIABLE"],
    ):
        assert main(["audit", server.url, *bad]) == 2, bad
    with sick_server(tutor_reward(), "vllm", Sickness(sigmoid=True)) as sick:
        words = ["audit", sick.url, "--model", str(model), "--max_requests", "60"]
        assert main(words) == 1
        assert "FAULT  activation-applied" in capfd.readouterr().out
        assert main([*words, "--waive", "activation-applied=known"]) == 0
        assert "WAIVED  activation-applied" in capfd.readouterr().out
