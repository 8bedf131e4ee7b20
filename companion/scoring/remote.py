"""A scorer whose model runs on a server: the same rows in, the same scores out.

The token ids are made here, by the formatter that was saved with the model, and sent as ids: a
server that tokenises text again may add a second BOS or leave out the EOS, and says nothing.
Requests that fail are repeated and counted; one that fails for good is an error, never a missing
reward (OpenRLHF's client gives up after five tries and goes on with None). Chapter 5.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, ClassVar, Final, Literal

import httpx2
import numpy as np
import torch

from companion.errors import DataError, ServiceError
from companion.formatting import Overlong, RewardFormatter, TextMode
from companion.models.checkpoint import is_adapter, load_config, resolve
from companion.models.loading import load_formatter
from companion.models.manifest import MANIFEST_FILE, RewardManifest
from companion.models.readout import ReadAs, Readout, ScalarReadout, readout_from_dict
from companion.models.reward_model import RewardModel
from companion.scoring.reading import NoValue
from companion.scoring.results import Scores
from companion.scoring.scorer import Progress, Scorer, positions_of
from companion.scoring.servers import LOCK, Refused, Servers, Unreachable, refusal
from companion.scoring.waiting import wait_for

logger = logging.getLogger(__name__)

Protocol = Literal["classify", "companion"]
PROTOCOLS: Final[tuple[Protocol, ...]] = ("classify", "companion")

#: The environment variable with the server's key, if it wants one.
KEY_VARIABLE: Final = "COMPANION_REWARD_API_KEY"
_NEW_SCORER: Final = (
    "scores of two models are not mixed: make a new scorer (a file that was begun: --overwrite), "
    "or serve the former model again"
)


class RemoteScorer(Scorer[Scores]):
    """Scores from one or several servers that hold the reward model.

    It may be called from several threads and many tasks, and pickled.

    Parameters
    ----------
    url : str or sequence of str
        Where the server listens, without the route: ``http://host:8000``. Of several, which serve
        the same model, each gets a share of a call's requests.
    formatter : RewardFormatter
        The one that was saved with the model that the server runs; see :meth:`from_pretrained`.
    manifest : RewardManifest, optional
        Of that model: its reference set, without which there are raw scores only, and its read-out.
    max_positions : int, optional
        Longest text that the model has positions for; a longer one is not sent.
    notes : sequence of str
        What was assumed while loading.
    readout : ScalarReadout or TokenReadout, optional
        Default: the manifest's.
    protocol : {"classify", "companion"}
        ``classify``: vLLM's route. Gets ``{"input": [[ids]], "use_activation": false}``, without
        which vLLM may apply a sigmoid, and gives the logit in ``data[i].probs[0]``.
        ``companion``: the routes of ``companion serve``. ``POST /v1/rewards`` gets ``{"items":
        [{"input_ids": [ids]}], "return": ["raw"]}`` and gives ``rewards[i].raw``, or null and a
        ``reason``. For an outcome or process model, which ``classify`` cannot carry, ``POST
        /v1/steps`` gets ``{"items": [{"input_ids", "places": [indices of tokens]}]}`` and gives
        ``results[i].logits``, one list a place of one number a label.
    model : str, optional
        Name of the model on the server, where it serves several.
    model_version : str, optional
        With ``companion``: take scores of this version of the model only. Default: of the version
        that answers first. It is sent along with every request.
    batch_size : int
        Most texts of a request.
    in_flight : int
        Requests of a call that are on their way at one time, for each URL.
    timeout : float
        Seconds to wait for an answer.
    retries : int
        How often a request is sent again to each URL after a connection error or one of the answers
        in :data:`companion.scoring.servers.RETRIED`, with pauses of `backoff` × 1, 2, 4, … seconds
        (at most 60), or what the server's ``Retry-After`` says. With several URLs it goes to
        another meanwhile.
    backoff : float
        Seconds of the first pause.
    api_key : str, optional
        Sent as a bearer token; default: the environment's ``COMPANION_REWARD_API_KEY``.

    Attributes
    ----------
    counts : Counter
        ``requests``, ``retries`` and ``texts`` so far; with several URLs ``left_out``, how often
        one of them was, until it answered again; ``warnings``, texts that the server warned of.
    model_version : str or None
        The version that answers must have; None with ``classify``, and before the first answer.

    Notes
    -----
    :meth:`score` and the like raise :class:`companion.errors.ServiceError` if the server does not
    answer, refuses, answers something else than its protocol says, or serves another version than
    before, whatever ``on_error`` is. A text to which the server gives a reason in place of a score
    has NaN and that reason, by the rules of ``on_error``.
    """

    _cure_of_nan: ClassVar[str] = (
        "serve the model in float32; if it stays, its training has diverged"
    )

    def __init__(
        self,
        url: str | Sequence[str],
        formatter: RewardFormatter,
        *,
        manifest: RewardManifest | None = None,
        max_positions: int | None = None,
        notes: Sequence[str] = (),
        readout: Readout | None = None,
        protocol: Protocol = "classify",
        model: str | None = None,
        model_version: str | None = None,
        batch_size: int = 128,
        in_flight: int = 2,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 0.5,
        api_key: str | None = None,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise DataError(f"protocol is {protocol!r}", f"use one of: {', '.join(PROTOCOLS)}")
        if batch_size < 1 or retries < 0 or in_flight < 1:
            raise DataError(
                f"batch_size is {batch_size}, retries is {retries} and in_flight is {in_flight}",
                "use at least 1, 0 and 1",
            )
        if model_version is not None and protocol != "companion":
            raise DataError(
                f"the protocol {protocol!r} says no model_version, so none can be asked for",
                "use protocol='companion'",
            )
        if readout is None:
            readout = ScalarReadout()
            if manifest is not None:
                readout = readout_from_dict(manifest.readout, MANIFEST_FILE)
        about = RewardModel(None, formatter.tokenizer, formatter, manifest, list(notes), readout)
        super().__init__(about, readout, max_positions)
        if readout.kind != "scalar" and protocol != "companion":
            raise DataError(
                f"the protocol {protocol!r} carries one value a text, and the model is of the kind "
                f"{readout.kind}",
                "use protocol='companion', on a server that knows it",
            )
        self.counts: Counter[str] = Counter()
        self._servers = Servers(
            [url] if isinstance(url, str) else list(url),
            self.counts,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            api_key=api_key if api_key is not None else os.environ.get(KEY_VARIABLE),
        )
        self.protocol: Protocol = protocol
        self.model = model
        self.model_version = model_version
        self.batch_size = batch_size
        self.in_flight = in_flight
        self._said_by = "the parameter model_version"
        self._max_length: int | None = None
        self._described = False

    def tag_requests(self, tag: str) -> None:
        """Let the ids of all requests begin with `tag`, which the companion's server logs."""
        self._servers.tag = tag

    @property
    def url(self) -> str:
        """The URLs, separated by commas."""
        return ", ".join(self._servers.urls)

    @property
    def notes(self) -> list[str]:
        """What was repaired or assumed while loading, and what the servers cost so far."""
        texts = {
            "retries": "requests were sent again",
            "left_out": "times a server did not answer, and was left out for a while",
            "warnings": "texts came back with a warning of the server's (the log has the first)",
        }
        counted = [f"{n} {texts[name]}" for name, n in self.counts.items() if name in texts and n]
        return [*super().notes, *counted]

    @classmethod
    def from_pretrained(
        cls,
        url: str | Sequence[str],
        path_or_id: str | os.PathLike[str],
        *,
        max_length: int | None = None,
        overlong: Overlong | None = None,
        text: TextMode | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        read_as: ReadAs | None = None,
        **settings: Any,
    ) -> RemoteScorer:
        """A scorer for the server at `url`, with the formatter of the model that it runs.

        `path_or_id` is that model's folder or hub id; no weights are loaded. `max_length`,
        `overlong` and `text` stand in place of what the manifest says, and `read_as` says how it is
        read, as in :meth:`RewardScorer.from_pretrained`. `settings` are those of the class.

        Raises
        ------
        ModelError
            If there is no tokenizer, or it is not the one of the manifest.
        """
        notes: list[str] = []
        hub: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
        formatter, manifest, readout = load_formatter(
            path_or_id, notes=notes, read_as=read_as, **hub
        )
        if (max_length, overlong, text) != (None, None, None):
            formatter = formatter.changed(max_length=max_length, overlong=overlong, text=text)
        name = resolve(path_or_id)
        positions = None if is_adapter(name) else positions_of(load_config(name, **hub))
        return cls(
            url,
            formatter,
            manifest=manifest,
            max_positions=positions,
            notes=notes,
            readout=readout,
            **settings,
        )

    def fingerprint(self) -> str:
        """Of the manifest of the model that the server is said to run; without one, of the URL.

        With the protocol ``companion``, also of the version that the server says it runs; it is
        asked. A run over a file then goes on with the same version only.
        """
        known = self.url if self.manifest is None else self.manifest.to_json()
        if self.protocol == "companion":
            wait_for(self._describe_now())
            known += f" {self.model_version}"
        return hashlib.sha256(f"{self.model} {known}".encode()).hexdigest()

    # ------------------------------------------------------------------ inside

    def _limit(self) -> tuple[int | None, str]:
        """With the companion's protocol, also what the server takes: it is asked, once.

        A server refuses a whole request for one text that is too long.
        """
        limit, words = super()._limit()
        if self.protocol == "companion" and not self._described:
            wait_for(self._describe_now())
        if self._max_length is not None and (limit is None or self._max_length < limit):
            return self._max_length, "the server takes"
        return limit, words

    def _threads(self) -> Executor:
        return _threads_of(os.getpid())

    def _values(
        self,
        ids: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]] | None,
        progress: Progress | None,
    ) -> Sequence[Any]:
        values = wait_for(self._ask_all(ids, places, progress)) if len(ids) else []
        if places is None:
            self._warn_of_probabilities(np.array(values, dtype=float))
        return values

    async def _ask_all(
        self,
        ids: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]] | None,
        progress: Progress | None,
    ) -> list[Any]:
        """What the servers say of each text, asked for in parts."""
        async with self._servers.client() as client:
            await self._describe(client)
            values: list[Any] = [None] * len(ids)
            gate = asyncio.Semaphore(self.in_flight * len(self._servers.urls))

            async def ask(part: range) -> None:
                async with gate:
                    own_places = None if places is None else [list(places[i]) for i in part]
                    found = await self._ask(client, [list(ids[i]) for i in part], own_places)
                for i, value in zip(part, found, strict=True):
                    values[i] = value
                if progress is not None:
                    progress(len(part))

            texts, size = range(len(ids)), self.batch_size
            tasks = [
                asyncio.create_task(ask(texts[begin : begin + size])) for begin in texts[::size]
            ]
            try:
                await asyncio.gather(*tasks)
            finally:  # after an error, what has not come yet is not waited for
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return values

    async def _ask(
        self, client: httpx2.AsyncClient, ids: list[list[int]], places: list[list[int]] | None
    ) -> list[Any]:
        """What a server says of the texts of one request."""
        path, body = self._request(ids, places)
        self._servers.count("requests")
        url, response = await self._servers.send(client, path, body)
        answer = await self._json(client, url + path, url, response)
        try:
            if self.protocol == "classify":
                own = self._read_classified(answer)
            else:
                self._check(answer, url)
                own = self._read(answer, ids, places)
            if len(own) != len(ids):
                raise ValueError(f"{len(own)} scores for {len(ids)} texts")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            needs = "runs a model with one label" if places is None else "knows token values"
            raise ServiceError(
                f"{url}: the answer does not fit the protocol {self.protocol!r}: {error!r}",
                f"check the protocol, and that the server {needs}",
            ) from error
        self._servers.count("texts", len(own))
        return own

    def _request(
        self, ids: list[list[int]], places: list[list[int]] | None
    ) -> tuple[str, dict[str, Any]]:
        """Path and body."""
        if self.protocol == "classify":
            body: dict[str, Any] = {"input": ids, "add_special_tokens": False}
            body["use_activation"] = False
            return "/classify", body if self.model is None else {**body, "model": self.model}
        pin = {} if self.model_version is None else {"model_version": self.model_version}
        if places is None:
            return "/v1/rewards", {
                "items": [{"input_ids": x} for x in ids],
                "return": ["raw"],
                **pin,
            }
        items = [{"input_ids": x, "places": own} for x, own in zip(ids, places, strict=True)]
        return "/v1/steps", {"items": items, **pin}

    def _read(self, answer: Any, ids: list[list[int]], places: list[list[int]] | None) -> list[Any]:
        """What an answer of the companion's says of each text, in the order of the request."""
        items = _in_order(answer["rewards" if places is None else "results"], len(ids))
        found: list[Any] = []
        for i, item in enumerate(items):
            reason, value = item.get("reason"), item["raw" if places is None else "logits"]
            if item.get("warnings"):
                if not self.counts["warnings"]:
                    logger.warning(f"{self.url}: {'; '.join(map(str, item['warnings']))}")
                self._servers.count("warnings")
            if reason is not None:
                if places is None and value is not None:
                    raise ValueError(f"text {i} has both a score and a reason for none: {reason!r}")
                found.append(NoValue(str(reason)))
                continue
            n_tokens = item.get("n_tokens", len(ids[i]))
            if n_tokens != len(ids[i]) or item.get("cut_tokens"):
                raise ValueError(f"text {i} has {len(ids[i])} tokens, and {n_tokens} were scored")
            if places is None:
                found.append(_number(value))
                continue
            logits = torch.tensor([list(map(_number, place)) for place in value])
            logits = logits.to(torch.float32).reshape(len(value), -1)
            if logits.shape != (len(places[i]), self.readout.labels):
                raise ValueError(f"logits {list(logits.shape)} for {len(places[i])} places")
            if item.get("places", places[i]) != places[i]:
                raise ValueError(f"text {i} was read at other places than asked")
            found.append(logits)
        return found

    def _read_classified(self, answer: Any) -> list[Any]:
        """What an answer of ``/classify`` says of each text, in the order of the request."""
        items = _in_order(answer["data"], len(answer["data"]))
        if any(len(item["probs"]) != 1 for item in items):
            raise ValueError("several values a text: the model is no scalar reward model")
        # (vLLM has no word for a score that is not finite but null)
        values = [item["probs"][0] for item in items]
        return [math.nan if value is None else _number(value) for value in values]

    # ------------------------------------------------------------------ which model answers

    async def _describe_now(self) -> None:
        async with self._servers.client() as client:
            await self._describe(client)

    async def _describe(self, client: httpx2.AsyncClient) -> None:
        """Ask the servers, once, which model they serve; refuse another than is meant."""
        if self._described or self.protocol != "companion":
            return
        path, urls = "/v1/models", self._servers.urls
        answers: list[Any] = []
        if len(urls) > 1:  # one that is away is left out; should it come back, its answers tell
            sent = [self._servers.send(client, path, only=url) for url in urls]
            tried = await asyncio.gather(*sent, return_exceptions=True)
            for one in tried:
                if isinstance(one, BaseException) and not isinstance(one, Unreachable):
                    raise one
            answers = [one for one in tried if not isinstance(one, BaseException)]
        for url, response in answers or [await self._servers.send(client, path)]:
            answer = await self._json(client, url + path, url, response)
            try:
                models = {str(one["id"]): one for one in answer["data"]}
                if self.model is None and len(models) == 1:
                    found = next(iter(models.values()))
                elif self.model in models:
                    found = models[str(self.model)]
                else:
                    raise ServiceError(
                        f"{url}: serves {', '.join(models) or 'no model'}, not {self.model}",
                        "give model= one of its names",
                    )
                kind, version = found["kind"], found["model_version"]
                limit = found.get("max_length")
                if limit is not None and (type(limit) is not int or limit < 1):
                    raise TypeError(f"max_length is {limit!r}")
            except (KeyError, TypeError, AttributeError) as error:
                raise ServiceError(
                    f"{url}{path}: the answer does not fit the protocol 'companion': {error!r}",
                    "check that a companion serves there; vLLM needs protocol='classify'",
                ) from error
            if kind != self.readout.kind:
                raise ServiceError(
                    f"{url}: serves a model of the kind {kind}, and the manifest here says "
                    f"{self.readout.kind}",
                    "give the folder of the model that the server runs",
                )
            self._check_version(version, url)
            if limit is not None:
                self._max_length = min(limit, self._max_length or limit)
        self._described = True

    def _check(self, answer: Any, url: str) -> None:
        """Refuse an answer of another model, or another version of it."""
        if self.model is not None and answer.get("model", self.model) != self.model:
            raise ServiceError(f"{url}: {answer['model']} has answered, not {self.model}")
        self._check_version(answer["model_version"], url)

    def _check_version(self, version: Any, url: str) -> None:
        if not isinstance(version, str) or not version:
            raise TypeError(f"model_version is {version!r}")
        with LOCK:
            if self.model_version is None:
                self.model_version, self._said_by = version, url
        if version != self.model_version:
            raise ServiceError(
                f"{url}: serves the model version {version}, and it was {self.model_version} by "
                f"{self._said_by}",
                _NEW_SCORER,
            )

    async def _json(
        self, client: httpx2.AsyncClient, where: str, url: str, response: httpx2.Response
    ) -> Any:
        """The body of an answer; an error of what is no 200."""
        if response.status_code == 409:
            other = await self._version_at(client, url)
            raise ServiceError(
                f"{where}: serves {other}, and version {self.model_version} was asked for (as said "
                f"by {self._said_by}); it {refusal(response)[0]}",
                _NEW_SCORER,
            )
        if response.status_code != 200:
            what, cure = refusal(response)
            raise Refused(f"{where}: {what}", cure, response.status_code)
        try:
            return response.json()
        except (ValueError, RecursionError) as error:
            raise ServiceError(
                f"{where}: answered no JSON: {response.text[:200]!r}", "check the URL"
            ) from error

    async def _version_at(self, client: httpx2.AsyncClient, url: str) -> str:
        """What a server says that it serves, for an error's text."""
        try:
            _, response = await self._servers.send(client, "/v1/models", only=url)
            return f"version {response.json()['data'][0]['model_version']}"
        except (ServiceError, ValueError, LookupError, TypeError, RecursionError):
            return "another version"

    def _warn_of_probabilities(self, scores: np.ndarray) -> None:
        """Scores that all lie in (0, 1), where those of the reference do not: a sigmoid, surely."""
        finite = scores[np.isfinite(scores)]
        if self.reference is None or not finite.size or self.counts["probabilities"]:
            return
        inside = np.mean([0 < quantile < 1 for quantile in self.reference.quantiles])
        if ((finite > 0) & (finite < 1)).all() and inside**finite.size < 1e-9:
            self._servers.count("probabilities")
            logger.warning(
                f"{self.url}: all {finite.size} scores lie between 0 and 1, unlike those of the "
                "reference set: the server seems to apply a sigmoid, use_activation=false or not"
            )


def _in_order(items: Any, n: int) -> list[Any]:
    """Answers by their index: their order is not promised."""
    items = sorted(items, key=lambda item: item["index"])
    if [item["index"] for item in items] != list(range(n)):
        found = [item["index"] for item in items]
        raise ValueError(f"answers with the indices {found[:20]} for {n} texts")
    return items


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number, and no reason says why")
    return float(value)


@functools.cache
def _threads_of(process: int) -> Executor:
    """Threads in which awaited calls wait for servers; a fork makes its own.

    (The event loop's are few, a handful on a small machine, since they are meant to compute.)
    """
    return ThreadPoolExecutor(32, "companion-remote")
