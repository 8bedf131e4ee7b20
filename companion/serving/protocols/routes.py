"""What the routes of all protocols share: bodies, errors, and how they are told. Chapter 6."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError

from companion.errors import CompanionError, DataError, ModelError, ReadoutError
from companion.serving.patience import PATIENCE
from companion.serving.queue import QueueClosed, QueueFull
from companion.serving.service import BadItem, Call, ClientGone, DeadlineOver, Service

logger = logging.getLogger(__name__)

#: letters of what is wrong in an answer
_LONGEST: Final = 1000

Body = TypeVar("Body", bound=BaseModel)
#: Path of each route that takes a body, and what it takes.
BODIES: dict[str, type[BaseModel]] = {}
#: Of a protocol: status, type, what and cure, index of the item -> the body of an error.
ErrorBody = Callable[[int, str, CompanionError, int | None, str], dict[str, Any]]
#: Statuses after which another try may help.
_AGAIN: Final = (429, 503)
#: The header that pins a version, as OpenAPI has it.
_PIN: Final = {
    "name": "X-Model-Version",
    "in": "header",
    "required": False,
    "description": "refuse (409) if another version of the model is served",
    "schema": {"type": "string"},
}


class WrongVersion(ModelError):
    """The client asked for another version of the model than is served."""


class TooLarge(DataError):
    """More bytes than the server takes."""


class Unsupported(DataError):
    """This server, or the kind of its model, does not have the route."""


class NotFinite(ReadoutError):
    """A score that is no number, on a route that cannot say so of one text."""


def service_of(request: Request) -> Service:
    """The service of the app that a request came to."""
    return request.app.state.service  # type: ignore[no-any-return]


async def read(request: Request, model: type[Body]) -> Body:
    """The body of a request as `model`.

    Raises
    ------
    DataError
        For what is no such body; it names the field.
    TooLarge
    """
    limit = request.app.state.max_body
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > limit:
            raise TooLarge(
                f"the body has more than {limit:,} bytes", "send fewer texts a request (--max_body)"
            )
    try:
        return model.model_validate_json(bytes(raw))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
        ).lstrip(".")
        what = f"{where}: {first['msg']}" if where else first["msg"]
        more = error.error_count() - 1
        raise DataError(what + (f" (and {more} more)" if more else ""), "see /docs") from error


def call_of(request: Request, protocol: str) -> Call:
    """A request on its way; call it after the body was read."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return Call(request.state.id, protocol, PATIENCE[protocol], gone)


def check_version(request: Request, pinned: str | None) -> None:
    """Refuse a client that asks for another version than is served.

    Raises
    ------
    WrongVersion
    """
    ours = service_of(request).identity.version
    if pinned is not None and pinned != ours:
        raise WrongVersion(
            f"the model's version is {ours}, not {pinned[:64]}",
            "ask GET /v1/models, and compare the hashes before scores are mixed",
        )


def status_of(error: CompanionError, protocol: str) -> tuple[int, str]:
    """HTTP status and type of an error."""
    for kind, status, name in _errors(protocol):
        if isinstance(error, kind):
            return status, name
    return 500, "model_failed"


def _errors(protocol: str) -> Sequence[tuple[type[CompanionError], int, str]]:
    """Kinds of errors, the first that fits holds: status and type."""
    full = PATIENCE[protocol].full
    return (
        (BadItem, 400, "bad_item"),
        (TooLarge, 413, "body_too_large"),
        (NotFinite, 422, "not_finite"),
        (Unsupported, 400, "not_supported"),
        (WrongVersion, 409, "other_version"),
        (QueueFull, full, "queue_full"),
        (QueueClosed, 503, "going_down"),
        (DeadlineOver, 504, "deadline"),
        (ClientGone, 499, "client_gone"),
        (DataError, 400, "bad_request"),
    )


def _refusals(
    protocol: str, error_body: ErrorBody, never: Sequence[type[CompanionError]]
) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route as OpenAPI has them, each with an example of its body."""
    found: dict[int | str, dict[str, Any]] = {}
    for kind, status, name in _errors(protocol):
        if kind in (*never, ClientGone):  # nobody reads that one
            continue
        said = (kind.__doc__ or "").strip().splitlines()[0]
        if kind is DataError:
            said = "A body that is not what the route takes; the message names the field."
        error = BadItem(said, "…", 3) if kind is BadItem else kind(said, "…")
        body = error_body(status, name, error, getattr(error, "index", None), "…")
        told = found.setdefault(
            status,
            {"description": "", "content": {"application/json": {"examples": {}}}},
        )
        told["description"] = f"{told['description']} `{name}`: {said}".strip()
        told["content"]["application/json"]["examples"][name] = {"value": body}
        if status in _AGAIN:
            about = {"description": "Seconds until another try.", "schema": {"type": "integer"}}
            told["headers"] = {"Retry-After": about}
    return found


def _shortened(error: CompanionError) -> CompanionError:
    """An error that does not repeat all that was sent (a field's name of a megabyte, say)."""
    if len(error.what) <= _LONGEST:
        return error
    return CompanionError(error.what[:_LONGEST] + "…", error.cure)


def post(
    router: APIRouter,
    path: str,
    model: type[Body],
    answer: Callable[[Request, Body], Awaitable[Any]],
    *,
    protocol: str,
    error_body: ErrorBody,
    examples: Sequence[dict[str, Any]],
    answers: dict[str, Any],
    never: Sequence[type[CompanionError]] = (),
) -> None:
    """Add a route whose body is read by `model` and answered by `answer`.

    (FastAPI's own reading of a body has no limit of size, ends in 500 on some that are nested
    deeply, and answers 422 where these clients know 400.)

    Parameters
    ----------
    router : APIRouter
    path : str
    model : type of pydantic.BaseModel
        Of the body.
    answer : callable
        A coroutine function of the request and its body.
    protocol : str
        Whose patience holds.
    error_body : callable
        See :data:`ErrorBody`.
    examples : sequence of dict
        Of bodies, for the documentation.
    answers : dict
        An example of an answer.
    never : sequence of type
        Errors that the route does not have, for the documentation.
    """

    async def route(request: Request) -> Response:
        try:
            check_version(request, request.headers.get("x-model-version"))
            body = await read(request, model)
            return JSONResponse(await answer(request, body))
        except CompanionError as error:
            status, kind = status_of(error, protocol)
            service_of(request).metrics.refused(kind)
            if status >= 500:
                logger.warning(f"{path} {status} {kind}: {error.what}")
            index = error.index if isinstance(error, BadItem) else None
            content = error_body(status, kind, _shortened(error), index, request.state.id)
            headers = {"Retry-After": "1"} if status in _AGAIN else None
            return JSONResponse(content, status, headers)

    BODIES[path] = model
    # `openapi.document` moves what is in $defs to where the references point
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    description = inspect.cleandoc(answer.__doc__ or "")
    router.add_api_route(
        path,
        route,
        methods=["POST"],
        description=description,
        name=path.strip("/").replace("/", "_"),
        responses={
            200: {"content": {"application/json": {"example": answers}}},
            **_refusals(protocol, error_body, never),
        },
        openapi_extra={
            "parameters": [_PIN],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": schema,
                        "examples": {str(i): {"value": one} for i, one in enumerate(examples)},
                    }
                },
            },
        },
    )
