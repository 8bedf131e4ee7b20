"""The thread that owns the model: it takes what waits, runs it, and hands the values back.

It knows no protocol. One thread for a model of this process; several where the model is behind
another server, which is asked for several batches at once. Chapter 6.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from companion.errors import CompanionError, ServiceError
from companion.scoring import LocalScorer, Scorer
from companion.serving.queue import Place, Queue, Request

logger = logging.getLogger(__name__)

#: Called after each batch: its texts, its tokens, the tokens computed, seconds.
Watcher = Callable[[int, int, int, float], None]


class Engine:
    """Runs the texts of a queue through a scorer.

    Parameters
    ----------
    scorer : Scorer
        Here or on a server.
    queue : Queue
    threads : int
        Batches at a time; more than one only for a model on another server.
    budget : int, optional
        Tokens of a batch; default: twice the scorer's own, so that a prompt shared by several
        requests is computed once.
    watch : callable, optional
        See :data:`Watcher`.
    """

    def __init__(
        self,
        scorer: Scorer[Any],
        queue: Queue,
        *,
        threads: int = 1,
        budget: int | None = None,
        watch: Watcher | None = None,
    ) -> None:
        self.scorer = scorer
        self.queue = queue
        self.watch = watch
        self.budget = budget or 2 * _budget_of(scorer)
        self._threads = [
            threading.Thread(target=self._run, name=f"engine-{i}", daemon=True)
            for i in range(threads)
        ]

    def start(self) -> None:
        """Begin to take texts."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Close the queue, and wait until what is inside has been served."""
        self.queue.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether texts are being served."""
        return all(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while True:
            places = self.queue.take(self.budget)
            if places is None:
                return
            places = [place for place in places if not place.request.gone]
            if not places:
                continue
            began = time.perf_counter()
            try:
                values = self.scorer.values([p.request.texts[p.index] for p in places])
            except Exception as error:
                self._one_by_one(places, error)
                continue
            seconds = time.perf_counter() - began
            _deliver(places, values)  # first: somebody waits for it
            if self.watch is not None:
                tokens = sum(place.length for place in places)
                self.watch(len(places), tokens, _computed(self.scorer, tokens), seconds)

    def _one_by_one(self, places: Sequence[Place], error: Exception) -> None:
        """After a batch that failed: each request alone, so that one does not harm the others."""
        requests = list({id(place.request): place.request for place in places}.values())
        if len(requests) == 1:
            self._fail(requests[0], error)
            return
        logger.warning(f"a batch of {len(requests)} requests failed, each is run alone: {error}")
        for request in requests:
            own = [place for place in places if place.request is request]
            if request.gone:
                continue
            try:
                values = self.scorer.values([request.texts[place.index] for place in own])
            except Exception as again:
                self._fail(request, again)
            else:
                _deliver(own, values)

    def _fail(self, request: Request, error: Exception) -> None:
        if not isinstance(error, CompanionError):
            logger.exception("a text could not be scored", exc_info=error)
            name = type(error).__name__
            error = ServiceError(f"the model failed: {name}", "the server's log says why")
        self.queue.drop(request)
        request.finish(error)


def _deliver(places: Sequence[Place], values: Sequence[Any]) -> None:
    for place, value in zip(places, values, strict=True):
        request = place.request
        request.values[place.index] = value
        request.left -= 1
        if not request.left:
            request.finish()


def _budget_of(scorer: Scorer[Any]) -> int:
    if isinstance(scorer, LocalScorer):
        return scorer.batch_tokens
    return 16_384  # another server batches by itself: what a request to it holds


def _computed(scorer: Scorer[Any], tokens: int) -> int:
    return scorer.tokens[1] if isinstance(scorer, LocalScorer) else tokens
