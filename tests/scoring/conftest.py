"""A reward server of few lines that keeps the contract: what tests over HTTP ask."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from companion.formatting import Encoded, EncodedSteps


class Refused(Exception):
    """An error in the native form."""

    def __init__(self, code: int, message: str, cure: str, index: int | None = None) -> None:
        self.code = code
        self.body = {
            "error": {
                "code": code,
                "type": "stub",
                "message": message,
                "cure": cure,
                "index": index,
            },
            "id": "r",
        }


class Service(ThreadingHTTPServer):
    """What vLLM's ``/classify`` and the companion's own routes do, with faults on demand."""

    request_queue_size = 128

    def __init__(self, scorer: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scorer = scorer
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.version = "0123456789abcdef"
        self.max_length: int | None = None
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.failures: list[int] = []
        self.retry_after: str | None = None
        self.delay = 0.0
        self.left: list[bool] = []  # of each request that was let wait: whether the client left
        self.change: Callable[[dict[str, Any]], Any] = lambda answer: answer

    def models(self) -> dict[str, Any]:
        return {
            "object": "list",
            "data": [
                {
                    "id": "reward",
                    "model_version": self.version,
                    "hashes": {},
                    "kind": self.scorer.readout.kind,
                    "max_length": self.max_length,
                    "exact": True,
                    "deviation": None,
                }
            ],
        }

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/classify":
            assert body["add_special_tokens"] is False
            scores = self.scorer.score_encoded(body["input"])
            if body.get("use_activation", True):
                scores = 1 / (1 + np.exp(-scores))
            data = [
                {"index": i, "probs": [s], "num_classes": 1} for i, s in enumerate(scores.tolist())
            ]
            return {"object": "list", "data": data[::-1]}  # the order is not promised
        if body.get("model_version", self.version) != self.version:
            raise Refused(409, "another version is served", "ask for it, or for none")
        items = body["items"]
        head = {"id": "r", "model": "reward", "model_version": self.version, "hashes": {}}
        for index, item in enumerate(items):
            if self.max_length is not None and len(item["input_ids"]) > self.max_length:
                raise Refused(400, f"items[{index}] is too long", "shorten it", index)
        if path == "/v1/steps":
            texts = [EncodedSteps(Encoded(x["input_ids"], 0, True), x["places"]) for x in items]
            results = [
                {
                    "index": i,
                    "logits": logits.tolist(),
                    "places": text.ends,
                    "n_tokens": len(text.encoded.input_ids),
                    "warnings": [],
                    "reason": None,
                }
                for i, (text, logits) in enumerate(
                    zip(texts, self.scorer.logits(texts), strict=True)
                )
            ]
            return {**head, "results": results[::-1]}
        assert path == "/v1/rewards"
        assert body["return"] == ["raw"]
        scores = self.scorer.score_encoded([item["input_ids"] for item in items])
        rewards = [
            {
                "index": i,
                "raw": score if math.isfinite(score) else None,
                "n_tokens": len(items[i]["input_ids"]),
                "cut_tokens": 0,
                "warnings": [],
                "reason": None if math.isfinite(score) else "the score is not finite",
            }
            for i, score in enumerate(scores.tolist())
        ]
        return {**head, "rewards": rewards[::-1]}


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._send(200, json.dumps(self.server.models()).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.headers.append({name.title(): value for name, value in self.headers.items()})
        if self.server.delay:
            self.server.left.append(self._wait(self.server.delay))
        status, payload = 200, b"sick"
        if self.server.failures:
            status = self.server.failures.pop(0)
        else:
            try:
                answer = self.server.change(self.server.answer(self.path, body))
            except Refused as error:
                status, answer = error.code, error.body
            payload = json.dumps(answer).encode()
        self._send(status, payload)

    def _wait(self, seconds: float) -> bool:
        """Whether the client closed the connection meanwhile."""
        end = time.monotonic() + seconds
        self.connection.setblocking(False)
        try:
            while time.monotonic() < end:
                try:
                    if self.connection.recv(1) == b"":
                        return True
                except BlockingIOError:
                    time.sleep(0.01)
                except OSError:
                    return True
        finally:
            self.connection.setblocking(True)
        return False

    def _send(self, status: int, payload: bytes) -> None:
        try:
            self.send_response(status)
            if status != 200 and self.server.retry_after is not None:
                self.send_header("Retry-After", self.server.retry_after)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)
        except OSError:  # the client has left
            pass

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Any], Service]]:
    """``serve(scorer)``: a server of that scorer, until the test has ended."""
    services: list[Service] = []

    def start(scorer: Any) -> Service:
        services.append(Service(scorer))
        threading.Thread(target=services[-1].serve_forever, args=(0.02,), daemon=True).start()
        return services[-1]

    yield start
    for service in services:
        service.shutdown()
        service.server_close()
