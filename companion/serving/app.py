"""The ASGI application: what stands around the routes of all protocols. Chapter 6."""

from __future__ import annotations

import functools
import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from companion import __version__
from companion.errors import ServiceError
from companion.serving import page
from companion.serving.openapi import OPEN, document
from companion.serving.protocols import native, openrlhf, vllm
from companion.serving.protocols.routes import BODIES
from companion.serving.service import Service

logger = logging.getLogger("companion.serving.access")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

#: every protocol is one file with a router; a new one is named here and in `patience`
PROTOCOLS: Final = (native, vllm, openrlhf)
#: routes that are asked so often that a line for each would bury the others
_PROBED: Final = {"/livez", "/readyz", "/metrics"}
__all__ = ["BODIES", "PROTOCOLS", "make_app"]
_PLAIN: Final = re.compile(r"[\x21-\x7e]{1,128}")


def make_app(
    service: Service,
    *,
    token: str | None = None,
    max_body: int = 32 * 2**20,
    overlong_chosen: bool = False,
) -> FastAPI:
    """The application of a service.

    Parameters
    ----------
    service : Service
        Started with the application, and stopped with it, after its requests were served.
    token : str, optional
        Asked for as a bearer token, on all routes but the probes and the pages.
    max_body : int
        Bytes.
    overlong_chosen : bool
        Whether whoever starts it said what becomes of texts that are too long.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        app.state.ready = True
        yield
        app.state.ready = False
        service.stop()

    app = FastAPI(
        title="companion serve",
        version=__version__,
        summary="Scores of one reward model",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from a CDN
        redoc_url=None,
    )
    app.state.service = service
    app.state.ready = False
    app.state.draining = False
    app.state.max_body = max_body
    app.state.overlong_chosen = overlong_chosen
    for protocol in PROTOCOLS:
        app.include_router(protocol.router)
    app.include_router(page.router)
    app.openapi = functools.partial(document, app)  # type: ignore[method-assign]

    down_said: Any = {503: {"description": "No: the body says what is down."}}

    @app.get("/livez", tags=["server"], responses=down_said)
    async def livez() -> dict[str, str]:
        """Whether the process answers, and the model's thread lives; else it is to be restarted."""
        if app.state.ready and not service.engine.alive:
            raise _Down("the model's thread has died")
        return {"status": "ok"}

    @app.get("/readyz", tags=["server"], responses=down_said)
    async def readyz() -> dict[str, str]:
        """Whether requests are to be sent here."""
        if not app.state.ready or app.state.draining:
            raise _Down("not ready")
        return {"status": "ok", "model_version": service.identity.version}

    @app.get("/version", tags=["server"])
    async def version() -> dict[str, Any]:
        """Versions of the server and of the model."""
        return {
            "companion": __version__,
            "model": service.name,
            "model_version": service.identity.version,
            "hashes": service.identity.to_dict(),
        }

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(_Down)
    async def down(_: Any, error: _Down) -> JSONResponse:
        return JSONResponse({"status": error.what}, 503)

    @app.exception_handler(Exception)
    async def failed(request: Any, error: Exception) -> JSONResponse:
        told = {"code": 500, "type": "bug", "message": f"{type(error).__name__} in the server"}
        told |= {"cure": "its log has the traceback; please report it", "index": None}
        return JSONResponse({"id": request.state.id, "error": told}, 500)

    app.add_middleware(_Around, state=app.state, token=token)
    return app


class _Down(ServiceError):
    pass


class _Around:
    """A request's id, its count and time, the token, and the end of connections while draining.

    (Starlette's BaseHTTPMiddleware would hide that a client has hung up.)
    """

    def __init__(self, app: Any, state: Any, token: str | None) -> None:
        self.app, self.state, self.token = app, state, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        own = given if _PLAIN.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["id"] = own
        began, status = time.monotonic(), 500

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [
                    (b"x-request-id", own.encode()),
                    (b"x-model-version", self.state.service.identity.version.encode()),
                    (b"x-content-type-options", b"nosniff"),  # strangers' text is no page
                ]
                if self.state.draining:
                    more.append((b"connection", b"close"))
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        try:
            if self.token and scope["path"] not in OPEN and not self._allowed(headers):
                told = {"code": 401, "type": "no_token", "message": "no bearer token, or another"}
                told |= {"cure": "send Authorization: Bearer …", "index": None}
                refusal = JSONResponse({"id": own, "error": told}, 401)
                self.state.service.metrics.refused("no_token")
                await refusal(scope, receive, answer)
                return
            await self.app(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - began
            self.state.service.metrics.request(route, status, seconds)
            if route not in _PROBED:
                told = {"request": own, "route": route, "status": status, "seconds": seconds}
                logger.info(f"{route} {status} in {seconds:.3f} s ({own})", extra={"fields": told})

    def _allowed(self, headers: dict[bytes, bytes]) -> bool:
        wanted = f"Bearer {self.token}".encode()
        return hmac.compare_digest(headers.get(b"authorization", b""), wanted)
