"""What Prometheus reads at ``/metrics``; labels are bounded, so that no client can grow it.

Chapter 6.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from companion.serving.queue import Queue

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_SCORES = (-10, -5, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 5, 10)
#: what may wait to be counted
_PENDING: Final = 1000


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._pending: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        own: Any = {"registry": self.registry}
        self._requests = Counter(
            "companion_requests", "Requests by route and status", ["route", "status"], **own
        )
        self._seconds = Histogram(
            "companion_request_seconds", "Whole requests", ["route"], buckets=_SECONDS, **own
        )
        self._phases = Histogram(
            "companion_phase_seconds",
            "Parts of a request: format, room (before the queue), queue, model",
            ["phase"],
            buckets=_SECONDS,
            **own,
        )
        self._refused = Counter("companion_refusals", "Requests refused", ["reason"], **own)
        self._scores = Histogram(
            "companion_score",
            "Scores, z where there is a reference, else raw",
            buckets=_SCORES,
            **own,
        )
        self._not_finite = Counter("companion_scores_not_finite", "Scores that are none", **own)
        self._cut = Counter("companion_tokens_cut", "Tokens cut from prompts", **own)
        self._batch_tokens = Histogram(
            "companion_batch_tokens", "Tokens of a batch", buckets=_TOKENS, **own
        )
        self._batch_seconds = Histogram(
            "companion_batch_seconds", "Of the model, a batch", buckets=_SECONDS, **own
        )
        self._texts = Counter("companion_texts", "Texts scored", **own)
        self._tokens = Counter("companion_tokens", "Tokens of all texts scored", **own)
        self._computed = Counter(
            "companion_tokens_computed",
            "Tokens that went through the model: more than companion_tokens where batches are "
            "padded, fewer where prompts are shared",
            **own,
        )
        self._padding = Gauge(
            "companion_padding_share", "Of the last batch: computed tokens that are padding", **own
        )
        self._model = Gauge(
            "companion_model_info", "The model that is served", ["name", "version", "kind"], **own
        )

    def describe(self, queue: Queue, name: str, version: str, kind: str) -> None:
        """Read a queue, and name the model."""
        gauges: Any = {
            "companion_queue_tokens": ("Tokens in the queue", lambda: queue.tokens),
            "companion_queue_texts": ("Texts in the queue", lambda: len(queue)),
            "companion_waiting_requests": (
                "Requests that wait for room in the queue",
                lambda: queue.waiting,
            ),
        }
        for gauge, (text, read) in gauges.items():
            Gauge(gauge, text, registry=self.registry).set_function(read)
        self._model.labels(name, version, kind).set(1)

    def _later(self, count: Callable[..., Any], *values: Any) -> None:
        """Count when the metrics are read: an answer does not wait for them."""
        self._pending.append((count, values))
        if len(self._pending) > _PENDING:
            self._count()

    def _count(self) -> None:
        while self._pending:
            try:
                count, values = self._pending.popleft()
            except IndexError:  # another thread has counted it
                return
            count(*values)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request has its answer."""
        self._later(self._count_request, route, status, seconds)

    def _count_request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def phase(self, name: str, seconds: float) -> None:
        """A part of a request is over."""
        self._later(self._count_phase, name, seconds)

    def _count_phase(self, name: str, seconds: float) -> None:
        self._phases.labels(name).observe(seconds)

    def refused(self, reason: str) -> None:
        """A request gets no scores."""
        self._refused.labels(reason).inc()

    def cut(self, tokens: int) -> None:
        """Tokens that were cut off."""
        self._cut.inc(tokens)

    def scored(self, scores: Any) -> None:
        """A request has its scores."""
        self._later(self._count_scores, scores.raw if scores.z is None else scores.z)

    def _count_scores(self, values: np.ndarray) -> None:
        good = values[np.isfinite(values)]
        self._not_finite.inc(len(values) - len(good))
        for value in good.tolist():
            self._scores.observe(value)

    def batch(self, texts: int, tokens: int, computed: int, seconds: float) -> None:
        """The model has run a batch."""
        self._later(self._count_batch, texts, tokens, computed, seconds)

    def _count_batch(self, texts: int, tokens: int, computed: int, seconds: float) -> None:
        self._texts.inc(texts)
        self._tokens.inc(tokens)
        self._computed.inc(computed)
        self._batch_tokens.observe(tokens)
        self._batch_seconds.observe(seconds)
        self._padding.set(max(0.0, 1 - tokens / max(computed, 1)))

    def text(self) -> bytes:
        """The exposition format."""
        self._count()
        return generate_latest(self.registry)
