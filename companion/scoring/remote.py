"""A scorer whose model runs on a server: the same rows in, the same scores out.

The token ids are made here, by the formatter that was saved with the model, and sent as ids: a
server that tokenises text again may add a second BOS or leave out the EOS, and says nothing.
Requests that fail are repeated and counted; one that fails for good is an error, never a missing
reward (OpenRLHF's client gives up after five tries and goes on with None). Chapter 5.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Literal

import numpy as np
import requests
import torch
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from companion.errors import DataError, ServiceError
from companion.formatting import RewardFormatter, TextMode
from companion.models.checkpoint import is_adapter, load_config, resolve
from companion.models.loading import load_formatter
from companion.models.manifest import MANIFEST_FILE, RewardManifest
from companion.models.readout import Readout, ScalarReadout, readout_from_dict
from companion.models.reward_model import RewardModel
from companion.scoring.results import Scores
from companion.scoring.scorer import Progress, Scorer, positions_of

logger = logging.getLogger(__name__)

Protocol = Literal["classify", "companion"]

#: protocol -> path behind the server's URL
PATHS: Final[dict[str, str]] = {"classify": "/classify", "companion": "/score"}
#: Answers after which a request is sent again: too many requests, and what a restart looks like.
RETRIED: Final = (429, 500, 502, 503, 504)
#: The environment variable with the server's key, if it wants one.
KEY_VARIABLE: Final = "COMPANION_REWARD_API_KEY"
#: Held while a count is raised, by any thread for any scorer.
_COUNTING: Final = threading.Lock()


class RemoteScorer(Scorer[Scores]):
    """Scores from a server that holds the reward model.

    It may be called from several threads, and pickled.

    Parameters
    ----------
    url : str
        Where the server listens, without the route: ``http://host:8000``.
    formatter : RewardFormatter
        The one that was saved with the model that the server runs; see :meth:`from_pretrained`.
    manifest : RewardManifest, optional
        Of that model: its reference set, without which there are raw scores only, and its read-out.
    max_positions : int, optional
        Longest text that the model has positions for; a longer one is not sent.
    notes : sequence of str
        What was assumed while loading.
    protocol : {"classify", "companion"}
        ``classify``: vLLM's route. Gets ``{"input": [[ids]], "use_activation": false}``, without
        which vLLM may apply a sigmoid, and gives the logit in ``data[i].probs[0]``.
        ``companion``: ``POST /score`` gets ``{"input_ids": [[ids]]}`` and gives ``{"scores":
        [number or null]}``. For an outcome or process model, which ``classify`` cannot carry, it
        also gets ``"places": [[indices of tokens]]`` and gives ``{"logits": [[[number, one a
        label], one a place], one a text]}``.
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

    Notes
    -----
    :meth:`score` and the like raise :class:`companion.errors.ServiceError` if the server does not
    answer, refuses, or answers something else than its protocol says, whatever ``on_error`` is.
    """

    _cure_of_nan: ClassVar[str] = (
        "serve the model in float32; if it stays, its training has diverged"
    )

    def __init__(
        self,
        url: str,
        formatter: RewardFormatter,
        *,
        manifest: RewardManifest | None = None,
        max_positions: int | None = None,
        notes: Sequence[str] = (),
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
        readout: Readout = ScalarReadout()
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
        self.url = url.rstrip("/")
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
        cls,
        url: str,
        path_or_id: str | os.PathLike[str],
        *,
        text: TextMode | None = None,
        **settings: Any,
    ) -> RemoteScorer:
        """A scorer for the server at `url`, with the formatter of the model that it runs.

        `path_or_id` is that model's folder or hub id; no weights are loaded. `text` is how rows of
        text are read in place of what the manifest says. `settings` are those of the class.

        Raises
        ------
        ModelError
            If there is no tokenizer, or it is not the one of the manifest.
        """
        notes: list[str] = []
        formatter, manifest = load_formatter(path_or_id, notes=notes)
        formatter = formatter if text is None else formatter.changed(text=text)
        name = resolve(path_or_id)
        positions = None if is_adapter(name) else positions_of(load_config(name))
        return cls(
            url, formatter, manifest=manifest, max_positions=positions, notes=notes, **settings
        )

    def fingerprint(self) -> str:
        """Of the manifest of the model that the server is said to run; without one, of the URL."""
        known = self.url if self.manifest is None else self.manifest.to_json()
        return hashlib.sha256(f"{self.model} {known}".encode()).hexdigest()

    # ------------------------------------------------------------------ inside

    def _values(
        self,
        ids: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]] | None,
        progress: Progress | None,
    ) -> Sequence[Any]:
        values: list[Any] = []
        for begin in range(0, len(ids), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            own_places = None if places is None else list(places[part])
            answer = self._post(list(ids[part]), own_places)
            try:
                own = self._read(answer, own_places)
                if len(own) != len(ids[part]):
                    raise ValueError(f"{len(own)} scores for {len(ids[part])} texts")
            except (KeyError, TypeError, ValueError) as error:
                needs = "runs a model with one label" if places is None else "knows token values"
                raise ServiceError(
                    f"{self.url}: the answer does not fit the protocol {self.protocol!r}: "
                    f"{error!r}",
                    f"check the protocol, and that the server {needs}",
                ) from error
            values += own
            self._count("texts", len(own))
            if progress is not None:
                progress(len(own))
        if places is None:
            self._warn_of_probabilities(np.array(values))
        return values

    def _read(self, answer: Any, places: Sequence[Sequence[int]] | None) -> list[Any]:
        """What an answer says of each text, in the order of the request."""
        if places is not None:
            found = [
                torch.tensor([list(map(_number, place)) for place in text], dtype=torch.float32)
                for text in answer["logits"]
            ]
            for own, logits in zip(places, found, strict=True):
                if logits.shape != (len(own), self.readout.labels):
                    raise ValueError(f"logits {list(logits.shape)} for {len(own)} places")
            return found
        if self.protocol == "companion":
            return list(map(_number, answer["scores"]))
        items = sorted(answer["data"], key=lambda item: item["index"])
        if [item["index"] for item in items] != list(range(len(items))):
            raise ValueError("indices that are not 0, 1, 2, …")
        if any(len(item["probs"]) != 1 for item in items):
            raise ValueError("several values a text: the model is no scalar reward model")
        return [_number(item["probs"][0]) for item in items]

    def _post(self, ids: list[Any], places: list[Any] | None) -> Any:
        body: dict[str, Any] = {"input_ids": ids}
        if places is not None:
            body["places"] = places
        if self.protocol == "classify":
            body = {"input": ids, "add_special_tokens": False, "use_activation": False}
        if self.model is not None:
            body["model"] = self.model
        where = self.url + PATHS[self.protocol]
        self._count("requests")
        try:
            response = self._connection().post(where, json=body, timeout=self.timeout)
        except requests.RequestException as error:
            self._count("retries", self.retries)
            raise ServiceError(
                f"{where}: no answer after {self.retries + 1} tries ({error})",
                "check that the server runs and can be reached from here",
            ) from error
        history = getattr(response.raw.retries, "history", ())
        if history:
            self._count("retries", len(history))
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

    def _count(self, name: str, n: int = 1) -> None:
        with _COUNTING:
            self.counts[name] += n

    def _warn_of_probabilities(self, scores: np.ndarray) -> None:
        """Scores that all lie in (0, 1), where those of the reference do not: a sigmoid, surely."""
        finite = scores[np.isfinite(scores)]
        if self.reference is None or not finite.size or self.counts["probabilities"]:
            return
        inside = np.mean([0 < quantile < 1 for quantile in self.reference.quantiles])
        if ((finite > 0) & (finite < 1)).all() and inside**finite.size < 1e-9:
            self._count("probabilities")
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


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def is_url(source: str) -> bool:
    """Whether this names a server, not a folder or a hub id."""
    return source.startswith(("http://", "https://"))
