"""Sick servers: a small reward model behind a route that does one thing wrong. Chapter 9.

They answer as OpenRLHF's, vLLM's and the companion's servers do, with the standard library alone;
without a sickness they are sound, which the tests show too.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.special import expit

from companion.audit.endpoint import ROUTES, Protocol
from companion.audit.museum.healthy import save_with_manifest, tutor_reward
from companion.audit.museum.specimen import Planted, Specimen
from companion.errors import CompanionError
from companion.models import RewardModel
from companion.scoring.scorer import RewardScorer

_GITHUB: Final = "https://github.com/"


class BadRequest(Exception):
    """Answered with 400."""


@dataclass(frozen=True)
class Sickness:
    """What a server does besides, each None or false where it is well.

    Attributes
    ----------
    cut : int or None
        Tokens of a text that are read.
    strips_end : bool
        The token that ends a text is taken off.
    template : bool
        A row is written as ``Q: … A: …``.
    pads : bool
        The texts of a request are filled up to the longest with the EOS, which is read.
    sorts : bool
        Scores come back in the order of the lengths.
    sigmoid, softmax : bool
        An activation stands behind the head, whatever the client asks for.
    by_default : bool
        A sigmoid is applied unless ``use_activation`` is false; other fields are dropped.
    hides : bool
        A bad request is answered with 500.
    scores_nothing : bool
        An empty text has a score.
    """

    cut: int | None = None
    strips_end: bool = False
    template: bool = False
    pads: bool = False
    sorts: bool = False
    sigmoid: bool = False
    softmax: bool = False
    by_default: bool = False
    hides: bool = False
    scores_nothing: bool = False


class RewardServer(ThreadingHTTPServer):
    """A reward model behind one protocol's route, on a free port of this machine."""

    daemon_threads = True

    def __init__(self, scorer: RewardScorer, protocol: Protocol, sickness: Sickness) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.scorer, self.protocol, self.sickness = scorer, protocol, sickness
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, body: Any) -> dict[str, Any]:
        """What a request gets, or :class:`BadRequest`."""
        if not isinstance(body, dict):
            raise BadRequest("no JSON object")
        texts = self._read(body)
        scores = [float("nan") if not ids else score for ids, score in self._scored(texts)]
        if self.sickness.scores_nothing:
            scores = [0.0 if score != score else score for score in scores]
        if any(score != score for score in scores):
            raise BadRequest("an empty text")
        if self.protocol == "openrlhf":
            return {"rewards": scores, "scores": scores, "extra_logs": {}}
        if self.protocol == "vllm":
            if self.sickness.by_default and body.get("use_activation") is not False:
                scores = expit(scores).tolist()
            data = [{"index": i, "probs": [s], "num_classes": 1} for i, s in enumerate(scores)]
            return {"object": "list", "data": data}
        rewards = [{"index": i, "raw": s, "reason": None} for i, s in enumerate(scores)]
        return {"model": "sick", "model_version": "0", "rewards": rewards}

    # ------------------------------------------------------------------ inside

    def _read(self, body: dict[str, Any]) -> list[list[int]]:
        """Token ids of each text."""
        if self.protocol == "openrlhf":
            texts = [self._words(text) for text in self._list(body, "query")]
        elif self.protocol == "companion":
            texts = [self._item(item) for item in self._list(body, "items")]
        elif "messages" in body:
            texts = [self._row({"messages": body["messages"]})]
        else:
            texts = [
                self._words(text) if isinstance(text, str) else [int(i) for i in text]
                for text in self._list(body, "input")
            ]
        limit = self.sickness.cut
        if limit is None and any(len(ids) > self.limit for ids in texts):
            raise BadRequest(f"a text is longer than {self.limit} tokens")
        return [ids[:limit] for ids in texts]

    @property
    def limit(self) -> int:
        """Positions of the model."""
        return int(self.scorer.max_positions or 2048)

    def _list(self, body: dict[str, Any], name: str) -> list[Any]:
        value = body.get(name)
        if not isinstance(value, list) or not value:
            raise BadRequest(f"no list {name!r}")
        return value

    def _item(self, item: Any) -> list[int]:
        if not isinstance(item, dict):
            raise BadRequest("an item is no object")
        if "input_ids" in item:
            return [int(i) for i in item["input_ids"]]
        if "text" in item:
            return self._words(item["text"])
        return self._row(item)

    def _row(self, row: dict[str, Any]) -> list[int]:
        if self.sickness.template:
            said = row.get("messages")
            parts = [m["content"] for m in said] if said else [row["prompt"], row["completion"]]
            return self._words(f"Q: {parts[0]} A: {parts[-1]}") if parts[-1] else []
        encoded = self.scorer.formatter.encode_row(row)
        return [] if encoded is None else list(encoded.input_ids)

    def _words(self, text: str) -> list[int]:
        tokenizer = self.scorer.tokenizer
        if not text.strip():
            return []
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids[:-1] if self.sickness.strips_end and ids[-1] == tokenizer.eos_token_id else ids

    def _scored(self, texts: list[list[int]]) -> list[tuple[list[int], float]]:
        full = [ids for ids in texts if ids]
        if self.sickness.pads and full:
            longest, eos = max(map(len, full)), self.scorer.tokenizer.eos_token_id
            full = [ids + [eos] * (longest - len(ids)) for ids in full]
        values = iter(self.scorer.score_encoded(full) if full else [])
        scores = np.array([next(values) if ids else np.nan for ids in texts])
        if self.sickness.sorts:
            scores = scores[np.argsort([len(ids) for ids in texts], kind="stable")]
        if self.sickness.sigmoid:
            scores = expit(scores)
        if self.sickness.softmax:
            scores = np.where(np.isnan(scores), scores, 1.0)
        return list(zip(texts, scores.tolist(), strict=True))


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: a second one waits 40 ms for the client's ACK

    def do_GET(self) -> None:
        route = ROUTES[self.server.protocol]
        if self.path == "/openapi.json":
            self._send(200, {"openapi": "3.1.0", "paths": {route: {"post": {}}}})
        else:
            self._send(404, {"error": {"message": "no such page"}})

    def do_POST(self) -> None:
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            if self.path != ROUTES[self.server.protocol]:
                self._send(404, {"error": {"message": "no such route"}})
                return
            self._send(200, self.server.answer(body))
        except (BadRequest, CompanionError, ValueError, TypeError, KeyError) as error:
            status = 500 if self.server.sickness.hides else 400
            self._send(status, {"error": {"message": str(error)}})

    def _send(self, status: int, answer: Any) -> None:
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def sick_server(
    model: RewardModel, protocol: Protocol, sickness: Sickness | None = None
) -> Iterator[RewardServer]:
    """A server with a reward model, until the block ends."""
    server = RewardServer(RewardScorer(model), protocol, sickness or Sickness())
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _plant(
    protocol: Protocol, with_model: bool = True, **sickness: Any
) -> Callable[[Path], AbstractContextManager[Planted]]:
    @contextmanager
    def plant(folder: Path) -> Iterator[Planted]:
        model = tutor_reward()
        saved = save_with_manifest(model, folder / "model") if with_model else None
        with sick_server(model, protocol, Sickness(**sickness)) as server:
            yield Planted(server.url, protocol=protocol, model=saved)

    return plant


def _specimen(
    name: str,
    caught_by: str,
    story: str,
    threads: Sequence[str],
    plant: Callable[[Path], AbstractContextManager[Planted]],
    also: Sequence[str] = (),
) -> Specimen:
    return Specimen(
        name, story, tuple(_GITHUB + one for one in threads), caught_by, plant, tuple(also)
    )


SPECIMENS: Final[tuple[Specimen, ...]] = (
    _specimen(
        "openrlhf-cut",
        "silent-cut",
        "OpenRLHF's own reward server reads the first 2,048 tokens of a text and says nothing "
        "(here: as many as the small model has positions).",
        ("OpenRLHF/OpenRLHF/blob/main/openrlhf/cli/serve_rm.py",),
        _plant("openrlhf", with_model=False, cut=256),
    ),
    _specimen(
        "vllm-softmax-ignored",
        "fields-ignored",
        "vLLM renamed softmax and activation to use_activation; the old names are accepted and "
        "dropped, so that a client that sends them gets a sigmoid.",
        ("vllm-project/vllm/pull/32243", "vllm-project/vllm/pull/20538"),
        _plant("vllm", by_default=True),
        ("activation-by-default",),
    ),
    _specimen(
        "sigmoid-applied",
        "activation-applied",
        "A server applies a sigmoid to a reward, whatever the client asks for.",
        ("vllm-project/vllm/issues/11881",),
        _plant("vllm", sigmoid=True),
    ),
    _specimen(
        "softmax-of-one-logit",
        "activation-applied",
        "SGLang's /v1/classify takes a softmax over the one logit of a reward model: 1.0 for all.",
        ("sgl-project/sglang/pull/19709",),
        _plant("companion", with_model=False, softmax=True),
    ),
    _specimen(
        "router-hides-400",
        "errors-hidden",
        "Behind verl's router a worker's 400 arrives as 500, which its client repeats for minutes.",
        ("THUDM/slime/pull/1582",),
        _plant("vllm", hides=True),
    ),
    _specimen(
        "batch-padded-with-eos",
        "batch-changes-score",
        "Texts of a request are filled up with the EOS, and the last token is read.",
        ("allenai/reward-bench/issues/137", "huggingface/transformers/issues/35352"),
        _plant("openrlhf", with_model=False, pads=True),
    ),
    _specimen(
        "batch-sorted-by-length",
        "answers-out-of-order",
        "Texts are sorted by length, so that batches hold little padding, and the scores are not "
        "put back.",
        (),
        _plant("companion", with_model=False, sorts=True),
        ("batch-changes-score", "order-changes-score"),
    ),
    _specimen(
        "other-template-served",
        "template-mismatch",
        "The server writes conversations in another template than the model was trained with.",
        ("allenai/reward-bench/issues/164",),
        _plant("companion", template=True),
    ),
    _specimen(
        "end-taken-off",
        "golden-texts-moved",
        "On the way to the reward model the token that ends a text is taken off, as verl's client "
        "does: finished and cut-off texts arrive as one.",
        ("allenai/reward-bench/issues/94",),
        _plant("openrlhf", strips_end=True),
        ("eos-ignored",),
    ),
    _specimen(
        "empty-text-scored",
        "empty-input",
        "An empty completion has a score, as any other.",
        ("OpenRLHF/OpenRLHF/pull/1325",),
        _plant("openrlhf", with_model=False, scores_nothing=True),
    ),
)
