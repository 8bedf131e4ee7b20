"""From a scorer to a service that may be trusted: identity, golden texts, deviation. Chapter 6."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from companion.errors import DataError, ModelError
from companion.formatting import Encoded, EncodedSteps
from companion.models import Identity, identity_of, text_hashes
from companion.scoring import LocalScorer, Scorer, check_golden, load_scorer
from companion.serving.app import make_app
from companion.serving.listening import in_thread
from companion.serving.request_log import RequestLog
from companion.serving.service import Service

logger = logging.getLogger(__name__)

#: Texts in flight to a server behind this one, as batches.
_GATEWAY_THREADS = 8


def open_service(
    scorer: Scorer[Any],
    *,
    name: str = "reward",
    aliases: Collection[str] = (),
    exact: bool = False,
    allow_unchecked: bool = False,
    queue_tokens: int = 1 << 20,
    log_dir: str | os.PathLike[str] | None = None,
    log_text: bool = False,
) -> Service:
    """A service around a scorer, once its golden texts have the scores that they had at training.

    Parameters
    ----------
    scorer : Scorer
        Here; or on another server, whose gateway this is.
    name : str
        Of the model, as clients see it.
    aliases : collection of str
        Other names that clients may call it by: its path, as with vLLM.
    exact : bool
        Each text runs alone: its score is the same to the last bit, whatever else is served.
    allow_unchecked : bool
        Serve a model that has no golden texts to be checked by.
    queue_tokens : int
        Most tokens in the queue.
    log_dir, log_text
        See :class:`companion.serving.RequestLog`.

    Raises
    ------
    ModelError
        If a golden text has another score; it names which hash differs. If there are none, and
        `allow_unchecked` does not say that this is known.
    """
    if queue_tokens < 1:
        raise DataError(f"queue_tokens is {queue_tokens}", "use at least 1")
    notes = list(scorer.notes)
    local = isinstance(scorer, LocalScorer)
    if exact:
        if not isinstance(scorer, LocalScorer):
            raise DataError("--exact needs the model here", "serve it without --engine")
        scorer.run_alone()
    report = check_golden(scorer)
    if report is None:
        if not allow_unchecked:
            raise ModelError(
                "the model has no golden texts: nothing says which scores it had when it was saved",
                "say that this is known: --allow_unchecked; or save it by companion train",
            )
        notes.append("no golden texts: the scores were not compared with those at training")
    elif not report.ok:
        raise ModelError(
            "the golden texts do not have the scores that they had when the model was saved:\n  "
            + "\n  ".join(report.lines()),
            "serve the folder as it was saved, in its own dtype",
        )
    if isinstance(scorer, LocalScorer):
        identity = identity_of(scorer.reward_model)
    else:
        identity = _served_identity(scorer)
    deviation = None if exact else _deviation(scorer)
    return Service(
        scorer,
        name=name,
        aliases=aliases,
        identity=identity,
        queue_tokens=queue_tokens,
        engine_threads=1 if local else _GATEWAY_THREADS,
        log=None if log_dir is None else RequestLog(log_dir, identity.version, text=log_text),
        exact=exact,
        deviation=0.0 if exact else deviation,
        notes=notes,
    )


def _served_identity(scorer: Scorer[Any]) -> Identity:
    """Of a model on an engine that has no hashes: the words by the folder, the rest by its name."""
    elsewhere = scorer.fingerprint()[:16]
    return Identity(
        weights=elsewhere,
        config=elsewhere,
        dtype="engine",
        **text_hashes(scorer.formatter, scorer.readout),
    )


def _deviation(scorer: Scorer[Any]) -> float:
    """How far a score moves with its batch: the largest difference over made-up texts."""
    random = np.random.default_rng(0)
    tokenizer = scorer.tokenizer
    most = len(tokenizer)
    special = set(tokenizer.all_special_ids)
    plain = [i for i in range(most) if i not in special][: 1 << 16]
    limit = scorer.formatter.max_length or scorer.max_positions or 64
    texts: list[Any] = []
    for length in (3, 5, 8, 13, 21, 34, 55, 64):
        encoded = Encoded(random.choice(plain, min(length, limit)).tolist(), 0, True)
        scalar = scorer.readout.kind == "scalar"
        texts.append(encoded if scalar else EncodedSteps(encoded, [len(encoded) - 1]))
    together = scorer.values(texts)
    alone = [scorer.values([text])[0] for text in texts]
    pairs = zip(together, alone, strict=True)
    return float(max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs))


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes
    ----------
    url : str
        Where, without a route.
    service : Service
        Behind it.
    """

    url: str
    service: Service


@contextlib.contextmanager
def running(
    model: Scorer[Any] | str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    max_body: int = 32 * 2**20,
    overlong: Any = None,
    **settings: Any,
) -> Iterator[Running]:
    """Serve from a thread of this process, for notebooks and tests. Chapter 6.

    Parameters
    ----------
    model : Scorer, str or path
        A scorer, or the folder or hub id of a reward model.
    host, port
        Port 0: a free one.
    token, max_body
        See :func:`companion.serving.make_app`.
    overlong : {"error", "truncate_prompt"}, optional
        What becomes of texts that are too long; has to be chosen for ``/get_reward``.
    **settings
        Those of :func:`open_service`.

    Yields
    ------
    Running
        With ``url`` and ``service``.
    """
    if not isinstance(model, Scorer):
        settings.setdefault("name", Path(model).name)
        model = load_scorer(model, overlong=overlong or "error")
    elif overlong is not None and overlong != model.formatter.overlong:
        raise DataError(
            f"overlong is {overlong!r}, and the scorer's is {model.formatter.overlong!r}",
            "load the scorer with it, or give the folder",
        )
    service = open_service(model, **settings)
    app = make_app(service, token=token, max_body=max_body, overlong_chosen=overlong is not None)
    with in_thread(app, host, port) as url:
        yield Running(url, service)
