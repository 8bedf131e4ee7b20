"""The page on which people judge pairs, on loopback, offline. Chapter 7.

Its files lie in ``companion/assets/label``; the colours are those of the server's page. What people
wrote reaches it as JSON, and its script shows it as text only. A page of another site cannot reach
this one: a name that leads here by another's DNS is refused (``Host``), and so is a request that
another origin sends.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from companion.errors import CompanionError, ServiceError
from companion.monitoring.labelling import Labelling, Stale, figure_lines

_ASSETS: Final = Path(__file__).parents[1] / "assets"
_FILES: Final = {
    "/": ("label/index.html", "text/html"),
    "/page.css": ("serve/page.css", "text/css"),
    "/label.css": ("label/label.css", "text/css"),
    "/label.js": ("label/label.js", "text/javascript"),
}
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
#: what this machine is called in the address that a browser on it, or behind a tunnel, opens
_OWN_NAMES: Final = ("127.0.0.1", "localhost", "::1")
_LONGEST_BODY: Final = 1 << 16


@functools.cache
def _read(name: str) -> bytes:
    return (_ASSETS / name).read_bytes()


class _Refused(ServiceError):
    def __init__(self, status: int, what: str, cure: str | None = None) -> None:
        super().__init__(what, cure)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # an idle connection is closed
    server: LabelServer

    def version_string(self) -> str:
        return "companion"

    def log_message(self, format: str, *args: Any) -> None:
        """No line a request: the terminal is for notes."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, find: Callable[[], tuple[bytes, str]]) -> None:
        try:
            self._check_host()
            status, (body, kind) = 200, find()
        except CompanionError as error:
            status = 409 if isinstance(error, Stale) else getattr(error, "status", 400)
            body, kind = _json({"error": error.what, "cure": error.cure})
            self.close_connection = True  # a body may be left unread
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _check_host(self) -> None:
        host = self.headers.get("Host", "")
        try:
            known = urlsplit(f"//{host}").hostname in _OWN_NAMES
        except ValueError:
            known = False
        if not known:
            raise _Refused(
                421, f"no such host here: {host[:100]!r}", "open the address that the command says"
            )
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise _Refused(403, f"a page of {origin[:100]!r} asks", "judge on this page")

    def _get(self) -> tuple[bytes, str]:
        where = urlsplit(self.path)
        if where.path in _FILES:
            name, kind = _FILES[where.path]
            return _read(name), kind
        if where.path == "/api/view":
            who = parse_qs(where.query).get("annotator")
            return _json(self.server.view(who[0] if who else None))
        if where.path == "/api/figures":
            figures = self.server.labelling.figures()
            return _json({"lines": figure_lines(figures)})
        raise _Refused(404, f"no page {where.path[:100]!r}")

    def _post(self) -> tuple[bytes, str]:
        if self.headers.get_content_type() != "application/json":
            raise _Refused(415, "no JSON", "send Content-Type: application/json")
        try:
            size = int(self.headers.get("Content-Length", ""))
        except ValueError:
            size = -1
        if not 0 <= size <= _LONGEST_BODY:
            raise _Refused(413, "a body of unknown or too great length")
        try:
            given = json.loads(self.rfile.read(size))
        except ValueError as error:
            raise _Refused(400, f"no JSON: {error}") from error
        if not isinstance(given, dict):
            raise _Refused(400, "no JSON object")
        labelling, who = self.server.labelling, given.get("annotator")
        if self.path == "/api/judge":
            return _json(labelling.judge(who, str(given.get("id")), str(given.get("choice"))))
        if self.path == "/api/undo":
            return _json(labelling.undo(who))
        if self.path == "/api/again":
            return _json(labelling.again(who))
        raise _Refused(404, f"no route {self.path[:100]!r}")


def _json(value: Any) -> tuple[bytes, str]:
    return json.dumps(value, ensure_ascii=False).encode(), "application/json"


class LabelServer(ThreadingHTTPServer):
    """Serves the page of a :class:`Labelling` on 127.0.0.1.

    A context manager that serves in a thread of its own until the end of the block; or call
    ``serve_forever``.

    Parameters
    ----------
    labelling : Labelling
    port : int
        0 takes a free one.

    Attributes
    ----------
    url : str

    Raises
    ------
    ServiceError
        If the port is taken.
    """

    daemon_threads = True

    def __init__(self, labelling: Labelling, port: int = 0) -> None:
        self.labelling = labelling
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ServiceError(
                f"cannot listen on 127.0.0.1:{port}: {reason}", "give another --port, or 0"
            ) from error
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def view(self, annotator: str | None) -> dict[str, Any]:
        """As :meth:`Labelling.view`; without a name where one is needed, only that."""
        if annotator is None and self.labelling.annotator is None:
            return {"annotator": None, "fixed": False}
        return self.labelling.view(annotator)

    def __enter__(self) -> LabelServer:
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
