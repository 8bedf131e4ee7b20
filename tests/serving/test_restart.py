"""`companion serve` is started again under load: nothing is refused, nothing lost."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest
from served import ASSETS, client, rows_of

from companion.cli.main import main
from companion.scoring import load_scorer
from companion.serving import listen

pytestmark = pytest.mark.serving


class Served:
    """The command as a process; what it says on stderr is read all the time."""

    def __init__(self, *flags: str) -> None:
        words = [sys.executable, "-m", "companion", "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._said = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = re.search(r"http://\S+", self.wait_for("ready: "))[0]

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._said:
                self.lines.append(line)
                self._said.notify_all()

    def wait_for(self, words: str, times: int = 1) -> str:
        """The line that says so for the so-manieth time."""

        def found() -> list[str]:
            return [line for line in self.lines if words in line][times - 1 :]

        with self._said:
            assert self._said.wait_for(found, timeout=120), "".join(self.lines)
            return found()[0]

    def workers(self) -> list[int]:
        """Process ids of the children."""
        pid = self.process.pid
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self) -> None:
        """Stop it, if a test has not, and its workers."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                for pid in self.workers():
                    os.kill(pid, signal.SIGKILL)
                self.process.kill()
                self.process.wait(60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSETS / "pairwise", tmp_path / "model"))


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    command = Served("--model", str(folder), "--allow_unchecked", "--overlong", "error")
    yield command
    command.end()


def test_a_restart_refuses_nothing_and_loses_nothing(served: Served, folder: Path) -> None:
    rows = rows_of("pairwise")
    want = load_scorer(folder, overlong="error").score(rows).raw
    enough = threading.Event()

    def post(http: httpx2.Client, i: int) -> tuple[int, float]:
        answer = http.post("/v1/rewards", json={"items": [rows[i % len(rows)]]})
        assert answer.status_code == 200, answer.text
        return i % len(rows), answer.json()["rewards"][0]["raw"]

    def keep_posting(first: int) -> list[tuple[int, float]]:
        # with connections that are kept, as RL jobs have them
        with httpx2.Client(base_url=served.url, timeout=120) as http:
            found = [post(http, first + i) for i in range(25)]
            while not enough.is_set() and len(found) < 5000:
                found.append(post(http, first + len(found)))
                time.sleep(0.1)
        return found

    try:
        with ThreadPoolExecutor(8) as threads:
            posting = [threads.submit(keep_posting, 7 * i) for i in range(8)]
            try:
                (first,) = served.workers()
                os.kill(first, signal.SIGTERM)
                served.wait_for("ready: ", 2)
                (second,) = served.workers()
                assert second != first
                served.process.send_signal(signal.SIGHUP)
                served.wait_for("ready: ", 3)
                deadline = time.monotonic() + 60
                while second in served.workers() and time.monotonic() < deadline:
                    time.sleep(0.05)
                assert len(served.workers()) == 1
                assert second not in served.workers()
            finally:
                enough.set()
            found = [one for own in posting for one in own.result()]
    finally:
        enough.set()
    assert len(found) >= 200
    np.testing.assert_allclose([raw for _, raw in found], want[[i for i, _ in found]], atol=1e-5)

    # a folder that is broken by now: the old worker goes on
    (third,) = served.workers()
    (folder / "config.json").write_text("{", encoding="utf-8")
    served.process.send_signal(signal.SIGHUP)
    served.wait_for("the old one goes on")
    assert served.workers() == [third]
    with client(served.url) as http:
        post(http, 0)

    # SIGTERM: what is in flight is answered, and what was accepted and not yet sent
    # (https://github.com/Kludex/uvicorn/discussions/2757)
    host, port = served.url.removeprefix("http://").split(":")
    with (
        socket.create_connection((host, int(port))) as silent,
        ThreadPoolExecutor(4) as threads,
        client(served.url) as http,
    ):
        flying = [
            threads.submit(http.post, "/v1/rewards", json={"items": rows * 8}) for _ in range(4)
        ]
        deadline = time.monotonic() + 60
        while "companion_queue_texts 0.0" in http.get("/metrics").text:
            assert time.monotonic() < deadline
        served.process.terminate()
        time.sleep(0.3)
        body = json.dumps({"items": rows[:1]}).encode()
        head = f"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        silent.sendall(head.encode() + body)
        answer = silent.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert b"connection: close" in answer.lower()
        for each in flying:
            raw = [item["raw"] for item in each.result().json()["rewards"]]
            np.testing.assert_allclose(raw, np.tile(want, 8), atol=1e-5)
    assert served.process.wait(60) == 0, "".join(served.lines)
    with pytest.raises(OSError), socket.create_connection((host, int(port)), timeout=5):
        pass


def test_a_model_that_cannot_be_served_ends_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the command logs to what stderr is now; pytest closes that
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))
    (folder / "config.json").write_text("{", encoding="utf-8")
    sock = listen("127.0.0.1", 0)
    assert main(["serve", "--model", str(folder), "--fd", str(sock.detach())]) == 2
    assert "config.json" in capsys.readouterr().err


#: a worker without a model, and the parent that keeps it
_WORKER = """
import socket, sys
from fastapi import FastAPI
from companion.serving.listening import serve, tell_ready
def ready():
    tell_ready()
    print("ready:", flush=True)
serve(FastAPI(), socket.socket(fileno=int(sys.argv[-1])), ready)
"""
_PARENT = """
import sys
from companion.serving.listening import keep_serving, listen
keep_serving([sys.executable, "-c", sys.argv[1]], listen("127.0.0.1", 0))
"""


def test_a_worker_ends_when_its_parent_is_gone() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, _WORKER], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready:\n"
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
    (worker,) = map(int, children.split())
    parent.kill()
    try:
        parent.communicate(timeout=60)  # to the end of the output, which the worker holds too
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
