"""A reward server of few lines, until the companion has one: what tests over HTTP ask."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from companion.formatting import Encoded, EncodedSteps


class Service(ThreadingHTTPServer):
    """What vLLM's ``/classify`` and the companion's ``/score`` do, with faults on demand."""

    def __init__(self, scorer: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scorer = scorer
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.failures: list[int] = []
        self.change: Callable[[dict[str, Any]], Any] = lambda answer: answer

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/score" and "places" in body:
            pairs = zip(body["input_ids"], body["places"], strict=True)
            texts = [EncodedSteps(Encoded(ids, 0, True), places) for ids, places in pairs]
            return {"logits": [logits.tolist() for logits in self.scorer.logits(texts)]}
        scores = self.scorer.score_encoded(body["input_ids" if path == "/score" else "input"])
        if path == "/score":
            return {"scores": [x if math.isfinite(x) else None for x in scores.tolist()]}
        if body.get("use_activation", True):
            scores = 1 / (1 + np.exp(-scores))
        data = [{"index": i, "probs": [s], "num_classes": 1} for i, s in enumerate(scores.tolist())]
        return {"object": "list", "data": data[::-1]}  # the order is not promised


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.headers.append(dict(self.headers))
        status, payload = 200, b"sick"
        if self.server.failures:
            status = self.server.failures.pop(0)
        else:
            payload = json.dumps(self.server.change(self.server.answer(self.path, body))).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Any], Service]]:
    """``serve(scorer)``: a server of that scorer, until the test has ended."""
    services: list[Service] = []

    def start(scorer: Any) -> Service:
        services.append(Service(scorer))
        threading.Thread(target=services[-1].serve_forever, daemon=True).start()
        return services[-1]

    yield start
    for service in services:
        service.shutdown()
        service.server_close()
