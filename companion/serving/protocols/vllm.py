"""vLLM's routes ``/classify`` and ``/pooling``, as vLLM 0.33 has them; raw scores by default.

verl posts to ``/classify`` with ``use_activation: false`` and reads ``data[-1].probs[-1]``. A field
that changes a score and that we do not have is refused; vLLM itself drops its own old name
``softmax`` without a word. Chapter 6.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, StrictBool, StrictInt
from scipy.special import expit, softmax

from companion.errors import CompanionError, DataError
from companion.formatting import Encoded, EncodedSteps
from companion.serving.protocols.routes import NotFinite, Unsupported, call_of, post, service_of
from companion.serving.service import Service

logger = logging.getLogger(__name__)
router = APIRouter(tags=["vLLM"])

#: fields that change no score
_HARMLESS = {"user", "request_id", "priority", "cache_salt", "encoding_format", "embed_dtype"}
#: fields that may stand there with the value that they have by default
_DEFAULTS: dict[str, Any] = {
    "truncate_prompt_tokens": None,
    "truncation_side": None,
    "padding": None,
    "add_generation_prompt": False,
    "continue_final_message": False,
    "chat_template": None,
    "mm_processor_kwargs": None,
    "dimensions": None,
}
_SAID: set[str] = set()

Ids = list[StrictInt]


class Classify(BaseModel):
    """What vLLM's ``/classify`` and ``/pooling`` take."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: str | list[str] | Ids | list[Ids] | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: StrictBool | None = None
    use_activation: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    task: str | None = None


def error_body(
    status: int, kind: str, error: CompanionError, index: int | None, request_id: str
) -> dict[str, Any]:
    """As vLLM's (and OpenAI's) refusals."""
    what = error.what if error.cure is None else f"{error.what} ({error.cure})"
    param = None if index is None else f"input[{index}]"
    return {"error": {"message": what, "type": kind, "param": param, "code": status}}


def _check(service: Service, body: Classify) -> None:
    for name, value in (body.model_extra or {}).items():
        if name in _HARMLESS:
            if name not in _SAID:
                _SAID.add(name)
                logger.info(f"the field {name!r} changes no score and is ignored")
        elif name not in _DEFAULTS:
            raise DataError(
                f"the field {name!r} is not known here",
                "the one that turns the activation on and off is use_activation"
                if name in ("softmax", "activation", "normalize")
                else "leave it out",
            )
        elif value != _DEFAULTS[name]:
            raise DataError(
                f"{name}={value!r} would change what is scored, and this server does not do it",
                "leave it out: texts are never cut here, and the template is the model's own",
            )
    if body.model is not None and body.model not in service.names:
        raise DataError(f"the model {body.model!r} does not exist", f"it is {service.name!r}")
    if (body.input is None) == (body.messages is None):
        raise DataError("neither or both of input and messages", "give one of them")


def _texts(service: Service, body: Classify, everywhere: bool = False) -> list[Any]:
    """Token ids of a request; `everywhere`: with each of their tokens as a place to read."""
    kwargs = body.chat_template_kwargs
    found: list[Any]
    if body.messages is not None:
        row: dict[str, Any] = {"messages": body.messages}
        if kwargs is not None:
            row["chat_template_kwargs"] = kwargs
        found = [service.scorer.formatter.encode_row(row)]
    else:
        given: Any = body.input
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given:
            raise DataError("input is empty", "give at least one text")
        special = body.add_special_tokens is not False
        found = [_encoded(service, text, special) for text in given]
    if not everywhere:
        return found
    return [item and EncodedSteps(item, list(range(len(item)))) for item in found]


def _encoded(service: Service, text: str | list[int], special: bool) -> Encoded:
    """Text as vLLM reads it: with the tokenizer's own special tokens, and no end that it lacks.

    A text that begins with BOS gets no second one, which vLLM would add.
    """
    if not isinstance(text, str):
        return Encoded(list(text), 0, True)
    tokenizer = service.scorer.tokenizer
    bos = tokenizer.bos_token
    special = special and not (bos and text.startswith(bos))
    return Encoded(list(tokenizer(text, add_special_tokens=special)["input_ids"]), 0, True)


def _answer(request: Request, kind: str, data: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    service = service_of(request)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    return {
        "id": f"{kind}-{request.state.id}",
        "object": "list",
        "created": int(time.time()),
        "model": service.name,
        "data": data,
        "usage": {**usage, "prompt_tokens_details": None},
    }


async def classify(request: Request, body: Classify) -> dict[str, Any]:
    """vLLM's route for one score a text: ``data[i].probs[0]``, raw.

    ``use_activation: true`` gives its logistic function, as vLLM does for a model with one label.
    Text is read as it is, with the tokenizer's special tokens; ``messages`` go through the model's
    template. A score that is not finite is a 422.
    """
    service = service_of(request)
    _check(service, body)
    if service.scorer.readout.kind != "scalar":
        raise Unsupported(
            "/classify carries one score a text, and the model has values of tokens",
            "ask /pooling or /v1/steps",
        )
    call = call_of(request, "vllm")
    _, scores = await service.score(call, lambda: _texts(service, body), name="input")
    data = []
    for i, raw in enumerate(scores.raw.tolist()):
        _check_finite(scores.reasons[i], i)
        value = float(expit(raw)) if body.use_activation else raw
        data.append({"index": i, "label": "LABEL_0", "probs": [value], "num_classes": 1})
    return _answer(request, "classify", data, call.tokens)


async def pooling(request: Request, body: Classify) -> dict[str, Any]:
    """vLLM's route for values of tokens: ``data[i].data`` is ``[tokens, labels]``, raw logits.

    With ``use_activation: true`` the logistic function of one label, or the softmax of three. Of a
    model with one score a text, ``data[i].data`` is ``[score]``.
    """
    service = service_of(request)
    _check(service, body)
    scalar = service.scorer.readout.kind == "scalar"
    if body.task not in (None, "classify" if scalar else "token_classify"):
        raise DataError(f"task is {body.task!r}", "leave it out: the model has one")
    call = call_of(request, "vllm")
    _, scores = await service.score(call, lambda: _texts(service, body, not scalar), name="input")
    data = []
    for i, raw in enumerate(scores.raw.tolist()):
        _check_finite(scores.reasons[i], i)
        values = np.array([raw]) if scalar else scores.logits[i]
        if body.use_activation:
            values = softmax(values, axis=-1) if values.shape[-1] > 1 else expit(values)
        data.append({"index": i, "object": "pooling", "data": values.tolist()})
    return _answer(request, "pool", data, call.tokens)


def _check_finite(reason: str | None, i: int) -> None:
    if reason is not None:
        raise NotFinite(f"input[{i}]: {reason}", "serve the model in float32")


_ITEM = {"index": 0, "label": "LABEL_0", "probs": [1.25], "num_classes": 1}
for _path, _route, _one in (
    ("/classify", classify, _ITEM),
    ("/pooling", pooling, {"index": 0, "object": "pooling", "data": [[0.3], [1.2]]}),
):
    post(
        router,
        _path,
        Classify,
        _route,
        protocol="vllm",
        error_body=error_body,
        examples=[
            {"input": "What is 2 + 3? The answer is 5.", "use_activation": False},
            {"input": [[5, 17, 4, 2]]},
        ],
        answers={"object": "list", "data": [_one], "usage": {"prompt_tokens": 4}},
    )
