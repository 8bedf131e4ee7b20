"""A scorer whose model runs on a server: the same rows in, the same scores out.

The token ids are made here, by the formatter that was saved with the model, and sent as ids: a
server that tokenises text again may add a second BOS or leave out the EOS, and says nothing.
Requests that fail are repeated and counted; one that fails for good is an error, never a missing
reward (OpenRLHF's client gives up after five tries and goes on with None). Chapter 5.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from companion.errors import CompanionError, DataError, ReadoutError, ServiceError
from companion.formatting import Encoded, RewardFormatter, Row
from companion.models.loading import load_formatter
from companion.models.manifest import ReferenceStats
from companion.scoring.results import Scores

logger = logging.getLogger(__name__)

Protocol = Literal["classify", "companion"]

#: protocol -> path behind the server's URL
PATHS: Final[dict[str, str]] = {"classify": "/classify", "companion": "/score"}
#: Answers after which a request is sent again: too many requests, and what a restart looks like.
RETRIED: Final = (429, 500, 502, 503, 504)
#: The environment variable with the server's key, if it wants one.
KEY_VARIABLE: Final = "COMPANION_REWARD_API_KEY"


class RemoteScorer:
    """Scores from a server that holds the reward model.

    Parameters
    ----------
    url : str
        Where the server listens, without the route: ``http://host:8000``.
    formatter : RewardFormatter
        The one that was saved with the model that the server runs; see :meth:`from_pretrained`.
    reference : ReferenceStats, optional
        Of the model's manifest; without it there are raw scores only.
    protocol : {"classify", "companion"}
        ``classify``: vLLM's route. Gets ``{"input": [[ids]], "use_activation": false}``, without
        which vLLM may apply a sigmoid, and gives the logit in ``data[i].probs[0]``.
        ``companion``: ``POST /score`` gets ``{"input_ids": [[ids]]}`` and gives ``{"scores":
        [number or null]}``.
    model : str, optional
        Name of the model on the server, where it serves several.
    batch_size : int
        Most texts of a request.
    timeout : float
        Seconds to wait for an answer.
    retries : int
        How often a request is sent again after a connection error or one of the answers in
        :data:`RETRIED`, with pauses of `backoff` × 1, 2, 4, … seconds (at most 60), or what the
        server's ``Retry-After`` says.
    backoff : float
        Seconds of the first pause.
    api_key : str, optional
        Sent as a bearer token; default: the environment's ``COMPANION_REWARD_API_KEY``.

    Attributes
    ----------
    counts : Counter
        ``requests``, ``retries`` and ``texts`` so far.
    """

    def __init__(
        self,
        url: str,
        formatter: RewardFormatter,
        *,
        reference: ReferenceStats | None = None,
        protocol: Protocol = "classify",
        model: str | None = None,
        batch_size: int = 128,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 0.5,
        api_key: str | None = None,
    ) -> None:
        if protocol not in PATHS:
            raise DataError(f"protocol is {protocol!r}", f"use one of: {', '.join(PATHS)}")
        if not is_url(url):
            raise DataError(f"{url!r} is no URL", "give http://host:port or https://…")
        if batch_size < 1 or retries < 0:
            raise DataError(
                f"batch_size is {batch_size} and retries is {retries}",
                "use at least 1 and at least 0",
            )
        self.url = url.rstrip("/")
        self.formatter = formatter
        self.reference = reference
        self.protocol: Protocol = protocol
        self.model = model
        self.batch_size = batch_size
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.api_key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
        self.counts: Counter[str] = Counter()
        self._session: requests.Session | None = None

    @classmethod
    def from_pretrained(
        cls, url: str, path_or_id: str | os.PathLike[str], **settings: Any
    ) -> RemoteScorer:
        """A scorer for the server at `url`, with the formatter of the model that it runs.

        `path_or_id` is that model's folder or hub id; no weights are loaded. `settings` are those
        of the class.

        Raises
        ------
        ModelError
            If there is no tokenizer, or it is not the one of the manifest.
        """
        formatter, manifest = load_formatter(path_or_id)
        return cls(
            url, formatter, reference=None if manifest is None else manifest.reference, **settings
        )

    @property
    def tokenizer(self) -> Any:
        """The reward model's tokenizer."""
        return self.formatter.tokenizer

    def score(
        self,
        rows: Sequence[Row],
        *,
        terminated: bool | None = None,
        field: str = "completion",
        on_error: Literal["raise", "skip"] = "raise",
        names: Sequence[str] | None = None,
    ) -> Scores:
        """Score rows; see :meth:`companion.scoring.RewardScorer.score`.

        Raises
        ------
        ServiceError
            If the server does not answer, refuses, or answers something else than its protocol
            says; with ``on_error="skip"`` too: a server that is gone is no bad row.
        CompanionError
            With ``on_error="raise"``, for a bad row or a score that is not finite.
        """
        if on_error not in ("raise", "skip"):
            raise DataError(f"on_error is {on_error!r}", "use 'raise' or 'skip'")
        encoded = self.formatter.try_encode_many(rows, field, terminated=terminated, names=names)
        names = names if names is not None else [f"row {i}" for i in range(len(rows))]
        raw = np.full(len(rows), np.nan)
        lengths = np.zeros(len(rows), dtype=np.int64)
        reasons: list[str | None] = [None] * len(rows)
        kept: list[int] = []
        for index, item in enumerate(encoded):
            if isinstance(item, CompanionError):
                if on_error == "raise":
                    raise item
                reasons[index] = item.what
            elif item is None:
                reasons[index] = f"longer than max_length={self.formatter.max_length} tokens"
            else:
                kept.append(index)
        values = self.score_encoded([item for item in encoded if isinstance(item, Encoded)])
        for index, value in zip(kept, values, strict=True):
            if math.isfinite(value):
                raw[index], lengths[index] = value, len(encoded[index])  # type: ignore[arg-type]
                continue
            reasons[index] = f"the score is not finite ([{value}])"
            if on_error == "raise":
                raise ReadoutError(
                    f"{names[index]}: the server's score is not finite ({value})",
                    "serve the model in float32; if it stays, its training has diverged",
                )
        return Scores(raw, lengths, reasons).against(self.reference)

    def score_encoded(self, encoded: Sequence[Encoded | Sequence[int]]) -> np.ndarray:
        """Score token ids, ``[N]`` float64 in input order; NaN where the server gives null.

        Raises
        ------
        ServiceError
            As :meth:`score`.
        """
        ids = [list(e.input_ids) if isinstance(e, Encoded) else list(e) for e in encoded]
        scores = np.full(len(ids), np.nan)
        for begin in range(0, len(ids), self.batch_size):
            part = ids[begin : begin + self.batch_size]
            scores[begin : begin + len(part)] = self._values(self._post(part), len(part))
            self.counts["texts"] += len(part)
        self._warn_of_probabilities(scores)
        return scores

    # ------------------------------------------------------------------ inside

    def _post(self, ids: list[list[int]]) -> Any:
        body: dict[str, Any] = {"input_ids": ids}
        if self.protocol == "classify":
            body = {"input": ids, "add_special_tokens": False, "use_activation": False}
        if self.model is not None:
            body["model"] = self.model
        where = self.url + PATHS[self.protocol]
        self.counts["requests"] += 1
        try:
            response = self._connection().post(where, json=body, timeout=self.timeout)
        except requests.RequestException as error:
            self.counts["retries"] += self.retries
            raise ServiceError(
                f"{where}: no answer after {self.retries + 1} tries ({error})",
                "check that the server runs and can be reached from here",
            ) from error
        history = getattr(response.raw.retries, "history", ())
        if history:
            self.counts["retries"] += len(history)
            logger.warning(f"{where}: answered after {len(history)} retries")
        if response.status_code != 200:
            again = f" after {len(history) + 1} tries" if history else ""
            raise ServiceError(
                f"{where}: answered {response.status_code}{again}: {response.text[:500]}",
                "the server's log says why",
            )
        try:
            return response.json()
        except ValueError as error:
            raise ServiceError(f"{where}: answered no JSON: {response.text[:200]!r}") from error

    def _values(self, answer: Any, n: int) -> list[float]:
        """Scores in the order of the request."""
        try:
            if self.protocol == "companion":
                found = list(answer["scores"])
            else:
                items = sorted(answer["data"], key=lambda item: item["index"])
                if [item["index"] for item in items] != list(range(len(items))):
                    raise ValueError("indices that are not 0, 1, 2, …")
                if any(len(item["probs"]) != 1 for item in items):
                    raise ValueError("several values a text: the model is no scalar reward model")
                found = [item["probs"][0] for item in items]
            if len(found) != n:
                raise ValueError(f"{len(found)} scores for {n} texts")
            return [math.nan if value is None else float(value) for value in found]
        except (KeyError, TypeError, ValueError) as error:
            raise ServiceError(
                f"{self.url}: the answer does not fit the protocol {self.protocol!r}: {error!r}",
                "check the protocol, and that the server runs a model with one label",
            ) from error

    def _warn_of_probabilities(self, scores: np.ndarray) -> None:
        """Scores that all lie in (0, 1), where those of the reference do not: a sigmoid, surely."""
        finite = scores[np.isfinite(scores)]
        if self.reference is None or not finite.size or self.counts["probabilities"]:
            return
        inside = np.mean([0 < quantile < 1 for quantile in self.reference.quantiles])
        if ((finite > 0) & (finite < 1)).all() and inside**finite.size < 1e-9:
            self.counts["probabilities"] += 1
            logger.warning(
                f"{self.url}: all {finite.size} scores lie between 0 and 1, unlike those of the "
                "reference set: the server seems to apply a sigmoid, use_activation=false or not"
            )

    def _connection(self) -> requests.Session:
        if self._session is None:
            retry = Retry(
                total=self.retries,
                backoff_factor=self.backoff,
                backoff_max=60,
                status_forcelist=RETRIED,
                allowed_methods=None,  # a score changes nothing on the server: POST may repeat
                raise_on_status=False,
            )
            self._session = requests.Session()
            for scheme in ("http://", "https://"):
                self._session.mount(scheme, HTTPAdapter(max_retries=retry))
            if self.api_key:
                self._session.headers["Authorization"] = f"Bearer {self.api_key}"
        return self._session

    def __getstate__(self) -> Mapping[str, Any]:
        """Open connections do not travel."""
        return {**self.__dict__, "_session": None}


def is_url(source: str) -> bool:
    """Whether this names a server, not a folder or a hub id."""
    return source.startswith(("http://", "https://"))
