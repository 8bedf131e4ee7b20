"""One or several servers of the same model: who is asked, who is left out for a while. Chapter 5.

``httpx2`` sends the requests. What it lacks is here: a request that failed is sent again, after a
pause or to another server (its transport's retries are for connections alone, and know one
address). A score changes nothing on a server, so a request may be sent twice.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import random
import ssl
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx2

from companion.errors import DataError, ServiceError

logger = logging.getLogger(__name__)

#: Answers after which a request is sent again: too many requests, and what a restart looks like.
RETRIED: Final = (429, 500, 502, 503, 504)
#: Longest pause in seconds, if the server names none.
_LONGEST_PAUSE: Final = 60.0
#: Seconds to wait for a connection; a machine that is away says nothing at all.
_CONNECT: Final = 10.0
#: Held by any thread that changes counts or addresses. (A lock of one's own does not pickle.)
LOCK: Final = threading.Lock()
#: Many processes with one request each must not all ask the first URL. (It touches no seed.)
_DICE: Final = random.SystemRandom()


class Unreachable(ServiceError):
    """No server has answered."""


class Refused(ServiceError):
    """A server has answered, and not with what was asked for.

    Parameters
    ----------
    status : int
        Of its answer.
    """

    def __init__(self, what: str, cure: str | None, status: int) -> None:
        super().__init__(what, cure)
        self.status = status


@dataclass
class _Address:
    """A server's URL, and since when it does not answer."""

    url: str
    failures: int = 0
    back_at: float = 0.0  # by time.monotonic
    in_flight: int = 0


class Servers:
    """The servers of one scorer; see :class:`companion.scoring.RemoteScorer` for what they mean.

    Attributes
    ----------
    counts : Counter
        ``retries``, and with several servers ``left_out``: how often one of them was.
    """

    def __init__(
        self,
        urls: Sequence[str],
        counts: Counter[str],
        *,
        timeout: float,
        retries: int,
        backoff: float,
        api_key: str | None,
    ) -> None:
        if not urls:
            raise DataError("no URL of a server", "give http://host:port")
        for url in urls:
            try:
                good = is_url(url) and httpx2.URL(url).host
            except httpx2.InvalidURL:
                good = False
            if not good:
                raise DataError(f"{url!r} is no URL", "give http://host:port or https://…")
        self.urls = list(dict.fromkeys(url.rstrip("/") for url in urls))
        self.counts = counts
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.api_key = api_key
        #: what the ids of all requests begin with, so that a server's log tells who asked
        self.tag: str | None = None
        self._addresses = [_Address(url) for url in self.urls]

    def client(self) -> httpx2.AsyncClient:
        """A client for one call: its connections belong to the event loop that opened them."""
        return httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else None,
            timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, _CONNECT), pool=None),
            limits=httpx2.Limits(max_connections=None),
            verify=_certificates(),
            follow_redirects=True,
        )

    async def send(
        self,
        client: httpx2.AsyncClient,
        path: str,
        body: Mapping[str, Any] | None = None,
        only: str | None = None,
    ) -> tuple[str, httpx2.Response]:
        """POST `body`, or GET without one: the URL that answered and its answer, of any status.

        With `only`, one URL is asked, once.

        Raises
        ------
        Unreachable
            If no URL has answered after all tries.
        """
        method = "GET" if body is None else "POST"
        tries: Counter[str] = Counter()
        pauses: dict[str, float] = {}
        problems: dict[str, str] = {}
        while (address := self._choose(tries, pauses, only)) is not None:
            url = address.url
            back_at = max(address.back_at, pauses.get(url, 0.0))
            if only is None and (pause := back_at - time.monotonic()) > 0:
                await asyncio.sleep(min(pause, 1.0))  # another may be back before
                continue
            if tries:
                self.count("retries")
            self._move(address, 1)
            asked_to_wait = None
            try:
                named = {"X-Request-Id": f"{self.tag}-{uuid.uuid4().hex}"} if self.tag else None
                response = await client.request(method, url + path, json=body, headers=named)
            except httpx2.TransportError as error:
                problems[url] = f"no answer ({str(error) or type(error).__name__})"
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise ServiceError(f"{url}{path}: {error!r}", "check the URL") from error
            else:
                if response.status_code not in RETRIED:
                    self._answered(address)
                    return url, response
                problems[url] = refusal(response)[0]
                asked_to_wait = _seconds(response.headers.get("Retry-After"))
            finally:
                self._move(address, -1)
            tries[url] += 1
            again = only is None and tries[url] <= self.retries
            pauses[url] = self._failed(address, tries[url], asked_to_wait, problems[url], again)
        n = max(tries.values(), default=0)
        said = "; ".join(f"{url}{path}: {problem}" for url, problem in problems.items())
        raise Unreachable(
            f"{said}, after {n} {'try' if n == 1 else 'tries'}"
            + (" each" if len(problems) > 1 else ""),
            "check that the server runs and can be reached from here; its log says more",
        )

    def count(self, name: str, n: int = 1) -> None:
        """Raise a count."""
        with LOCK:
            self.counts[name] += n

    # ------------------------------------------------------------------ inside

    def _choose(
        self, tries: Counter[str], pauses: Mapping[str, float], only: str | None
    ) -> _Address | None:
        """The URL to ask next: one that answers, the least busy; None if all are gone."""
        now = time.monotonic()
        allowed = 0 if only is not None else self.retries

        def rank(address: _Address) -> tuple[float, int, float]:
            back_at = max(address.back_at, pauses.get(address.url, 0.0))
            return (back_at if back_at > now else 0.0, address.in_flight, _DICE.random())

        with LOCK:
            left = [
                address
                for address in self._addresses
                if tries[address.url] <= allowed and only in (None, address.url)
            ]
            return min(left, key=rank) if left else None

    def _failed(
        self, address: _Address, tries: int, asked: float | None, problem: str, again: bool
    ) -> float:
        """Leave an address out for a while; until when, for the request that failed."""
        now = time.monotonic()
        with LOCK:
            new = now >= address.back_at  # what failed beside it says nothing further
            address.failures += new
            times = max(address.failures, tries)
            # (a bound on the power: 2**1024 is no float)
            pause = min(_LONGEST_PAUSE, self.backoff * 2 ** min(times - 1, 30))
            # (nor longer than an answer is waited for, whatever the server asks)
            pause = pause if asked is None else min(asked, self.timeout)
            back_at = now + pause
            address.back_at = max(address.back_at, back_at)
            several = len(self._addresses) > 1
            if new and several:
                self.counts["left_out"] += 1
        if new and several:
            logger.warning(f"{address.url}: {problem}; left out for {pause:.3g} s")
        elif new and again:
            logger.warning(f"{address.url}: {problem}; asked again in {pause:.3g} s")
        return back_at

    def _answered(self, address: _Address) -> None:
        with LOCK:
            back, address.failures, address.back_at = address.failures, 0, 0.0
        if back:
            logger.warning(f"{address.url}: answers again")

    def _move(self, address: _Address, n: int) -> None:
        with LOCK:
            address.in_flight += n

    def __getstate__(self) -> dict[str, Any]:
        """What answers here and now says nothing about there and then."""
        return {**self.__dict__, "_addresses": [_Address(url) for url in self.urls]}


def is_url(source: str) -> bool:
    """Whether this names a server, not a folder or a hub id."""
    return source.startswith(("http://", "https://"))


def refusal(response: httpx2.Response) -> tuple[str, str]:
    """What an answer that is no 200 says, and the cure: the companion's form, or any other."""
    status = response.status_code
    cure = "check the server's key (api_key)" if status in (401, 403) else "its log says why"
    try:
        error = response.json()["error"]
        what, cure = str(error["message"]), str(error.get("cure") or cure)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        what = response.text[:500]
    return f"answered {status}: {what}", cure


def _seconds(retry_after: str | None) -> float | None:
    """A ``Retry-After``, in seconds from now; it may be a date."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(retry_after)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):  # no date, or one without a zone
        return None


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Reading the system's certificates takes longer than a small request."""
    return httpx2.create_ssl_context()
