"""What all routes ask: rows or ids in, scores out, through the queue; it knows no protocol.

Chapter 6.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from companion.errors import CompanionError, DataError, ServiceError
from companion.formatting import REMARKS, Encoded, EncodedSteps
from companion.models import Identity, short_hash
from companion.scoring import Prepared, Scorer, Text, ids_of
from companion.serving.engine import Engine
from companion.serving.metrics import Metrics
from companion.serving.patience import Patience
from companion.serving.queue import Queue, Request
from companion.serving.request_log import RequestLog

#: Resolves when the client has hung up.
Gone = Callable[[], Awaitable[None]]
#: seconds after which one looks whether the client still waits
_WATCHED_AFTER: Final = 0.02
#: token ids that are looked through in the event loop; more would keep other requests waiting
_FEW: Final = 4096
#: What is scored; see :meth:`Service.score`.
Items = Sequence[Any] | Callable[[], Sequence[Any]]


class ClientGone(ServiceError):
    """Whoever asked does not wait any more."""


class DeadlineOver(ServiceError):
    """No answer within the time that the route's clients wait."""


class BadItem(DataError):
    """An item of a request that cannot be scored.

    Parameters
    ----------
    index : int
        Which.
    """

    def __init__(self, what: str, cure: str | None, index: int) -> None:
        super().__init__(what, cure)
        self.index = index


@dataclass
class Call:
    """One request on its way: whose it is, and what became of it.

    Attributes
    ----------
    id : str
        Of the request.
    protocol : str
    patience : Patience
    gone : callable
        See :data:`Gone`.
    tokens : int
        Of its texts, once they are known.
    """

    id: str
    protocol: str
    patience: Patience
    gone: Gone
    since: float = field(default_factory=time.monotonic)
    tokens: int = 0


class Service:
    """A scorer behind a queue.

    Parameters
    ----------
    scorer : Scorer
        Here or on a server.
    name : str
        Of the model, as clients see it.
    aliases : collection of str
        Other names that clients may call it by.
    identity : Identity
        Hashes of all that decides a score.
    queue_tokens : int
        Most tokens in the queue.
    engine_threads : int
        More than one only for a scorer whose model is elsewhere.
    log : RequestLog, optional
    exact : bool
        What the server says of itself.
    deviation : float or None
        How far a score was seen to move with its batch, when the server started.
    notes : sequence of str
    """

    def __init__(
        self,
        scorer: Scorer[Any],
        *,
        name: str,
        aliases: Collection[str] = (),
        identity: Identity,
        queue_tokens: int = 1 << 20,
        engine_threads: int = 1,
        log: RequestLog | None = None,
        exact: bool = False,
        deviation: float | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.scorer = scorer
        self.name = name
        self.names = {name, *aliases}
        self.identity = identity
        self.exact = exact
        self.deviation = deviation
        self.notes = list(notes)
        self.log = log
        self.metrics = Metrics()
        padded = not getattr(scorer, "packs", True)
        self.queue = Queue(queue_tokens, by_length=padded)
        self.engine = Engine(scorer, self.queue, threads=engine_threads, watch=self.metrics.batch)
        self.metrics.describe(self.queue, name, identity.version, scorer.readout.kind)
        # one thread: a tokenizer is no faster in several, and the engine's thread needs the other
        self._formatting = ThreadPoolExecutor(1, thread_name_prefix="formatting")

        #: what has more letters is too long whatever its tokens are: it is refused before it is
        #: tokenised, which would keep the others waiting (2 MB took 10 s)
        self._most_letters: int | None = None
        limit = scorer.formatter.max_length or scorer.max_positions
        if limit is not None:
            # (four times: a tokenizer may drop spaces and accents)
            self._most_letters = 4 * limit * max(map(len, scorer.tokenizer.get_vocab()))
        #: of what centred scores, z, percentiles and probabilities are made with; None without
        self.reference_version: str | None = None
        if scorer.manifest is not None and scorer.manifest.reference is not None:
            scale = [vars(scorer.manifest.reference), scorer.manifest.temperature]
            self.reference_version = short_hash(json.dumps(scale, sort_keys=True).encode())
        golden = None if scorer.manifest is None else scorer.manifest.golden_texts
        own = [] if golden is None else list(zip(golden.rows, golden.input_ids, strict=True))
        self._openings = {ids[0] for _, ids in own}
        self._ends = {ids[-1] for row, ids in own if row.get("terminated", True)}

    def unlike(self, ids: Sequence[int]) -> list[str]:
        """In what token ids that came from outside differ from texts of the model's formatter.

        By the golden texts: whether they begin as those do, and end as the finished ones.
        """
        said = []
        if len(self._openings) == 1 and ids[0] not in self._openings:
            said.append("unlike the manifest's template: the ids do not begin as its texts do")
        if self._ends and ids[-1] not in self._ends:
            said.append("unfinished, or unlike the manifest's template: the ids have no end of it")
        return said

    def template_warnings(self, item: Any, text: Text) -> list[str]:
        """What was noticed of the form of a text, that was sent as words or as ids."""
        encoded = text if isinstance(text, Encoded) else text.encoded
        if isinstance(item, (Encoded, EncodedSteps)):
            return self.unlike(encoded.input_ids)
        return [REMARKS[name].replace("texts", "a text", 1) for name in encoded.remarks]

    def start(self) -> None:
        """Begin to serve."""
        self.engine.start()

    def stop(self, timeout: float | None = None) -> None:
        """Serve what is inside, then end."""
        self.engine.stop(timeout)
        self._formatting.shutdown(wait=False, cancel_futures=True)
        if self.log is not None:
            self.log.close()

    async def score(
        self,
        call: Call,
        items: Items,
        *,
        name: str | Callable[[int], str] = "items",
    ) -> tuple[Prepared, Any]:
        """Scores of rows (or token ids) in order, and their texts.

        Parameters
        ----------
        call : Call
        items : sequence or callable
            As :meth:`Scorer.prepare` takes them, rows or token ids; or a function that makes them,
            in the thread of the tokenizer.
        name : str or callable
            How to call an item in an error: ``name[0]``, …

        Returns
        -------
        tuple of Prepared and Scores

        Raises
        ------
        BadItem
            For an item that cannot be scored, or is too long where that is an error.
        QueueFull, DeadlineOver, ClientGone
        """
        named = name if callable(name) else lambda i: f"{name}[{i}]"
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(call.patience.answer - (time.monotonic() - call.since))
        watching: list[asyncio.Task[None]] = []
        hung_up = over = False

        async def watch() -> None:
            nonlocal hung_up
            await call.gone()
            if not over:
                hung_up = True
                limit.reschedule(loop.time())

        # (not at once: most answers are there before a client can have changed its mind)
        later = loop.call_later(_WATCHED_AFTER, lambda: watching.append(loop.create_task(watch())))
        try:
            async with limit:
                return await self._score(call, items, named, loop)
        except TimeoutError as error:
            if hung_up:
                raise ClientGone("the client has hung up") from error
            raise DeadlineOver(
                f"no answer within {call.patience.answer:g} s", "send fewer texts, or later"
            ) from error
        finally:
            over = True
            later.cancel()
            for task in watching:
                task.cancel()

    async def _score(
        self,
        call: Call,
        items: Items,
        named: Callable[[int], str],
        loop: asyncio.AbstractEventLoop,
    ) -> tuple[Prepared, Any]:
        if _few_ids(items):
            prepared, rows = self._prepare(items, named)
        else:
            prepared, rows = await loop.run_in_executor(
                self._formatting, self._prepare, items, named
            )
        self.metrics.phase("format", time.monotonic() - call.since)
        values = await self._values(call, prepared.texts, loop)
        scores = self.scorer.finish(prepared, values)
        self.metrics.scored(scores)
        if self.log is not None:
            warnings = [
                self.template_warnings(item, text)
                for item, text in zip(rows, prepared.texts, strict=True)
            ]
            self.log.write(call.id, call.protocol, rows, prepared, scores, warnings)
        return prepared, scores

    async def _values(
        self, call: Call, texts: Sequence[Text], loop: asyncio.AbstractEventLoop
    ) -> list[Any]:
        if not texts:
            return []
        request = Request(texts, loop, loop.create_future())
        call.tokens = request.tokens
        try:
            await self.queue.put(request, call.patience.room)
            values = await request.done
        except BaseException:
            self.queue.drop(request)
            raise
        done = time.monotonic()
        queued, began = request.queued or done, request.began or done
        self.metrics.phase("room", queued - request.since)
        self.metrics.phase("queue", began - queued)
        self.metrics.phase("model", done - began)
        return values

    def _prepare(self, items: Items, named: Callable[[int], str]) -> tuple[Prepared, Sequence[Any]]:
        """In the formatting thread: items as token ids, the bad ones as an error."""
        if callable(items):
            items = items()
        names = [named(i) for i in range(len(items))]
        if self.scorer.formatter.overlong == "error":
            for index, item in enumerate(items):
                if self._most_letters is not None and _letters(item) > self._most_letters:
                    what = (
                        f"{names[index]}: {_letters(item):,} letters are more than the model takes"
                    )
                    raise BadItem(what, "shorten it, or send less of the prompt", index)
        prepared = self.scorer.prepare(items, names=names)
        for index, (row, reason) in enumerate(zip(prepared.found, prepared.reasons, strict=True)):
            if isinstance(row, CompanionError):
                raise BadItem(row.what, row.cure, index)
            if reason is not None:
                what = reason if names[index] in reason else f"{names[index]}: {reason}"
                raise BadItem(what, "shorten it, or send less of the prompt", index)
        try:
            self.scorer.check(prepared.texts)
        except CompanionError:
            for index, text in enumerate(prepared.texts):  # one by one only to find which it was
                try:
                    self.scorer.check([text])
                except CompanionError as error:
                    raise BadItem(f"{names[index]}: {error.what}", error.cure, index) from error
        return prepared, items


def _few_ids(items: Items) -> bool:
    """Whether there is nothing to tokenise, and little to look through."""
    if callable(items) or not all(isinstance(item, Text) for item in items):
        return False
    return sum(len(ids_of(item)) for item in items) <= _FEW


def _letters(item: Any) -> int:
    """Letters of all words in a row."""
    if isinstance(item, str):
        return len(item)
    if isinstance(item, Mapping):
        return sum(map(_letters, item.values()))
    return sum(map(_letters, item)) if isinstance(item, (list, tuple)) else 0


def cut_tokens(text: Text) -> int:
    """How many tokens of a text's prompt were cut off."""
    encoded = text if isinstance(text, Encoded) else text.encoded
    return encoded.cut_tokens
