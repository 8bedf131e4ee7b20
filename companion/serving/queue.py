"""The queue between requests and the model; it knows no protocol.

A request enters whole or waits until there is room for it. What the engine takes is chosen when the
device is free, never by a timer: the texts that wait are the batch. Chapter 6.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from companion.errors import ServiceError
from companion.scoring import Text, ids_of

#: how many times the queue's tokens may wait outside of it, before a request is refused at once
WAITING: Final = 16


class QueueFull(ServiceError):
    """No room within a request's patience."""


class QueueClosed(ServiceError):
    """The server is going down."""


@dataclass(eq=False)
class Request:
    """The texts of one call, and what was found for them.

    Attributes
    ----------
    texts : sequence
        Token ids, with the places that are read of a token-level model.
    tokens : int
        Of all texts.
    values : list
        Of each text, in order; None until it was computed.
    left : int
        Texts that have no value yet.
    since : float
        Monotonic time of its arrival, in seconds.
    queued, began : float or None
        When it entered the queue, and when the first of its texts was taken.
    """

    texts: Sequence[Text]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[list[Any]]
    since: float = field(default_factory=time.monotonic)
    tokens: int = 0
    left: int = 0
    values: list[Any] = field(default_factory=list)
    queued: float | None = None
    began: float | None = None
    gone: bool = False

    def __post_init__(self) -> None:
        self.tokens = sum(len(ids_of(text)) for text in self.texts)
        self.left = len(self.texts)
        self.values = [None] * self.left

    def finish(self, error: Exception | None = None) -> None:
        """Hand the values, or an error, to the waiting coroutine; from any thread."""

        def tell() -> None:
            if self.done.done():
                return
            if error is None:
                self.done.set_result(self.values)
            else:
                self.done.set_exception(error)

        self.loop.call_soon_threadsafe(tell)


@dataclass(eq=False)
class Place:
    """One text in the queue: of which request, and which of its texts."""

    request: Request
    index: int
    length: int


class Queue:
    """Texts that wait for the model.

    Parameters
    ----------
    tokens : int
        Most tokens that it holds; a request with more enters alone.
    by_length : bool
        Hand out texts of similar length (for a model whose batches are padded), the shortest first.
    age : float
        Seconds after which a text is taken in order of arrival, however long it is.
    """

    def __init__(self, tokens: int, *, by_length: bool = False, age: float = 2.0) -> None:
        self.capacity = tokens
        self.by_length = by_length
        self.age = age
        self._places: deque[Place] = deque()
        self._waiting: deque[tuple[Request, asyncio.Future[None]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.tokens = 0
        self.waiting_tokens = 0

    def __len__(self) -> int:
        return len(self._places)

    @property
    def waiting(self) -> int:
        """Requests that wait outside for room."""
        return len(self._waiting)

    # ------------------------------------------------------------------ from the event loop

    async def put(self, request: Request, patience: float) -> None:
        """Let a request in as a whole, in order of arrival; wait for room if there is none.

        Raises
        ------
        QueueFull
            If there was none for `patience` seconds, or too many wait already.
        QueueClosed
        """
        room: asyncio.Future[None] | None = None
        with self._changed:
            if self._closed:
                raise QueueClosed("the server is going down", "send it again")
            if not self._waiting and self._fits(request):
                self._enter(request)
            elif self.waiting_tokens + request.tokens > WAITING * self.capacity:
                raise QueueFull(
                    f"{self.waiting_tokens:,} tokens wait for room in the queue", "send it later"
                )
            else:
                room = request.loop.create_future()
                self._waiting.append((request, room))
                self.waiting_tokens += request.tokens
        if room is None:
            return
        try:
            async with asyncio.timeout(patience):
                await room
        except BaseException as error:
            with self._changed:
                if (request, room) in self._waiting:
                    self._waiting.remove((request, room))
                    self.waiting_tokens -= request.tokens
                    self._let_in()
            self.drop(request)
            if isinstance(error, TimeoutError):
                what = f"no room in the queue for {patience:g} s"
                raise QueueFull(what, "send it later") from error
            raise

    def drop(self, request: Request) -> None:
        """Forget the texts of a request that nobody waits for any more."""
        with self._changed:
            request.gone = True
            if request.queued is None or not request.left:
                return
            kept = [place for place in self._places if place.request is not request]
            self.tokens -= sum(p.length for p in self._places if p.request is request)
            self._places = deque(kept)
            self._let_in()

    def close(self) -> None:
        """Take no more requests; those inside are served, and those that wait get in."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # ------------------------------------------------------------------ from the engine's thread

    def take(self, budget: int) -> list[Place] | None:
        """Texts for the model, at least one; waits for them. None when closed and empty.

        Parameters
        ----------
        budget : int
            Tokens; a longer text comes alone.
        """
        with self._changed:
            while not self._places:
                if self._closed and not self._waiting:
                    return None
                self._changed.wait(timeout=0.5)
            places: Sequence[Place] = self._places
            now = time.monotonic()
            if self.by_length and now - places[0].request.since < self.age:
                places = sorted(places, key=lambda place: place.length)
            taken: list[Place] = []
            tokens = 0
            for place in places:
                if taken and tokens + place.length > budget:
                    break
                taken.append(place)
                tokens += place.length
            if places is self._places:
                for _ in taken:
                    self._places.popleft()
            else:
                chosen = set(map(id, taken))
                self._places = deque(p for p in self._places if id(p) not in chosen)
            for place in taken:
                place.request.began = place.request.began or now
            self.tokens -= tokens
            self._let_in()
            return taken

    # ------------------------------------------------------------------ inside, with the lock

    def _fits(self, request: Request) -> bool:
        return not self._places or self.tokens + request.tokens <= self.capacity

    def _enter(self, request: Request) -> None:
        request.queued = time.monotonic()
        for index, text in enumerate(request.texts):
            self._places.append(Place(request, index, len(ids_of(text))))
        self.tokens += request.tokens
        self._changed.notify()

    def _let_in(self) -> None:
        """Those that wait, as far as there is room, the first first."""
        while self._waiting and self._fits(self._waiting[0][0]):
            request, room = self._waiting.popleft()
            self.waiting_tokens -= request.tokens
            self._enter(request)
            request.loop.call_soon_threadsafe(_release, room)


def _release(room: asyncio.Future[None]) -> None:
    if not room.done():
        room.set_result(None)
