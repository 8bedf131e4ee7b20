"""An endpoint as a subject: the companion's, vLLM's or OpenRLHF's routes, asked as they are.

:class:`companion.RemoteScorer` repeats what failed and refuses what does not fit, since it is to
give right scores; here each answer is taken as it comes, with its status. Chapter 9.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import httpx2
import numpy as np

from companion.audit.subject import Ability, Batch, BudgetSpent, Subject
from companion.errors import DataError, ServiceError
from companion.formatting import Row
from companion.models.checkpoint import is_adapter, load_config, resolve
from companion.models.golden import ROWS
from companion.models.loading import load_formatter
from companion.scoring.remote import KEY_VARIABLE
from companion.scoring.servers import Refused, Unreachable, is_url, refusal

Protocol = Literal["companion", "vllm", "openrlhf"]
#: protocol -> its route; the companion's server has all three, and its own says the most
ROUTES: Final[dict[Protocol, str]] = {
    "companion": "/v1/rewards",
    "vllm": "/classify",
    "openrlhf": "/get_reward",
}
#: Answers of a server that is busy or starts again, and how often it is asked once more.
_BUSY: Final = (429, 502, 503, 504)
_TRIES: Final = 4
#: Statuses after which nothing further can be asked: the key, or the route.
_CLOSED: Final = (401, 403, 404, 405)
#: Most texts of one request.
_BATCH: Final = 64


@dataclass(frozen=True)
class Answer:
    """What came back of one request.

    Attributes
    ----------
    status : int
    scores : array ``[N]`` or None
        In the order of the texts, NaN where one has none; None if the answer holds no scores.
    said : tuple of str
        Warnings of the texts, the numbers of tokens that were cut, and reasons for no score; or
        what a refusal says.
    """

    status: int
    scores: np.ndarray | None
    said: tuple[str, ...] = ()


@dataclass
class EndpointSubject(Subject):
    """A server that gives scores; see :func:`open_endpoint`.

    It may be called from several threads.
    """

    name: str
    url: str
    protocol: Protocol
    found_by: str = "as it was named"
    model_name: str | None = None
    max_length: int | None = None
    kind: str = "scalar"
    dtype: str = "bfloat16"
    notes: list[str] = field(default_factory=list)
    abilities: frozenset[Ability] = frozenset({"rows", "threads"})
    api_key: str | None = None
    timeout: float = 120.0
    max_tokens: int | None = None
    max_requests: int | None = None
    what: Literal["endpoint"] = "endpoint"

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else None
        self._client = httpx2.Client(headers=headers, timeout=self.timeout, follow_redirects=True)
        self._lock = threading.Lock()
        self._asked: dict[str, float] = {}

    # ------------------------------------------------------------------ what is asked

    @property
    def route(self) -> str:
        """Where requests are posted."""
        return self.url + ROUTES[self.protocol]

    def posts(self, data: str | None = None) -> list[str]:
        """What will be posted, for people, before anything is."""
        most = "any number of" if self.max_requests is None else f"at most {self.max_requests:,}"
        texts = "built-in prompts and answers" + (f", and rows of {data}" if data else "")
        form = {
            "companion": "as rows, which the server formats",
            "vllm": "as text and messages, which the server formats",
            "openrlhf": "as text",
        }[self.protocol]
        if "ids" in self.abilities:
            form += ", and as " + (
                "what token ids read as" if self.protocol == "openrlhf" else "token ids"
            )
        return [
            f"{self.route}: the protocol {self.protocol}, {self.found_by}",
            f"{most} requests will be posted there: {texts}, {form}; some of them on purpose "
            "empty, too long, or no proper request",
        ]

    def call(self, batch: Batch) -> np.ndarray:
        """Scores of token ids in one request; OpenRLHF's route gets what they read as."""
        ids = [list(map(int, text)) for text in batch.ids]
        return self._scored(self.body_of_ids(ids), len(ids), sum(map(len, ids)))

    def call_rows(self, rows: Sequence[Row]) -> np.ndarray:
        """Scores of rows in one request, where the protocol takes several conversations."""
        scores: list[float] = []
        for part in self._parts(rows):
            n_tokens = sum(_words(row) for row in part)
            scores.extend(self._scored(self.body_of_rows(part), len(part), n_tokens))
        return np.array(scores, dtype=np.float64)

    def alone(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array([self._once(self.body_of_ids([list(text)]), len(text)) for text in ids])

    def rows_alone(self, rows: Sequence[Row]) -> np.ndarray:
        """Scores ``[N]`` of rows, each in a request of its own; a row is asked once in an audit."""
        return np.array([self._once(self.body_of_rows([row]), _words(row)) for row in rows])

    def tolerance(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """By :meth:`rounding`; where no ids can be asked, that of a typical text so far."""
        if "ids" in self.abilities:
            return self.rounding(self.alone(ids))
        seen = self.rounding(list(self._asked.values()))
        return np.full(len(ids), np.median(seen) if seen.size else 0.0)

    def rounding(self, scores: Any) -> np.ndarray:
        """Most that rounding may move each of these scores, ``[N]``.

        A layer rounds about eight times: each time by the unit roundoff u of the dtype, and by √H
        of float32's in sums of H terms, which are kept in float32. The roundings of all layers add
        up like a random walk, of which four standard deviations are allowed, for what is of the
        size of the scores and their spread. Depth and width are those of the configuration of
        ``--model``; if they are not known, 32 and 4,096 are taken.
        """
        scores = np.asarray(scores, dtype=np.float64)
        finite = scores[np.isfinite(scores)]
        spread = float(finite.std()) if finite.size else 0.0
        decoder = None if self.config is None else self.config.get_text_config()
        depth = getattr(decoder, "num_hidden_layers", None) or 32
        width = getattr(decoder, "hidden_size", None) or 4096
        unit = {"float32": 2.0**-24, "float16": 2.0**-11}.get(self.dtype, 2.0**-8)
        each = unit + 2.0**-24 * math.sqrt(width)
        return 4 * math.sqrt(8 * (depth + 1)) * each * (np.abs(scores) + spread)

    def encode(self, row: Row) -> list[int]:
        assert self.formatter is not None
        encoded = self.formatter.encode_row(row)
        if encoded is None:
            raise DataError("a text is longer than the model takes", "leave it out")
        return list(encoded.input_ids)

    def check_answers(self) -> None:
        """Ask for the score of one ordinary text; without it nothing else need be asked.

        Raises
        ------
        ServiceError
            If it is refused, or answered with something else.
        """
        row: Row = dict(ROWS[0]) if self.protocol == "companion" else str(ROWS[0]["completion"])
        try:
            self.rows_alone([row])
        except Refused as refused:
            raise ServiceError(
                f"an ordinary text has no score: {refused.what}",
                f"check --protocol, which is {self.protocol} ({self.found_by}), and what it serves",
            ) from refused

    # ------------------------------------------------------------------ bodies and answers

    def body_of_ids(self, ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The body of a request for texts as token ids."""
        if self.protocol == "openrlhf":
            return {"query": [self.tokenizer.decode(text) for text in ids]}
        if self.protocol == "companion":
            return {"items": [{"input_ids": list(text)} for text in ids]}
        return self._classify({"input": [list(t) for t in ids], "add_special_tokens": False})

    def body_of_rows(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The same of rows; of conversations vLLM's route takes one."""
        if self.protocol == "companion":
            return {"items": [_as_item(row) for row in rows]}
        plain = [_plain(row) for row in rows]
        if self.protocol == "openrlhf":
            return {"query": [_read(row) if text is None else text for row, text in _both(rows)]}
        if None not in plain:
            return self._classify({"input": plain})
        (row,) = rows
        return self._classify({"messages": _messages(row)})

    def ask(self, body: Any, n: int, n_tokens: int = 0) -> Answer:
        """One request, and whatever comes back.

        Raises
        ------
        BudgetSpent
        Unreachable
            If nobody answers.
        """
        with self._lock:
            self._spend(n_tokens)
        for tries in range(_TRIES):
            try:
                response = self._client.post(self.route, json=body)
            except httpx2.TransportError as error:
                if tries + 1 < _TRIES and not isinstance(error, httpx2.TimeoutException):
                    time.sleep(0.2 * 2**tries)
                    continue
                raise Unreachable(
                    f"{self.route}: no answer ({str(error) or type(error).__name__})",
                    "check that the server runs and can be reached from here",
                ) from error
            if response.status_code not in _BUSY or tries + 1 == _TRIES:
                break
            time.sleep(0.5 * 2**tries)
        return self._answer(response, n)

    def _answer(self, response: httpx2.Response, n: int) -> Answer:
        status = response.status_code
        if status != 200:
            return Answer(status, None, (refusal(response)[0],))
        try:
            return _read_answer(self.protocol, response.json(), n)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"an answer that does not fit the protocol {self.protocol}: {error!r}"
            return Answer(status, None, (f"{what}: {response.text[:200]}",))

    def _scored(self, body: Any, n: int, n_tokens: int) -> np.ndarray:
        """Scores of a request that is to be answered."""
        answer = self.ask(body, n, n_tokens)
        if answer.scores is None:
            what = f"{self.route}: {'; '.join(answer.said)}"
            if answer.status in _CLOSED:
                raise ServiceError(what, "check the key, the URL and --protocol")
            raise Refused(what, None, answer.status)
        return answer.scores

    def _once(self, body: Any, n_tokens: int) -> float:
        key = json.dumps(body, sort_keys=True)
        if key not in self._asked:
            self._asked[key] = float(self._scored(body, 1, n_tokens)[0])
        return self._asked[key]

    def _classify(self, body: dict[str, Any]) -> dict[str, Any]:
        named = {} if self.model_name is None else {"model": self.model_name}
        return {**body, "use_activation": False, **named}

    def _parts(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows of each request."""
        alone = self.protocol == "vllm" and any(_plain(row) is None for row in rows)
        size = 1 if alone else _BATCH
        return [list(rows[begin : begin + size]) for begin in range(0, len(rows), size)]

    def _spend(self, n_tokens: int) -> None:
        if self.max_requests is not None and self.requests >= self.max_requests:
            raise BudgetSpent(f"all {self.max_requests:,} requests are spent")
        if self.max_tokens is not None and self.tokens + n_tokens > self.max_tokens:
            raise BudgetSpent(f"{n_tokens:,} more tokens are beyond the {self.max_tokens:,}")
        self.requests += 1
        self.tokens += n_tokens


def _read_answer(protocol: Protocol, body: Any, n: int) -> Answer:
    """Scores by their index; an answer without them raises what reading it does."""
    if protocol == "openrlhf":
        values = body["rewards"]
        cut = (body.get("extra_logs") or {}).get("tokens_cut") or []
        items = [{"index": i, "raw": value} for i, value in enumerate(values)]
        said = [f"{one:g} tokens were cut" for one in cut if one]
    elif protocol == "vllm":
        items, said = list(body["data"]), []
        if any(len(item["probs"]) != 1 for item in items):
            raise ValueError("several values a text: no scalar reward model")
        items = [{"index": item["index"], "raw": item["probs"][0]} for item in items]
    else:
        items = list(body["rewards"])
        said = [str(one) for item in items for one in item.get("warnings") or ()]
        said += [str(item["reason"]) for item in items if item.get("reason")]
    order = tuple(int(item["index"]) for item in items)
    if sorted(order) != list(range(n)):
        raise ValueError(f"{len(order)} scores for {n} texts")
    scores = np.full(n, np.nan)
    for item in items:
        if item["raw"] is not None:
            scores[item["index"]] = float(item["raw"])
    return Answer(200, scores, tuple(said))


# ---------------------------------------------------------------------- rows


def _both(rows: Sequence[Row]) -> list[tuple[Row, str | None]]:
    return [(row, _plain(row)) for row in rows]


def _plain(row: Row) -> str | None:
    """The text of a row that is nothing but text."""
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping) and isinstance(row.get("text"), str):
        return str(row["text"])
    return None


def _as_item(row: Row) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    return dict(row) if isinstance(row, Mapping) else {"messages": list(row)}


def _messages(row: Row) -> list[dict[str, Any]]:
    """A row as one conversation."""
    if not isinstance(row, Mapping):
        return [dict(message) for message in row]  # type: ignore[arg-type]  # (no text: messages)
    if "messages" in row:
        return [dict(message) for message in row["messages"]]
    messages: list[dict[str, Any]] = []
    for value, role in ((row.get("prompt"), "user"), (row.get("completion"), "assistant")):
        if isinstance(value, str):
            messages.append({"role": role, "content": value})
        elif value is not None:
            messages.extend(dict(message) for message in value)
    return messages


def _read(row: Row) -> str:
    """A conversation as words, for a route that takes nothing else."""
    return "\n".join(str(message.get("content", "")) for message in _messages(row))


def _words(row: Row) -> int:
    """About how many tokens a row has: nobody counts them here."""
    text = _plain(row)
    return max(1, round(len(text if text is not None else _read(row)) / 4))


# ---------------------------------------------------------------------- opening


def open_endpoint(
    target: str,
    *,
    protocol: Protocol | None = None,
    model: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    api_key: str | None = None,
    timeout: float = 120.0,
    max_tokens: int | None = None,
    max_requests: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> EndpointSubject:
    """Look at an endpoint without posting anything: what it speaks, and what it says of itself.

    Parameters
    ----------
    target : str
        ``http://host:port``; a route behind it names the protocol.
    protocol : {"companion", "vllm", "openrlhf"}, optional
        Default: found by its route, by GET of ``/openapi.json`` and ``/v1/models``.
    model : str or path, optional
        Folder or hub id of the model that it runs, of which tokenizer, configuration and manifest
        are read: without it nothing can be asked by token ids.
    dtype : str, optional
        In which it computes. Default: what the configuration of `model` says, else bfloat16, whose
        rounding is the coarsest.
    api_key : str, optional
        Default: the environment's ``COMPANION_REWARD_API_KEY``.
    timeout : float
        Seconds to wait for an answer.
    max_tokens, max_requests : int, optional
    revision, trust_remote_code
        For transformers.

    Raises
    ------
    Unreachable
        If nobody answers there.
    DataError
        If it does not say what it speaks, or `target` is no URL.
    """
    if not is_url(target):
        raise DataError(f"{target!r} is no URL", "give http://host:port")
    key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
    url = target.rstrip("/")
    how = "as it was named"
    for name, route in ROUTES.items():
        if url.endswith(route):
            url = url.removesuffix(route)
            protocol, how = protocol or name, "by its route"
    headers = {"Authorization": f"Bearer {key}"} if key else None
    with httpx2.Client(headers=headers, timeout=timeout, follow_redirects=True) as client:
        told = _get(client, url, "/v1/models")
        own = _first_model(told)
        if protocol is None:
            protocol, how = _find_protocol(client, url, own)
    subject = EndpointSubject(
        target,
        url,
        protocol,
        found_by=how,
        api_key=key,
        timeout=timeout,
        max_tokens=max_tokens,
        max_requests=max_requests,
    )
    limit = own.get("max_length") or own.get("max_model_len")
    subject.max_length = limit if isinstance(limit, int) else None
    if protocol == "vllm" and isinstance(own.get("id"), str):
        subject.model_name = own["id"]
    subject.kind = str(own.get("kind", "scalar"))
    if model is not None:
        _add_files(subject, model, {"revision": revision, "trust_remote_code": trust_remote_code})
    else:
        subject.notes.append(
            "nothing is asked by token ids: --model names the folder or hub id whose tokenizer and "
            "manifest make them"
        )
    if dtype is not None:
        subject.dtype = dtype
    elif subject.config is None:
        subject.notes.append(
            "--dtype was not given and is not known: differences that bfloat16 could make are "
            "allowed for"
        )
    if subject.kind != "scalar":
        subject.abilities -= {"ids"}
        subject.notes.append(f"the model is of the kind {subject.kind}: it is asked by rows only")
        if protocol != "companion":
            raise DataError(
                f"{url}: runs a {subject.kind} model, of which {ROUTES[protocol]} has no scores",
                "leave --protocol out, or give --protocol companion",
            )
    return subject


def _get(client: httpx2.Client, url: str, path: str) -> Any:
    """What a GET answers, None for what is no JSON or no 200."""
    try:
        response = client.get(url + path)
    except (httpx2.TransportError, httpx2.InvalidURL) as error:
        raise Unreachable(
            f"{url}{path}: no answer ({str(error) or type(error).__name__})",
            "check the URL, and that the server runs and can be reached from here",
        ) from error
    if response.status_code in (401, 403):
        raise Refused(
            f"{url}{path}: {refusal(response)[0]}",
            f"give the key by --api_key_env, or in {KEY_VARIABLE}",
            response.status_code,
        )
    try:
        return response.json() if response.status_code == 200 else None
    except ValueError:
        return None


def _first_model(told: Any) -> dict[str, Any]:
    try:
        return dict(told["data"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return {}


def _find_protocol(client: httpx2.Client, url: str, own: dict[str, Any]) -> tuple[Protocol, str]:
    document = _get(client, url, "/openapi.json")
    paths = document.get("paths") if isinstance(document, Mapping) else None
    for name, route in ROUTES.items():
        if isinstance(paths, Mapping) and route in paths:
            return name, "found by /openapi.json"
    if "model_version" in own and "kind" in own:
        return "companion", "found by /v1/models"
    if own.get("owned_by") == "vllm":
        return "vllm", "found by /v1/models"
    raise DataError(
        f"{url}: neither /openapi.json nor /v1/models says what it speaks",
        f"name it: --protocol {', '.join(ROUTES)}",
    )


def _add_files(subject: EndpointSubject, model: str | os.PathLike[str], hub: Any) -> None:
    """Tokenizer, manifest and configuration of the model that runs there."""
    formatter, manifest, _ = load_formatter(model, notes=subject.notes, **hub)
    subject.formatter = formatter.changed(overlong="error")
    subject.tokenizer, subject.manifest = formatter.tokenizer, manifest
    name = resolve(model)
    if not is_adapter(name):
        subject.config = load_config(name, **hub)
        own = str(getattr(subject.config, "dtype", None) or "bfloat16")
        subject.dtype = own.removeprefix("torch.")
    subject.abilities |= {"ids", "tokenizer"}
    subject.notes.append(f"what the files alone show is asked of them: companion audit {model}")
