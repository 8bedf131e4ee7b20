"""The server's own routes: ``/v1/rewards``, ``/v1/steps``, ``/v1/compare``. Chapter 6."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from companion.errors import CompanionError, DataError
from companion.formatting import Encoded, EncodedSteps
from companion.models import TokenReadout
from companion.serving.protocols.routes import (
    NotFinite,
    Unsupported,
    call_of,
    check_version,
    post,
    service_of,
)
from companion.serving.service import Service, cut_tokens

router = APIRouter(tags=["rewards"])

Form = Literal["raw", "centered", "z", "percentile"]
Message = dict[str, Any]
Words = str | list[Message]


_MODEL: Any = Field(None, description="refuse (400) if another name is served")
_VERSION: Any = Field(None, description="refuse (409) if another version is served")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Item(_Strict):
    """A text: messages, prompt and completion, text, or token ids."""

    messages: list[Message] | None = Field(
        None, description="a conversation; the last message is scored"
    )
    prompt: Words | None = Field(None, description="text, or messages")
    completion: Words | None = Field(None, description="text, or messages")
    completions: list[str] | None = Field(None, description="the steps, for a process model")
    text: str | None = Field(None, description="the whole text")
    input_ids: list[StrictInt] | None = Field(None, min_length=1, description="read as they are")
    places: list[StrictInt] | None = Field(
        None, description="with input_ids, for outcome and process models: the tokens to read"
    )
    terminated: StrictBool | None = Field(
        None, description="false: the completion was cut off, and its end is not written"
    )
    drawn: StrictBool | None = Field(
        None, description="true: a policy wrote the completion, which may repeat the prompt"
    )
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def row(self, index: int, name: str = "items") -> Any:
        """As a scorer takes it: a row, or token ids."""
        where = f"{name}[{index}]"
        given = self.model_dump(exclude_none=True)
        if self.input_ids is None:
            if self.places is not None:
                raise DataError(f"{where}.places: only token ids have places", "give input_ids too")
            if not given.keys() - {"terminated", "drawn", "tools", "chat_template_kwargs"}:
                raise DataError(
                    f"{where}: holds no text",
                    "give messages, prompt and completion, text, or input_ids",
                )
            return given
        if more := given.keys() - {"input_ids", "places"}:
            raise DataError(f"{where}: input_ids beside {', '.join(sorted(more))}", "give one form")
        encoded = Encoded(list(self.input_ids), 0, True)
        return encoded if self.places is None else EncodedSteps(encoded, list(self.places))


_PAIR = {"prompt": "What is 2 + 3?", "completion": "2 + 3 = 5. The answer is 5."}


class Rewards(_Strict):
    """Texts to score."""

    items: Annotated[list[Item], Field(min_length=1, max_length=65_536)]
    return_: list[Form] = Field(
        default=["raw"],
        alias="return",
        min_length=1,
        description="all but raw need the model's reference set",
    )
    model: str | None = _MODEL
    model_version: str | None = _VERSION


class Steps(_Strict):
    """Solutions of which each step, or each token, is judged."""

    items: Annotated[list[Item], Field(min_length=1, max_length=65_536)]
    tokens: StrictBool = Field(False, description="also what the token at each place reads as")
    model: str | None = _MODEL
    model_version: str | None = _VERSION


class Pair(_Strict):
    """Two completions of one prompt."""

    prompt: Words
    a: Words
    b: Words
    a_terminated: StrictBool | None = Field(None, description="false: a was cut off")
    b_terminated: StrictBool | None = Field(None, description="false: b was cut off")


class Compare(_Strict):
    """Pairs to compare."""

    pairs: Annotated[list[Pair], Field(min_length=1, max_length=32_768)]
    model: str | None = _MODEL
    model_version: str | None = _VERSION


def error_body(
    status: int, kind: str, error: CompanionError, index: int | None, request_id: str
) -> dict[str, Any]:
    """What a refusal says."""
    told = {"code": status, "type": kind, "message": error.what, "cure": error.cure, "index": index}
    return {"id": request_id, "error": told}


def head(request: Request) -> dict[str, Any]:
    """What each answer begins with: the request, the model, and the hashes of its parts."""
    service = service_of(request)
    return {
        "id": request.state.id,
        "model": service.name,
        "model_version": service.identity.version,
        "hashes": service.identity.to_dict(),
        "reference_version": service.reference_version,
    }


def _check(request: Request, model: str | None, version: str | None) -> Service:
    service = service_of(request)
    if model is not None and model not in service.names:
        raise DataError(
            f"model is {model!r}, and this server has {service.name!r}", "ask GET /v1/models"
        )
    check_version(request, version)
    return service


def _warnings(service: Service, item: Any, text: Any) -> list[str]:
    """What is to be said of one text, that was sent as words or as ids."""
    encoded = text if isinstance(text, Encoded) else text.encoded
    said = service.template_warnings(item, text)
    if isinstance(item, (Encoded, EncodedSteps)):
        return said
    if not encoded.terminated:
        said.append("unfinished: the completion was cut off, and its end is not written")
    if encoded.cut_tokens:
        limit = service.scorer.formatter.max_length
        said.append(f"{encoded.cut_tokens} tokens of the prompt were cut to fit {limit}")
    return said


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _of_text(
    service: Service, rows: list[Any], prepared: Any, scores: Any, i: int, forms: list[str]
) -> dict[str, Any]:
    text = prepared.texts[i]
    cut = cut_tokens(text)
    if cut:
        service.metrics.cut(cut)
    found: dict[str, Any] = {}
    for form in forms:
        values = getattr(scores, form)
        found[form] = _number(values[i])
    return found | {
        "n_tokens": len(text if isinstance(text, Encoded) else text.encoded),
        "cut_tokens": cut,
        "warnings": _warnings(service, rows[i], text),
        "reason": scores.reasons[i],
    }


def _check_forms(service: Service, forms: list[str]) -> None:
    if service.scorer.reference is None and (lacking := set(forms) - {"raw"}):
        raise DataError(
            f"return: {', '.join(sorted(lacking))} needs a reference set, and the model has none",
            "ask for raw, or give the model a reference: companion compare --write_reference",
        )


async def rewards(request: Request, body: Rewards) -> dict[str, Any]:
    """Scores of texts, raw or against the model's reference set.

    ``raw`` is the model's scalar: only differences of one model mean something. ``centered``, ``z``
    and ``percentile`` compare it with the reference set that the model was saved with. A score that
    is not finite is null, with a reason.
    """
    service = _check(request, body.model, body.model_version)
    _check_forms(service, list(body.return_))
    call = call_of(request, "native")
    rows = [item.row(i) for i, item in enumerate(body.items)]
    prepared, scores = await service.score(call, rows)
    forms: list[str] = list(body.return_)
    items = [
        {"index": i, **_of_text(service, rows, prepared, scores, i, forms)}
        for i in range(len(rows))
    ]
    return {**head(request), "rewards": items, "usage": {"tokens": call.tokens}}


def _read_tokens(
    tokenizer: Any, texts: list[Any], places: list[list[int] | None]
) -> list[list[str] | None]:
    """What the token at each place reads as, behind the one before it.

    (Alone, a token of some tokenizers loses the blank that it begins with.)
    """
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    found: list[list[str] | None] = []
    for text, own in zip(texts, places, strict=True):
        ids = (text if isinstance(text, Encoded) else text.encoded).input_ids
        if own is None:
            found.append(None)
            continue
        words = []
        for place in own:
            before = decode(ids[max(place - 1, 0) : place])
            words.append(decode(ids[max(place - 1, 0) : place + 1])[len(before) :])
        found.append(words)
    return found


async def steps(request: Request, body: Steps) -> dict[str, Any]:
    """Values of steps (process models) or tokens (outcome models), and their aggregate."""
    service = _check(request, body.model, body.model_version)
    readout = service.scorer.readout
    if not isinstance(readout, TokenReadout):
        raise Unsupported(
            "the model has one score a text, no values of steps", "ask POST /v1/rewards"
        )
    call = call_of(request, "native")
    rows = [item.row(i) for i, item in enumerate(body.items)]
    prepared, scores = await service.score(call, rows)
    first = scores.first_errors(readout.threshold)
    words: list[list[str] | None] = [None] * len(rows)
    if body.tokens:
        tokenizer = service.scorer.tokenizer
        words = await run_in_threadpool(_read_tokens, tokenizer, prepared.texts, scores.places)
    found = []
    for i in range(len(rows)):
        own = _of_text(service, rows, prepared, scores, i, [])
        has = scores.values[i] is not None
        own |= {
            "score": _number(scores.raw[i]),
            "values": scores.values[i].tolist() if has else None,
            "wrong": scores.wrong[i].tolist() if has else None,
            "logits": scores.logits[i].tolist() if has else None,
            "places": scores.places[i],
            "first_error": first[i],
        }
        if body.tokens:
            own["tokens"] = words[i]
        found.append({"index": i, **own})
    return {**head(request), "results": found, "usage": {"tokens": call.tokens}}


async def compare(request: Request, body: Compare) -> dict[str, Any]:
    """Which of two completions is better: margin, and the calibrated P(A beats B).

    The probability is the logistic function of the margin over the temperature that was fitted on
    held-out pairs. Without such a temperature there is none, and ``why`` says so.
    """
    service = _check(request, body.model, body.model_version)
    manifest = service.scorer.manifest
    temperature = None if manifest is None else manifest.temperature
    why = None
    if service.scorer.readout.kind != "scalar":
        why = "the model's scores are no Bradley-Terry scores"
    elif temperature is None:
        why = (
            "no fitted temperature: sigmoid(margin) is no calibrated probability; train with "
            "enough held-out pairs (companion train fits it)"
        )
    call = call_of(request, "native")
    rows = []
    for pair in body.pairs:
        for words, said in (
            (pair.a, pair.a_terminated),
            (pair.b, pair.b_terminated),
        ):
            row: dict[str, Any] = {"prompt": pair.prompt, "completion": words}
            rows.append(row if said is None else {**row, "terminated": said})
    prepared, scores = await service.score(
        call, rows, name=lambda i: f"pairs[{i // 2}].{'ab'[i % 2]}"
    )
    forms = ["raw"] + (["z", "percentile"] if service.scorer.reference is not None else [])
    found = []
    for i in range(len(body.pairs)):
        a, b = (_of_text(service, rows, prepared, scores, 2 * i + side, forms) for side in (0, 1))
        margin = scores.raw[2 * i] - scores.raw[2 * i + 1]
        probability = None
        if why is None and temperature is not None and math.isfinite(margin):
            probability = float(0.5 * (1 + np.tanh(margin / temperature / 2)))
        reason = a["reason"] or b["reason"]
        found.append(
            {
                "index": i,
                "margin": _number(margin),
                "probability": probability,
                "why": why or (f"no margin: {reason}" if reason else None),
                "a": a,
                "b": b,
            }
        )
    return {
        **head(request),
        "temperature": temperature,
        "comparisons": found,
        "usage": {"tokens": call.tokens},
    }


_HEAD = {
    "id": "0f3c…",
    "model": "reward",
    "model_version": "4f1d2a60c8b39e75",
    "hashes": {
        "weights": "…",
        "config": "…",
        "tokenizer": "…",
        "template": "…",
        "readout": "…",
        "dtype": "float32",
    },
}
_TEXT = {"raw": 1.25, "n_tokens": 23, "cut_tokens": 0, "warnings": [], "reason": None}

_shared: dict[str, Any] = {
    "protocol": "native",
    "error_body": error_body,
    "never": (NotFinite,),  # of one text it is told in the answer
}
post(
    router,
    "/v1/rewards",
    Rewards,
    rewards,
    examples=[
        {"items": [_PAIR], "return": ["raw"]},
        {
            "items": [
                {
                    "messages": [
                        {"role": "user", "content": "Hi"},
                        {"role": "assistant", "content": "Hello."},
                    ]
                }
            ]
        },
        {"items": [{**_PAIR, "terminated": False}]},
    ],
    answers={**_HEAD, "rewards": [{"index": 0, **_TEXT}], "usage": {"tokens": 23}},
    **_shared,
)
post(
    router,
    "/v1/steps",
    Steps,
    steps,
    examples=[
        {"items": [{"prompt": "What is 2 + 3?", "completions": ["2 + 3 = 5.", "The answer is 5."]}]}
    ],
    answers={
        **_HEAD,
        "results": [
            {
                "index": 0,
                "score": 0.9,
                "values": [0.95, 0.9],
                "wrong": [0.05, 0.1],
                "first_error": None,
            }
        ],
    },
    **_shared,
)
post(
    router,
    "/v1/compare",
    Compare,
    compare,
    examples=[{"pairs": [{"prompt": "What is 2 + 3?", "a": "5", "b": "6"}]}],
    answers={
        **_HEAD,
        "temperature": 1.3,
        "comparisons": [
            {"index": 0, "margin": 2.1, "probability": 0.83, "why": None, "a": _TEXT, "b": _TEXT}
        ],
    },
    **_shared,
)


@router.get("/v1/models", tags=["model"])
async def models(request: Request) -> dict[str, Any]:
    """The model that is served: version, hashes, kind, limits."""
    service = service_of(request)
    scorer = service.scorer
    own = {
        "id": service.name,
        "object": "model",
        "kind": scorer.readout.kind,
        "model_version": service.identity.version,
        "hashes": service.identity.to_dict(),
        "max_length": scorer.formatter.max_length or scorer.max_positions,
        "overlong": scorer.formatter.overlong,
        "exact": service.exact,
        "deviation": service.deviation,
        "temperature": None if scorer.manifest is None else scorer.manifest.temperature,
        "notes": service.notes,
    }
    return {"object": "list", "data": [own]}


@router.get("/v1/reference", tags=["model"])
async def reference(request: Request) -> dict[str, Any]:
    """The reference set that centred scores, z and percentiles are made against."""
    found = service_of(request).scorer.reference
    return {**head(request), "reference": None if found is None else vars(found)}
